from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from fedbe.datamodules import (
    DirichletPartitioner,
    IIDPartitioner,
    NaturalPartitioner,
    Partitioner,
    QuantityPartitioner,
    SizesPartitioner,
)
from fedbe.datamodules.partition import partition_problems
from fedbe.errors import ConfigError, Facts

KEY = "data.init_args.partitioner.init_args"
LABELS = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=8, max_size=60)


def labelled(labels: list) -> Dataset:
    return Dataset.from_dict({"label": labels, "text": ["x" * (row % 7) for row in range(len(labels))]})


def rows_of(partition: dict[str, list[int]]) -> list[int]:
    return sorted(row for rows in partition.values() for row in rows)


EXHAUSTIVE = st.one_of(
    st.integers(1, 8).map(IIDPartitioner),
    st.builds(DirichletPartitioner, clients=st.integers(1, 3), alpha=st.floats(1.0, 100), column=st.just("label")),
    st.builds(
        QuantityPartitioner, clients=st.integers(1, 4), shards_per_client=st.integers(1, 2), column=st.just("label")
    ),
    st.just(NaturalPartitioner("label")),
)


@given(partitioner=EXHAUSTIVE, labels=LABELS, seed=st.integers(0, 99))
def test_each_row_goes_to_exactly_one_client_and_no_client_is_empty(partitioner: Partitioner, labels: list, seed: int):
    partition = partitioner.partition(labelled(labels), seed)
    assert rows_of(partition) == list(range(len(labels)))
    assert all(partition.values())
    assert partition == partitioner.partition(labelled(labels), seed)


@given(
    shares=st.lists(st.floats(0.05, 0.5), min_size=1, max_size=6).filter(lambda shares: sum(shares) <= 1),
    rows=st.integers(40, 90),
)
def test_fractions_give_disjoint_parts_of_about_the_size_asked_for(shares: list[float], rows: int):
    partition = SizesPartitioner(shares).partition(labelled(["a"] * rows), seed=1)
    held = rows_of(partition)
    assert len(held) == len(set(held)) <= rows
    assert all(abs(len(part) - share * rows) <= 1 for part, share in zip(partition.values(), shares, strict=True))


def test_fractions_that_sum_to_one_give_out_every_row():
    partition = SizesPartitioner([0.1, 0.2, 0.3, 0.4]).partition(labelled(["a"] * 10), seed=0)
    assert [len(part) for part in partition.values()] == [1, 2, 3, 4]


def test_integer_sizes_are_numbers_of_rows():
    partition = SizesPartitioner([3, 1]).partition(labelled(["a"] * 10), seed=0)
    assert [len(part) for part in partition.values()] == [3, 1]


@pytest.mark.parametrize(
    "partitioner",
    [
        IIDPartitioner(3),
        DirichletPartitioner(3, 1.0, "label"),
        QuantityPartitioner(3, 2, "label"),
        SizesPartitioner([9]),
    ],
)
def test_another_seed_is_another_partition(partitioner: Partitioner):
    data = labelled(list("abcd") * 10)
    assert partitioner.partition(data, seed=0) != partitioner.partition(data, seed=1)


def test_small_alpha_concentrates_labels_and_large_alpha_spreads_them():
    data = labelled(list("abcd") * 200)

    def largest_share(alpha: float) -> float:
        parts = DirichletPartitioner(5, alpha, "label").partition(data, seed=3).values()
        counts = [Counter(data[rows]["label"]) for rows in parts]
        return sum(max(count.values()) / count.total() for count in counts) / len(counts)

    assert largest_share(0.05) > 0.75
    assert largest_share(1000.0) < 0.35


def test_shards_bound_the_labels_of_a_client():
    data = labelled(["a"] * 10 + ["b"] * 10 + ["c"] * 10 + ["d"] * 10)
    parts = QuantityPartitioner(clients=2, shards_per_client=2, column="label").partition(data, seed=0)
    assert all(len(set(data[rows]["label"])) == 2 and len(rows) == 20 for rows in parts.values())


def test_natural_clients_are_named_by_the_column_largest_first():
    data = labelled(["b"] * 3 + ["a"] * 5 + [None] + ["c"])
    assert list(NaturalPartitioner("label").partition(data, 0)) == ["a", "b", "c"]
    assert list(NaturalPartitioner("label", max_clients=1).partition(data, 0)) == ["a"]
    assert list(NaturalPartitioner("label", min_size=2).partition(data, 0)) == ["a", "b"]
    assert 8 not in rows_of(NaturalPartitioner("label").partition(data, 0))


def test_natural_clients_can_be_measured_in_characters():
    data = Dataset.from_dict({"who": ["a", "a", "b"], "text": ["x", "y", "a long speech"]})
    assert list(NaturalPartitioner("who", max_clients=1, size_column="text").partition(data, 0)) == ["b"]


def test_numbered_clients_sort_in_order():
    assert list(IIDPartitioner(11).partition(labelled(["a"] * 11), 0)) == [f"{client:02d}" for client in range(11)]


@pytest.mark.parametrize(
    ("partitioner", "key", "value"),
    [
        (IIDPartitioner(11), "clients", 11),
        (IIDPartitioner(0), "clients", 0),
        (DirichletPartitioner(4, 1.0, "label", min_size=3), "clients", 4),
        (DirichletPartitioner(2, 0.0, "label"), "alpha", 0.0),
        (DirichletPartitioner(2, 1.0, "colour"), "column", "colour"),
        (DirichletPartitioner(2, 1.0, "label", min_size=0), "min_size", 0),
        (QuantityPartitioner(4, 3, "label"), "shards_per_client", 3),
        (QuantityPartitioner(2, 1, "colour"), "column", "colour"),
        (NaturalPartitioner("colour"), "column", "colour"),
        (NaturalPartitioner("label", max_clients=9), "max_clients", 9),
        (NaturalPartitioner("label", min_size=50), "min_size", 50),
        (NaturalPartitioner("label", size_column="colour"), "size_column", "colour"),
        (SizesPartitioner([8, 3]), "sizes", [8, 3]),
        (SizesPartitioner([0.9, 0.2]), "sizes", [0.9, 0.2]),
        (SizesPartitioner([0.01, 0.9]), "sizes", [0.01, 0.9]),
        (SizesPartitioner([1, 0.5]), "sizes", [1, 0.5]),
        (SizesPartitioner([-1, 3]), "sizes", [-1, 3]),
        (SizesPartitioner([]), "sizes", []),
    ],
)
def test_a_mistake_is_reported_with_key_and_value_before_and_at_the_partition(partitioner, key: str, value: object):
    data = labelled(list("ab") * 5)
    (problem,) = partitioner.check(KEY, Facts(dataset=data))
    assert (problem.key, problem.value) == (f"{KEY}.{key}", value)
    with pytest.raises(ConfigError, match=key):
        partitioner.partition(data, seed=0)


def test_a_dirichlet_draw_that_cannot_fill_every_client_is_an_error():
    with pytest.raises(ConfigError, match="raise `alpha`"):
        DirichletPartitioner(10, 0.001, "label").partition(labelled(["a"] * 20), seed=0)


@pytest.mark.parametrize(
    ("partition", "remedy"),
    [
        ({"a": [0, 1], "b": [1]}, "gives row 1 to two clients"),
        ({"a": [0], "b": []}, "Empty: b"),
        ({}, "without any row"),
        ({"a": [5]}, "do not exist"),
    ],
)
def test_a_partition_of_somebody_elses_rule_is_verified(partition: dict, remedy: str):
    (problem,) = partition_problems("data.init_args.partitioner", partition, rows=4)
    assert remedy in problem.remedy
