"""Federated data modules: who has which data, and its batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedbe.data.batch import Batch, pad_samples
from fedbe.data.fingerprint import MOST_SAMPLES, drawn_samples, fingerprint, seeded
from fedbe.data.left_out import LeftOut
from fedbe.errors import NO_FACTS, ConfigError, Facts, Problem


class FederatedDataModule(L.LightningDataModule, ABC):
    """Base class of federated data: subclass it, or use a ready one of `fedbe.datamodules`.

    The run calls `check`, `connect`, `prepare_data` and `setup("fit")` once, in this order, before round 1; whatever
    `setup` draws at random must come from `fedbe.seeding.generator(self.seed, ...)`, so that each client's data is
    fixed for the run. Where a validation or test dataset has an attribute ``lengths``, the number of tokens of each
    sample, its samples are scored in batches of similar length.

    Args:
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.

    Attributes:
        key: Dotted key of its arguments, for mistakes that only `connect` and `setup` can find; a module around it
            sets it in `connect`.
        seed: The run's seed, set by `connect`.
        tokenizer: The base model's, set by `connect`.
        model_config: The base model's, set by `connect`.
    """

    key: str = "data.init_args"
    seed: int = 0
    tokenizer: PreTrainedTokenizerBase | None = None
    model_config: PretrainedConfig | None = None

    def __init__(self, batch_size: int = 8, eval_batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 4 * batch_size

    def connect(
        self, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig | None, seed: int
    ) -> None:
        """Receive what is unknown at construction: the base model's tokenizer and config, and the run's seed."""
        self.tokenizer, self.model_config, self.seed = tokenizer, model_config, seed

    def setup_client(self, client_id: str) -> None:
        """Load what one client trains on, in place of ``setup("fit")`` on the client's own machine.

        Only this client's `client_dataset` is asked for afterwards, and what its own model is scored on. By default
        everything is loaded; override it where a client has no more than its own rows.
        """
        self.setup("fit")

    @property
    @abstractmethod
    def client_ids(self) -> Sequence[str]:
        """The clients' names, in a fixed order; available after `setup`."""

    @abstractmethod
    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return the training set of one client, of known length, the same at every call."""

    @abstractmethod
    def validation_dataset(self) -> Dataset[Any]:
        """Return the data on which rounds are compared and choices are made."""

    @abstractmethod
    def test_dataset(self) -> Dataset[Any]:
        """Return the data on which the finished model is scored, once."""

    @property
    def num_labels(self) -> int | None:
        """Number of classes of a classification task; ``None`` for language modelling."""
        return None

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes in the order of their numbers; ``None`` where they have none.

        They are asked for after `connect`, and travel with the model. A module whose classes the connected model's head
        has already should number them as that does, see `fedbe.modeling.head.in_head_order`.
        """
        return None

    @property
    def loss_weights(self) -> Sequence[float] | None:
        """What a sample of each class weighs in the clients' loss, by the class's number; ``None`` for all the same."""
        return None

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What of the data is neither trained on nor scored, and why; available after `setup`."""
        return ()

    def check(self, key: str = "data.init_args", facts: Facts = NO_FACTS) -> list[Problem]:
        """Return the mistakes in this module's configuration that can be seen without loading anything large.

        Args:
            key: Dotted key of its arguments, for example ``data.init_args``.
            facts: What is known of the run.
        """
        return []

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples into a batch; token sequences of unequal length are padded at the right and masked."""
        if "input_ids" in samples[0] and len({len(sample["input_ids"]) for sample in samples}) > 1:
            return pad_samples(samples, pad_token_id(self.tokenizer), attention_mask=True)
        batch: Batch = default_collate(list(samples))
        return batch

    def client_dataloader(self, client_id: str, generator: torch.Generator) -> DataLoader[Any]:
        """Return one client's shuffled training batches; the order comes from `generator` alone."""
        dataset = self.client_dataset(client_id)
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=True, generator=generator, collate_fn=self.collate
        )

    @property
    def own_batches(self) -> bool:
        """Whether a client's batches are more than its `client_dataset` shuffled: `client_dataloader` is overridden."""
        return type(self).client_dataloader is not FederatedDataModule.client_dataloader

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation batches, each sample once."""
        return self._eval_dataloader(self.validation_dataset())

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test batches, each sample once."""
        return self._eval_dataloader(self.test_dataset())

    def fingerprint(self, with_clients: bool = True) -> dict[str, str]:
        """Return the number of samples and a digest of each part of the encoded data.

        It is kept in a checkpoint: a run is continued only on the data that it began with, encoded by the same
        tokenizer and template. Datasets that hold their values in ``tensors``, as those of text in `fedbe.datamodules`
        do, are read as a whole, at 0.7 GB/s (0.2 s for 25 million tokens). Of others, samples are drawn one by one, as
        for training: 0.1 ms for tokens, 2 ms for a picture of 224 x 224. Where there are more than `MOST_SAMPLES`,
        which bounds this at 30 s of such pictures, samples spread evenly are drawn, and a change in some rows may go
        unnoticed. Override this where samples cost more, differ from draw to draw, or have a version of their own.

        Args:
            with_clients: Whether the clients' training data is here; else only the server's splits are read.

        Returns:
            ``validation``, ``test`` and ``client NAME`` for each client → for example ``12:9a8b7c6d5e4f3a2b``.
        """
        parts: dict[str, Callable[[], Dataset[Any]]] = {
            "validation": self.validation_dataset,
            "test": self.test_dataset,
        }
        if with_clients:
            parts |= {f"client {client}": partial(self.client_dataset, client) for client in self.client_ids}
        with seeded():
            stride = -(-sum(drawn_samples(dataset()) for dataset in parts.values()) // MOST_SAMPLES)
            return {part: fingerprint(dataset(), max(1, stride)) for part, dataset in parts.items()}

    def client_val_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the batches on which one client's own model is compared; by default those of the downstream task."""
        return self.val_dataloader()

    def client_test_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the batches on which one client's own model is scored; by default those of the downstream task."""
        return self.test_dataloader()

    def _eval_dataloader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        # A DataLoader without a generator of its own draws from the global one, even when it does not shuffle.
        own = torch.Generator()
        lengths: Sequence[int] | None = getattr(dataset, "lengths", None)
        if lengths is None:
            return DataLoader(dataset, batch_size=self.eval_batch_size, generator=own, collate_fn=self.collate)
        batches = by_length(lengths, self.eval_batch_size)
        return DataLoader(dataset, batch_sampler=batches, generator=own, collate_fn=self.collate)


class DataWrapper(FederatedDataModule):
    """Base class of what changes another module's training data; all that a subclass does not change is passed on.

    A subclass that overrides `client_dataset` gets batches of that. Where the other module makes its batches in its own
    way (`own_batches`), it has to override `client_dataloader` too, to the same effect.

    Args:
        data: The other module.
    """

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__(data.batch_size, data.eval_batch_size)
        self.data = data

    def connect(
        self, tokenizer: PreTrainedTokenizerBase | None, model_config: PretrainedConfig | None, seed: int
    ) -> None:
        """Pass on what is unknown at construction."""
        super().connect(tokenizer, model_config, seed)
        self.data.key = f"{self.key}.data.init_args"
        self.data.connect(tokenizer, model_config, seed)

    def check(self, key: str = "data.init_args", facts: Facts = NO_FACTS) -> list[Problem]:
        """Return the mistakes in the other module's configuration, and why its batches cannot be changed."""
        return [*self._unseen(key), *self.data.check(f"{key}.data.init_args", facts)]

    def prepare_data(self) -> None:
        """Let the other module prepare its data."""
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Let the other module load its data."""
        self.data.setup(stage)  # type: ignore[arg-type]

    def setup_client(self, client_id: str) -> None:
        """Let the other module load what one client trains on."""
        self.data.setup_client(client_id)

    @property
    def client_ids(self) -> Sequence[str]:
        """The other module's clients."""
        return self.data.client_ids

    def fingerprint(self, with_clients: bool = True) -> dict[str, str]:
        """Return the digests of the other module's data: what this one makes of it follows from the configuration."""
        return self.data.fingerprint(with_clients)

    @property
    def num_labels(self) -> int | None:
        """Number of classes of a classification task."""
        return self.data.num_labels

    @property
    def class_names(self) -> Sequence[str] | None:
        """The names of the classes in the order of their numbers."""
        return self.data.class_names

    @property
    def loss_weights(self) -> Sequence[float] | None:
        """What a sample of each class weighs in the clients' loss."""
        return self.data.loss_weights

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What the other module leaves out."""
        return self.data.left_out

    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return the training set of one client."""
        return self.data.client_dataset(client_id)

    def client_dataloader(self, client_id: str, generator: torch.Generator) -> DataLoader[Any]:
        """Return one client's batches: the other module's, or where `client_dataset` is overridden batches of that.

        Raises:
            ConfigError: The other module makes batches in its own way, and this one does not say how they change.
        """
        if not self._changes("client_dataset"):
            return self.data.client_dataloader(client_id, generator)
        if problems := self._unseen(self.key):
            raise ConfigError(*problems)
        return super().client_dataloader(client_id, generator)

    @property
    def own_batches(self) -> bool:
        """Whether the other module makes batches in its own way, or this one does and leaves the dataset as it is."""
        own = self._changes("client_dataloader") and not self._changes("client_dataset")
        return own or self.data.own_batches

    def validation_dataset(self) -> Dataset[Any]:
        """Return the validation data."""
        return self.data.validation_dataset()

    def test_dataset(self) -> Dataset[Any]:
        """Return the test data."""
        return self.data.test_dataset()

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the other module's validation batches."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the other module's test batches."""
        return self.data.test_dataloader()

    def client_val_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the batches on which the other module compares one client's own model."""
        return self.data.client_val_dataloader(client_id)

    def client_test_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the batches on which the other module scores one client's own model."""
        return self.data.client_test_dataloader(client_id)

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        """Join samples into a batch as the other module does."""
        return self.data.collate(samples)

    def _changes(self, method: str) -> bool:
        """Whether a subclass overrides a method."""
        return getattr(type(self), method) is not getattr(DataWrapper, method)

    def _unseen(self, key: str) -> list[Problem]:
        """Return a problem where samples are changed and the other module's own batches would be as they were."""
        if not self._changes("client_dataset") or self._changes("client_dataloader") or not self.data.own_batches:
            return []
        remedy = f"makes batches in its own way, without the samples of {type(self).__name__}: override its "
        return [Problem(f"{key}.data", type(self.data).__name__, f"{remedy}client_dataloader as well")]


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of sequences in batches of similar length, longest first: little padding."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_token_id(tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Return the id to pad with; any will do where the tokenizer has none, for padding is masked."""
    ids: list[Any] = [getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)]
    return next((int(token) for token in ids if token is not None), 0)
