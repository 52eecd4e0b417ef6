"""Baseline: the data of all clients in one place, against the very separation that federation is for."""

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.controls.local import check_topology
from fedbe.algorithms.topology import Pooled
from fedbe.errors import Facts, Problem


class Centralized(Algorithm):
    """One client holds all data and takes, in each round, as many local steps as a cohort takes together.

    What is trained follows another algorithm. The optimizer starts afresh in each round, as it does for every client of
    a federated run. A run with ``client.schedule.span`` "run" has one schedule over all of it.

    Args:
        algorithm: Says which parameters are trained.

    Source: ours, the usual upper control of federated learning.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        super().__init__(algorithm.adaptation, algorithm.strategy, Pooled())

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in the other algorithm's configuration."""
        at = f"{key}.algorithm"
        return [*check_topology(self.algorithm, at), *self.algorithm.check(f"{at}.init_args", facts)]
