"""Who gets what: a partition as a table and as a picture."""

from collections import Counter
from dataclasses import dataclass, field

from fedbe.data import FederatedDataModule
from fedbe.datamodules.corpus import CorpusDataModule

_OTHER = "other"
_MOST_COLOURS = 10
_GREY = 7
_MOST_NAMED_CLIENTS = 30


@dataclass(frozen=True)
class ClientShare:
    """What one client holds.

    Attributes:
        client_id: The client's name.
        samples: Training samples, as the model sees them.
        rows: Rows of the training split, where the data comes from a corpus.
        tokens: Tokens in all samples, for text.
        labels: Rows of each label, where there is a label column.
    """

    client_id: str
    samples: int
    rows: int | None = None
    tokens: int | None = None
    labels: Counter[str] = field(default_factory=Counter)


def describe_partition(data: FederatedDataModule) -> list[ClientShare]:
    """Return what each client holds, in the clients' order; call it after ``data.setup``."""
    return [_share(data, client) for client in data.client_ids]


def _share(data: FederatedDataModule, client: str) -> ClientShare:
    dataset = data.client_dataset(client)
    samples = len(dataset)  # type: ignore[arg-type]
    tokens = getattr(dataset, "tokens", None)
    if isinstance(data, CorpusDataModule):
        return ClientShare(client, samples, data.client_rows(client), tokens, data.client_labels(client))
    return ClientShare(client, samples, tokens=tokens)
