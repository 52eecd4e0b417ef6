"""The gate around another algorithm: what it adds to the model is let through on the clients' domains only."""

from typing import Literal

from fedbe.adaptation.gate import Gate
from fedbe.adaptation.stack import Stack
from fedbe.algorithms.base import Algorithm
from fedbe.corpora import Corpus
from fedbe.errors import Facts, Problem


class Gated(Algorithm):
    """Put a gate on expanded blocks, or on adapters: open where text is like the clients', shut elsewhere.

    One logistic unit tells the clients' tokens from those that the base model itself writes, by the output of a base
    block below all that is trained. Whoever trains anything trains it too, on the same batches: its loss is added, its
    gradients reach nothing else. In training all is open; a model that is evaluated is gated.

    Args:
        algorithm: What is trained: `BlockExpansion` or a kind of it, or a LoRA method that leaves the base weights be.
        block: The base block (from 0) whose output the gate sees.
        mode: ``soft``: what is added is multiplied by the gate's probability; ``hard``: by 0 or 1.
        sequences: About how many sequences the base model writes for the gate to stay shut on.
        sequence_length: Tokens of each.
        openness: Weight of the clients' text in the gate's loss, in (0, 1); the rest is that of the text to stay shut
            on. Above ½ the gate opens when in doubt: nothing learned is held back, and more is forgotten.
        weight: Factor on the gate's loss; with Adam it hardly matters.
        corpus: Other text to stay shut on (its training split); a model that cannot write needs one.

    Source: ours.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        block: int = 0,
        mode: Literal["soft", "hard"] = "soft",
        sequences: int = 96,
        sequence_length: int = 128,
        openness: float = 0.5,
        weight: float = 1.0,
        corpus: Corpus | None = None,
    ) -> None:
        self.algorithm = algorithm
        self.gate = Gate(block, mode, sequences, sequence_length, openness, weight, corpus)
        super().__init__(Stack([algorithm.adaptation, self.gate]), algorithm.strategy, algorithm.topology)

    @property
    def title(self) -> str:
        """What it is called in a model card, with what is gated."""
        return f"{type(self).__name__} {self.algorithm.title}"

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in these arguments, and those of the other algorithm."""
        inner, self.gate.key = self.algorithm, key
        problems = inner.check(f"{key}.algorithm.init_args", facts)
        gated_already = any(isinstance(part, Gate) for part in inner.adaptation.parts)
        if gated_already or not self.gate.needs <= inner.offers:
            remedy = "a gate goes on expanded blocks or on adapters of one global model beside an unchanged base"
            problems.append(Problem(f"{key}.algorithm", type(inner).__name__, remedy))
        return [*problems, *self.gate.check(key, facts)]
