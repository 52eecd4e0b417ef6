"""Baseline: no federation, each client fine-tunes a model of its own."""

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.topology import Apart, Federated
from fedbe.errors import Facts, Problem
from fedbe.traits import Trait


class LocalOnly(Algorithm):
    """Each client trains what another algorithm would train, from the same start, and nothing is averaged or sent.

    A client goes on from where it stopped when it took part last. The global model stays the untrained start: it is
    what `downstream`, retention and the export show; the clients' own models are in `personalised`.

    Args:
        algorithm: Says which parameters are trained.

    Source: ours, the usual lower control of federated learning.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        super().__init__(algorithm.adaptation, algorithm.strategy, Apart())

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the other algorithm's configuration, or why it cannot train locally."""
        inner, at = self.algorithm, f"{key}.algorithm"
        wanted = self.topology.needs | {Trait.GLOBAL_MODEL, Trait.AGGREGATION}
        if not wanted <= inner.offers:
            remedy = "clients cannot go on from their own tensors alone: name one with a lasting global model"
            if wanted - inner.offers == {Trait.FIXED_STRUCTURE}:
                remedy = "its model grows on a plateau of the global score, and here that never moves: leave that out"
            return [Problem(at, type(inner).__name__, remedy)]
        return [*check_topology(inner, at), *inner.check(f"{at}.init_args", facts)]


def check_topology(algorithm: Algorithm, key: str) -> list[Problem]:
    """Return a problem when an algorithm that is to say what is trained says who trains it as well.

    Args:
        algorithm: The algorithm in another one's argument.
        key: Dotted key of that argument.
    """
    if isinstance(algorithm.topology, Federated):
        return []
    remedy = "says itself on whose data is trained: name the algorithm that it has in it"
    return [Problem(key, type(algorithm).__name__, remedy)]
