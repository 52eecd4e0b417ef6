"""Full fine-tuning: every parameter is trained by every client."""

from fedbe.adaptation.whole_model import WholeModel
from fedbe.algorithms.base import Algorithm


class FedAvg(Algorithm):
    """Train all parameters and take the sample-weighted mean; tied weights are one tensor.

    Memory, in copies of the model: the resident weights, the global state, one client's update and the running mean of
    the updates, and during a client's run its gradients and optimizer state (two more for Adam). It does not grow with
    the number of clients. All of the model travels, both ways, for each client and round.

    Source: FedAvg (arXiv 1602.05629) (C).
    """

    def __init__(self) -> None:
        super().__init__(WholeModel())
