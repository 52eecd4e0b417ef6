"""Expanded blocks whose places the server chooses by what clients report of the base model, and of the blocks then."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from fedbe.adaptation.blocks import Blocks
from fedbe.data import Batch
from fedbe.errors import Facts, Problem, check_at_least
from fedbe.expansion.identity import target_parameters
from fedbe.expansion.probe import probe_client
from fedbe.messages import ProbeReport, Structure


class PlacedBlocks(Blocks):
    """Expanded blocks at places that are not in the configuration: clients probe, and the server says where.

    A block's unit is named after its position, which stays when more blocks are inserted: ``block_3``, and of several
    at one position ``block_3`` the lowest, then ``block_3.1``. Clients measure the gradients of the blocks that they
    train, of what began as zeros, as in the probe.

    Args:
        probe_batches: Batches that a client probes on.
        sketch: Numbers per position that show the direction of a client's gradient; 0 for none.
        count_labels: Whether a client that probes counts how often it has each label.
    """

    def __init__(self, probe_batches: int = 2, sketch: int = 64, count_labels: bool = False) -> None:
        super().__init__()
        self.probe_batches, self.sketch, self.count_labels = probe_batches, sketch, count_labels
        self._writers: Mapping[str, tuple[str, ...]] = {}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for each number that is too small."""
        return [
            *check_at_least(key, 1, probe_batches=self.probe_batches),
            *check_at_least(key, 0, sketch=self.sketch),
        ]

    def probe(self, model: PreTrainedModel, client_id: str, batches: Iterator[Batch]) -> ProbeReport:
        """Return what a block at each position would gain a client, and where asked for how often it has each label."""
        few = list(islice(batches, self.probe_batches))
        report = probe_client(model, few, client_id, sketch_dimension=self.sketch, seed=self.seed)
        return replace(report, labels=label_counts(chain(few, batches))) if self.count_labels else report

    def prepare(self, model: PreTrainedModel, inputs: Batch, structure: Structure | None = None) -> None:
        """Insert the blocks where the structure says.

        Raises:
            ValueError: There is no structure.
        """
        if structure is None:
            raise ValueError("where these blocks go is the server's choice: give a structure")
        super().prepare(model, inputs, structure)

    def watched(self, trainable_names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return of each block that is trained whole the parameters that began as zeros."""
        trained = set(trainable_names)
        return {block: names for block, names in self._writers.items() if trained.issuperset(names)}

    def _labels(self) -> Sequence[str]:
        seen: Counter[int] = Counter()
        labels = []
        for position in self.expansion.positions:
            labels.append(f"{position}.{seen[position]}" if seen[position] else str(position))
            seen[position] += 1
        return labels

    def _name_units(self, model: PreTrainedModel) -> None:
        super()._name_units(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        blocks = zip(self._labels(), self.expansion.blocks(model), strict=True)
        self._writers = {
            f"block_{label}": tuple(names[id(p)] for p in target_parameters(self.expansion.rule, block))
            for label, block in blocks
        }


def label_counts(batches: Iterable[Batch]) -> tuple[int, ...]:
    """Return how often each class, or each token, is a label in a client's batches."""
    counts = torch.zeros(0, dtype=torch.long)
    for batch in batches:
        labels = batch["labels"]
        now = torch.bincount(labels[labels >= 0].flatten().cpu(), minlength=len(counts))
        counts = now + torch.nn.functional.pad(counts, (0, len(now) - len(counts)))
    return tuple(counts.tolist())
