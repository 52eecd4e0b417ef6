"""Models of stages of different widths have no blocks: refused by name before work starts, whoever places blocks."""

import pytest
import transformers as hf
from families import tiny

from fedbe.algorithms import FedBE, Gated
from fedbe.errors import ExpansionError, Facts
from fedbe.expansion import expand_blocks, probe_client
from fedbe.expansion.placement import AdaptivePlacement, FixedPlacement, RandomPlacement
from fedbe.modeling.base_model import GivenModel

STAGED = {
    "swin": lambda: tiny("swin"),
    "swinv2": lambda: hf.Swinv2ForImageClassification(
        hf.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
    ),
    "convnext": lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 1])
    ),
}


@pytest.mark.parametrize("family", STAGED)
@pytest.mark.parametrize("placement", [AdaptivePlacement(), FixedPlacement([0]), RandomPlacement(1)])
def test_no_algorithm_places_blocks_between_stages(family, placement):
    model = STAGED[family]()
    facts = Facts(depth=GivenModel(model).depth)
    for algorithm in (FedBE(placement), Gated(FedBE(placement))):
        assert any("no number of blocks" in problem.remedy for problem in algorithm.check("algorithm.init_args", facts))
    with pytest.raises(ExpansionError, match="stages of different widths"):
        expand_blocks(model, [1])
    with pytest.raises(ExpansionError, match="stages of different widths"):
        probe_client(model, [], "client")
