"""What shared-prefix reuse saves: local steps with and without it, by the depth of the lowest trained block."""

import copy
import statistics
from dataclasses import dataclass

from torch import Tensor

from fedbe.algorithms import BlockExpansion
from fedbe.allocation.cost import CostModel
from fedbe.bench.cost_model import step_seconds
from fedbe.federation.loop import FederatedLoop
from fedbe.modeling.architecture import find_blocks
from fedbe.prefix.reuse import reuse_prefix
from fedbe.prefix.store import PrefixReuse
from fedbe.seeding import generator


@dataclass(frozen=True)
class PrefixGain:
    """Local steps that train one expanded block.

    Attributes:
        position: The base block above which it stands.
        blocks: How many blocks below it are left out.
        ratios: Time of a step with reuse over that of one without, pair by pair, all sequences known.
        floor: The same ratio of counted FLOPs.
        first: The ratio where no sequence but one is known yet, median.
    """

    position: int
    blocks: int
    ratios: tuple[float, ...]
    floor: float
    first: float

    def __str__(self) -> str:
        ratio = statistics.median(self.ratios)
        spread = f"{min(self.ratios):.3f} – {max(self.ratios):.3f}"
        return f"{self.position:>8}{self.blocks:>10}{ratio:>10.3f}   {spread:<16}{self.floor:>8.3f}{self.first:>12.2f}"


HEADER = f"{'position':>8}{'left out':>10}{'time':>10}   {'(min – max)':<16}{'FLOPs':>8}{'first time':>12}"


def measure_prefix(loop: FederatedLoop, repeats: int) -> list[PrefixGain]:
    """Measure steps that train a block at each position but the lowest, on one batch of the first client.

    Args:
        loop: Built and not set up: its base model is copied for each position.
        repeats: Pairs of steps that count, after one that does not.

    Raises:
        ExpansionError: The model has no stack of blocks.
    """
    data = loop.plan.data
    batch = next(iter(data.client_dataloader(data.client_ids[0], generator(loop.plan.seed, "bench"))))
    inputs = {name: tensor.to(loop.model.device) for name, tensor in batch.items()}
    return [_gain(loop, position, inputs, repeats) for position in range(find_blocks(loop.model).depth)]


def _gain(loop: FederatedLoop, position: int, inputs: dict[str, Tensor], repeats: int) -> PrefixGain:
    model = copy.deepcopy(loop.model)
    adaptation = BlockExpansion([position]).adaptation
    adaptation.prepare(model, inputs)
    names = adaptation.trainable_names
    costs = CostModel.of(model, inputs, 0.0, names)
    plain, ratios, firsts = [], [], []
    for _ in range(repeats + 1):
        plain.append(sum(step_seconds(model, names, inputs)))
        prefix = reuse_prefix(model, names, PrefixReuse().store(), {name: x[:1] for name, x in inputs.items()})
        firsts.append(sum(step_seconds(model, names, inputs)))  # its first sequence is known from the trial
        ratios.append(sum(step_seconds(model, names, inputs)) / plain[-1])
        left_out = len(prefix.blocks)
        prefix.remove()
    cost = costs.cost(names, len(next(iter(inputs.values()))))
    below = sum(part.forward_flops for part in costs.counts.parts[1 : left_out + 1])
    whole = cost.forward_flops + cost.backward_flops
    first = statistics.median(a / b for a, b in zip(firsts[1:], plain[1:], strict=True))
    return PrefixGain(position, left_out, tuple(ratios[1:]), 1 - below / whole, first)
