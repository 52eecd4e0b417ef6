"""Which training rows each client holds."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from fedbe.errors import ConfigError, Facts, Problem
from fedbe.seeding import derive_seed, generator

_DIRICHLET_DRAWS = 100


class Partitioner(ABC):
    """Base class of the rules that give each client its training rows.

    The rules are pure functions of the data and the seed: `partition` gives the same rows at every call, a row goes to
    at most one client, and each client gets one at least.
    """

    label_column: str | None = None
    """Column whose distribution over the clients is worth looking at; ``None`` when the rule knows of none."""

    @abstractmethod
    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the row indices of each client, by client id, in the clients' order.

        Args:
            dataset: The training split.
            seed: The run's seed.

        Raises:
            ConfigError: When some client would have no row; keys begin with ``partitioner``.
        """

    def unassigned(self, dataset: Dataset, partition: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the rows that belong to nobody, by the reason, which follows "5 rows of the train split".

        Args:
            dataset: The training split.
            partition: What `partition` returned for it.
        """
        held = {row for rows in partition.values() for row in rows}
        rest = [row for row in range(len(dataset)) if row not in held]
        return {"belong to nobody: the partitioner gives them to no client": rest} if rest else {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, given the training split.

        Args:
            key: Dotted key of the arguments, for example ``data.init_args.partitioner.init_args``.
            facts: What is known of the run; ``dataset`` is the training split.
        """
        return []


class IIDPartitioner(Partitioner):
    """Deals all rows at random into equal shares; sizes differ by at most one row.

    Args:
        clients: Number of clients.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client; every row is dealt."""
        raise_problems(self.check("partitioner.init_args", Facts(dataset=dataset)))
        order = torch.randperm(len(dataset), generator=generator(seed, "partition")).numpy()
        return numbered(np.array_split(order, self.clients))

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, more clients than rows among them."""
        return _client_problems(key, self.clients, len(facts.dataset))


class DirichletPartitioner(Partitioner):
    """Splits each label's rows among the clients in proportions drawn from a Dirichlet distribution.

    Small ``alpha`` gives each client few labels and unequal sizes, large ``alpha`` tends to IID. All proportions are
    drawn again, up to 100 times, until each client has ``min_size`` rows. Every row is dealt. Source: Hsu, Qi and
    Brown, arXiv 1909.06335, section 3, in the per-label form of Yurochkin et al., arXiv 1905.12022, section 4.

    Args:
        clients: Number of clients.
        alpha: Concentration, above 0.
        column: Column of the label.
        min_size: Fewest rows of a client.
    """

    def __init__(self, clients: int, alpha: float, column: str, min_size: int = 1) -> None:
        self.clients = clients
        self.alpha = alpha
        self.column = self.label_column = column
        self.min_size = min_size

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client.

        Raises:
            ConfigError: When no draw gives each client ``min_size`` rows.
        """
        raise_problems(self.check("partitioner.init_args", Facts(dataset=dataset)))
        # torch has no public Dirichlet that takes a generator; numpy's is also stable for a small alpha.
        random = np.random.default_rng(derive_seed(seed, "partition"))
        labels = _rows_by_value(dataset, self.column).values()
        for _ in range(_DIRICHLET_DRAWS):
            shares = self._draw([random.permutation(rows) for rows in labels], random)
            if min(map(len, shares)) >= self.min_size:
                return numbered(shares)
        remedy = (
            f"{_DIRICHLET_DRAWS} draws left some of {self.clients} clients with fewer than `min_size` = "
            f"{self.min_size} of {len(dataset)} rows; raise `alpha`, or lower `clients` or `min_size`."
        )
        raise ConfigError(Problem("partitioner.init_args.alpha", self.alpha, remedy))

    def _draw(self, labels: Sequence[np.ndarray], random: np.random.Generator) -> list[np.ndarray]:
        shares: list[list[np.ndarray]] = [[] for _ in range(self.clients)]
        for rows in labels:
            proportions = random.dirichlet(np.full(self.clients, self.alpha))
            cuts = np.rint(np.cumsum(proportions)[:-1] * len(rows)).astype(int)
            for share, part in zip(shares, np.split(rows, cuts), strict=True):
                share.append(part)
        return [np.concatenate(share) for share in shares]

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, more clients than rows among them."""
        problems = _client_problems(key, self.clients, len(facts.dataset), max(self.min_size, 1))
        if not 0 < self.alpha < float("inf"):
            problems.append(Problem(f"{key}.alpha", self.alpha, "must be a finite number above 0."))
        problems += _min_size_problems(key, self.min_size)
        return [*problems, *column_problems(f"{key}.column", self.column, facts.dataset)]


class QuantityPartitioner(Partitioner):
    """Sorts the rows by label, cuts them into equal shards and deals each client the same number of shards.

    A client sees about ``shards_per_client`` labels. Every row is dealt. Source: McMahan et al., arXiv 1602.05629,
    section 3 (the pathological non-IID partition).

    Args:
        clients: Number of clients.
        shards_per_client: Shards of one client.
        column: Column of the label.
    """

    def __init__(self, clients: int, shards_per_client: int, column: str) -> None:
        self.clients = clients
        self.shards_per_client = shards_per_client
        self.column = self.label_column = column

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client."""
        raise_problems(self.check("partitioner.init_args", Facts(dataset=dataset)))
        random = generator(seed, "partition")
        labels = [np.asarray(rows) for rows in _rows_by_value(dataset, self.column).values()]
        ordered = np.concatenate([rows[torch.randperm(len(rows), generator=random).numpy()] for rows in labels])
        shards = np.array_split(ordered, self.clients * self.shards_per_client)
        deal = torch.randperm(len(shards), generator=random).view(self.clients, self.shards_per_client).tolist()
        return numbered([np.concatenate([shards[shard] for shard in hand]) for hand in deal])

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, more shards than rows among them."""
        problems = _client_problems(key, self.clients, len(facts.dataset))
        if self.shards_per_client < 1:
            problems.append(Problem(f"{key}.shards_per_client", self.shards_per_client, "must be 1 or more."))
        elif not problems and self.clients * self.shards_per_client > len(facts.dataset):
            remedy = f"{self.clients} clients with that many need more than the {len(facts.dataset)} rows; lower it."
            problems.append(Problem(f"{key}.shards_per_client", self.shards_per_client, remedy))
        return [*problems, *column_problems(f"{key}.column", self.column, facts.dataset)]


class NaturalPartitioner(Partitioner):
    """Makes a client of each value of a column: a speaker, a hospital, a library.

    Clients are named by the value, largest first. Rows without a value or with a blank one, and those of clients
    left out by ``max_clients`` or ``min_size``, belong to nobody.

    Args:
        column: Column of the client's name.
        max_clients: Keep this many clients, the largest; ``None`` for all.
        min_size: Leave out the clients that are smaller, in rows (in characters with ``size_column``).
        size_column: Measure a client by the characters of this column; ``None`` to count rows.
    """

    def __init__(
        self, column: str, max_clients: int | None = None, min_size: int = 1, size_column: str | None = None
    ) -> None:
        self.column = column
        self.max_clients = max_clients
        self.min_size = min_size
        self.size_column = size_column

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client; nothing is drawn, the seed has no effect."""
        raise_problems(self.check("partitioner.init_args", Facts(dataset=dataset)))
        groups = self._groups(dataset)
        return {name: groups[name] for name in list(groups)[: self.max_clients]}

    def unassigned(self, dataset: Dataset, partition: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """Return the rows that belong to nobody: without a value, or of a client that is left out."""
        groups, large = _named(dataset, self.column), self._groups(dataset)
        outside = [name for name in groups if name not in partition]
        kinds = {
            f"`max_clients` = {self.max_clients}": [name for name in outside if name in large],
            f"`min_size` = {self.min_size}": [name for name in outside if name not in large],
        }
        named = {row for rows in groups.values() for row in rows}
        nameless = [row for row in range(len(dataset)) if row not in named]
        found = {f"belong to nobody: no value in `{self.column}`": nameless}
        for limit, names in kinds.items():
            whose = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            found[f"belong to nobody: {limit} leaves out {whose}"] = [row for name in names for row in groups[name]]
        return {reason: rows for reason, rows in found.items() if rows}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, more clients than the column has values among them."""
        problems = column_problems(f"{key}.column", self.column, facts.dataset)
        if self.size_column is not None:
            problems += column_problems(f"{key}.size_column", self.size_column, facts.dataset)
        problems += _min_size_problems(key, self.min_size)
        if self.max_clients is not None and self.max_clients < 1:
            problems.append(Problem(f"{key}.max_clients", self.max_clients, "must be 1 or more, or null for all."))
        return problems or self._count_problems(key, len(self._groups(facts.dataset)))

    def _count_problems(self, key: str, found: int) -> list[Problem]:
        if found == 0:
            remedy = f"no value of `{self.column}` has that much data; lower it."
            return [Problem(f"{key}.min_size", self.min_size, remedy)]
        if self.max_clients is not None and self.max_clients > found:
            remedy = f"only {found} values of `{self.column}` have enough data; write {found} or less, or null for all."
            return [Problem(f"{key}.max_clients", self.max_clients, remedy)]
        return []

    def _groups(self, dataset: Dataset) -> dict[str, list[int]]:
        groups = _named(dataset, self.column)
        weights = None if self.size_column is None else [len(str(text or "")) for text in dataset[self.size_column]]
        sizes = {
            name: len(rows) if weights is None else sum(weights[row] for row in rows) for name, rows in groups.items()
        }
        large = [name for name in groups if sizes[name] >= self.min_size]
        return {name: groups[name] for name in sorted(large, key=lambda name: (-sizes[name], name))}


class SizesPartitioner(Partitioner):
    """Gives each client the share it is told, rows drawn at random.

    Args:
        sizes: One entry a client: numbers of rows (integers of 1 or more), or shares of all rows (numbers with a
            decimal point in (0, 1], together at most 1). What is not given out belongs to nobody.
    """

    def __init__(self, sizes: list[int] | list[float]) -> None:
        self.sizes = sizes

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client."""
        raise_problems(self.check("partitioner.init_args", Facts(dataset=dataset)))
        order = torch.randperm(len(dataset), generator=generator(seed, "partition")).numpy()
        return numbered(np.split(order, np.cumsum(self._counts(len(dataset))))[:-1])

    def _counts(self, rows: int) -> list[int]:
        if all(isinstance(size, int) for size in self.sizes):
            return [int(size) for size in self.sizes]
        # Cumulative rounding: shares that sum to 1 give out every row. The small term forgives 0.1 + 0.2.
        ends = [int(end * rows + 1e-6) for end in np.cumsum(self.sizes)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the arguments, a client without rows among them."""
        remedy = self._fault(len(facts.dataset))
        return [Problem(f"{key}.sizes", self.sizes, remedy)] if remedy else []

    def _fault(self, rows: int) -> str | None:
        counts = all(isinstance(size, int) for size in self.sizes)
        if not self.sizes or not (counts or all(isinstance(size, float) for size in self.sizes)):
            return "must be a list of integers (rows), or of numbers with a decimal point (shares), one a client."
        if not all(size > 0 for size in self.sizes):
            return "each client needs a size above 0."
        if not counts and sum(self.sizes) > 1 + 1e-9:
            return "shares must sum to 1 or less; write integers to give numbers of rows."
        if sum(self._counts(rows)) > rows:
            return f"the training split has {rows} rows; give out no more than that."
        return None if min(self._counts(rows)) else f"a client would have none of the {rows} rows; enlarge its share."


def numbered(parts: Iterable[Sequence[int] | np.ndarray]) -> dict[str, list[int]]:
    """Name the parts by their number, padded with zeros so that names sort in order; rows are sorted in each."""
    rows = [sorted(int(row) for row in part) for part in parts]
    width = len(str(len(rows) - 1))
    return {f"{client:0{width}d}": part for client, part in enumerate(rows)}


def partition_problems(key: str, partition: Mapping[str, Sequence[int]], rows: int) -> list[Problem]:
    """Return what is wrong with a finished partition: no clients, an empty one, a row held twice or not there.

    Args:
        key: Key of the partitioner in the configuration.
        partition: Row indices of each client.
        rows: Number of rows of the training split.
    """
    held = np.sort(np.fromiter((row for part in partition.values() for row in part), dtype=np.int64))
    empty = [client for client, part in partition.items() if not part]
    if not partition or empty:
        remedy = f"leaves clients without any row; use fewer clients. Empty: {', '.join(empty) or 'all'}."
    elif held[0] < 0 or held[-1] >= rows:
        remedy = f"gives out rows that do not exist; indices must lie in 0 to {rows - 1}."
    elif (repeated := held[:-1][held[:-1] == held[1:]]).size:
        remedy = f"gives row {int(repeated[0])} to two clients; each row may have one client only."
    else:
        return []
    return [Problem(key, f"{len(partition)} clients", remedy)]


def column_problems(key: str, column: str, dataset: Dataset) -> list[Problem]:
    """Return a problem when ``dataset`` has no column of that name."""
    if column in dataset.column_names:
        return []
    return [Problem(key, column, f"is not a column of the data; it has {', '.join(dataset.column_names) or 'none'}.")]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise a `ConfigError` of all ``problems``, if there are any."""
    if problems:
        raise ConfigError(*problems)


def _rows_by_value(dataset: Dataset, column: str) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    values: Iterable[Any] = dataset[column]
    for row, value in enumerate(values):
        if value is not None and value == value:  # neither null nor NaN
            groups.setdefault(str(value), []).append(row)
    return dict(sorted(groups.items()))


def _named(dataset: Dataset, column: str) -> dict[str, list[int]]:
    """Return the rows of each name in a column; a blank one is none."""
    return {name: rows for name, rows in _rows_by_value(dataset, column).items() if name.strip()}


def _client_problems(key: str, clients: int, rows: int, min_size: int = 1) -> list[Problem]:
    if clients < 1:
        return [Problem(f"{key}.clients", clients, "must be 1 or more.")]
    if clients * min_size > rows:
        each = "a row" if min_size == 1 else f"{min_size} rows"
        remedy = f"the training split has {rows} rows, and each client needs {each}; write {rows // min_size} or less."
        return [Problem(f"{key}.clients", clients, remedy)]
    return []


def _min_size_problems(key: str, min_size: int) -> list[Problem]:
    return [] if min_size >= 1 else [Problem(f"{key}.min_size", min_size, "must be 1 or more: no client may be empty.")]
