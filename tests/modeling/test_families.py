"""What is known of a family is said in one place, by a user as by us."""

import re
from itertools import chain
from pathlib import Path

import pytest
import torch
from families import perturb
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, RobertaConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from fedbe.errors import ExpansionError
from fedbe.expansion import block_parameter_names, expand_blocks, freeze, grow, probe_client, remove_blocks
from fedbe.modeling import families
from fedbe.modeling.architecture import expressed_by_config, find_blocks
from fedbe.modeling.families import Family, family_of, known_families, register_family, stated_depth
from fedbe.seeding import generator
from fedbe.text.tokens import token_limit

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = next(
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    if "register_family" in block
)


class TowerConfig(PreTrainedConfig):
    """The configuration of an architecture that calls everything by names of its own."""

    model_type = "tower"

    def __init__(self, storeys=3, width=16, kinds=("brick", "stone", "brick"), cellars=(0,), vocab_size=32, **options):
        self.storeys, self.kinds, self.cellars = storeys, list(kinds), list(cellars)
        self.hidden_size, self.vocab_size = width, vocab_size
        super().__init__(**options)


class Storey(nn.Module):
    """A pre-norm block whose kind and place say what it computes."""

    def __init__(self, config: TowerConfig, storey: int) -> None:
        super().__init__()
        self.storey = storey
        self.scale = {"brick": 1.0, "stone": 0.5}[config.kinds[storey]]
        self.cellar = storey in config.cellars
        self.norm = nn.LayerNorm(config.hidden_size)
        self.up, self.roof = nn.Linear(config.hidden_size, 24), nn.Linear(24, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inside = torch.relu(self.up(self.norm(hidden_states)))
        return hidden_states + self.scale * self.roof(inside if self.cellar else inside.cumsum(1))


class Tower(PreTrainedModel):
    config_class = TowerConfig
    main_input_name = "input_ids"

    def __init__(self, config: TowerConfig) -> None:
        super().__init__(config)
        self.ground = nn.Embedding(config.vocab_size, config.hidden_size)
        self.floors = nn.ModuleList(Storey(config, index) for index in range(config.storeys))
        self.top = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=True):
        hidden = self.ground(input_ids)
        for floor in self.floors:
            hidden = floor(hidden)
        logits = self.top(hidden)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def get_output_embeddings(self):
        return self.top


@pytest.fixture
def own_family(monkeypatch):
    """What CONTRIBUTING shows, as a user's own file does it; forgotten afterwards."""
    monkeypatch.setattr(families, "_registered", dict(families._registered))
    exec(EXAMPLE, {})


def tower() -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tower(TowerConfig(pad_token_id=0)).eval()


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(1, 32, (rows, 9), generator=generator(0, "tower"))


def test_without_a_description_nothing_is_found():
    with pytest.raises(ExpansionError, match="no list of None blocks"):
        expand_blocks(tower(), [0])


def test_a_family_described_in_a_user_s_own_file_is_expanded_grown_and_probed(own_family):
    model = tower()
    before = model(tokens()).logits
    report = probe_client(model, [{"input_ids": tokens(), "labels": tokens()}], "client")
    assert len(report.scores) == 3 and min(report.scores) > 0
    expansion = expand_blocks(model, [0, 1])
    assert torch.equal(model(tokens()).logits, before)
    assert expansion.rule.kind == "zero-writers" and expansion.rule.targets == ("roof",)
    assert model.config.storeys == 5 and model.config.kinds == ["brick", "brick", "stone", "stone", "brick"]
    assert model.config.cellars == [0, 1] and [floor.storey for floor in model.floors] == list(range(5))
    expansion, renamed = grow(model, expansion, 2)
    assert torch.equal(model(tokens()).logits, before) and renamed == {}
    names = block_parameter_names(model, expansion)
    freeze(model, chain.from_iterable(names.values()))
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    assert not torch.equal(model(tokens()).logits, before)
    remove_blocks(model, expansion)
    assert torch.equal(model(tokens()).logits, before) and model.config.storeys == 3


def test_its_expanded_form_is_built_again_from_its_configuration(own_family):
    model = tower()
    expand_blocks(model, [0, 1])
    assert expressed_by_config(model, find_blocks(model)) is None


def test_a_later_description_takes_the_place_of_an_earlier_one(own_family):
    register_family(Family(("tower",), depth_names=("storeys",), writers=("up",)))
    assert family_of(TowerConfig()).writers == ("up",)
    assert [family.model_types for family in known_families()].count(("tower",)) == 1


def test_what_nobody_described_follows_the_conventions():
    class Unknown(PreTrainedConfig):
        model_type = "nobody has seen it"

    assert family_of(Unknown()) == Family(("nobody has seen it",))
    assert stated_depth(Unknown(n_layer=7)) == 7 and stated_depth(Unknown()) is None


def test_positions_behind_the_padding_id_are_counted_off():
    config = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    assert token_limit(config) == 512
    assert token_limit(PreTrainedConfig()) is None
    assert token_limit(PreTrainedConfig(max_position_embeddings=-1)) is None
