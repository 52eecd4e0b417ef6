"""What is claimed of a model must be what can be seen of it, whichever way that comes out in the installed release."""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from fedbe.datamodules import CausalLMDataModule, IIDPartitioner, family_separates_documents, separates_documents
from fedbe.datamodules import separation as trial

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
PLAIN = (
    "bloom", "cohere", "cohere2", "exaone4", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "llama", "mistral",
    "olmo", "olmo2", "olmo3", "phi", "phi3", "qwen2", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
FAMILIES = {
    **{family: {} for family in PLAIN},
    **{family: {"head_dim": 8} for family in ("gemma", "gemma2", "gemma3_text", "glm4", "qwen3")},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16},
}


def tiny(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # strong enough for every attended token to show in the logits
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def seen_apart(model: PreTrainedModel) -> bool:
    """Whether the second of two documents neither changes with the first one nor differs from itself alone."""
    first, other, second = torch.tensor([[5, 9, 3, 7]]), torch.tensor([[8, 2, 6, 4]]), torch.tensor([[7, 3, 11, 5, 2]])
    positions = torch.cat([torch.arange(4), torch.arange(5)])[None]

    def logits(ids: Tensor, **options: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False, **options).logits[:, -5:]

    alone = logits(second)
    after = [logits(torch.cat([before, second], dim=1), position_ids=positions) for before in (first, other)]
    return all(torch.allclose(found, alone, atol=1e-4, rtol=1e-4) for found in after)


@pytest.mark.parametrize("large", [trial._LARGE, 0], ids=["whole", "one block of each kind"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_claimed_of_a_family_is_what_its_model_does(family, large, monkeypatch):
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    seen = seen_apart(tiny(config))
    monkeypatch.setattr(trial, "_LARGE", large)
    trial._tried.cache_clear()
    assert separates_documents(tiny(config)) == seen
    assert family_separates_documents(config) == seen


class StandInConfig(PretrainedConfig):
    """A model whose blocks each let attention cross or not, as their kinds say."""

    model_type = "fedbe_separation_stand_in"
    vocab_size: int = 64
    hidden_size: int = 16
    num_hidden_layers: int = 2
    kinds: list[str] | None = None


class StandIn(PreTrainedModel):
    config_class = StandInConfig

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(32, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False) -> CausalLMOutput:
        plain = torch.arange(input_ids.shape[1])[None]
        restarting = plain if position_ids is None else position_ids
        hidden = self.embedding(input_ids)
        for kind in self.config.kinds:
            hidden = hidden + self.places(plain if kind == "counts on" else restarting)
            document = torch.zeros_like(plain) if kind == "crosses" else (restarting == 0).cumsum(1)
            allowed = (document[:, :, None] == document[:, None, :]).tril()  # [1, s, s]
            weights = (hidden @ hidden.mT).masked_fill(~allowed, float("-inf")).softmax(-1)
            hidden = hidden + weights @ hidden
        return CausalLMOutput(logits=self.head(hidden))


AutoConfig.register(StandInConfig.model_type, StandInConfig)
AutoModelForCausalLM.register(StandInConfig, StandIn)


@pytest.mark.parametrize("large", [trial._LARGE, 0], ids=["whole", "one block of each kind"])
@pytest.mark.parametrize(
    ("kinds", "apart"),
    [
        (["keeps", "keeps"], True),
        (["crosses", "crosses"], False),
        (["keeps", "keeps", "crosses"], False),
        (["counts on", "counts on"], False),
    ],
)
def test_models_that_do_and_models_that_do_not_are_told_apart(
    kinds, apart, large, monkeypatch, caplog, corpus, tokenizer
):
    config = StandInConfig(kinds=kinds, num_hidden_layers=len(kinds))
    model = tiny(config).train()
    assert seen_apart(model) == separates_documents(model) == apart
    assert model.training
    monkeypatch.setattr(trial, "_LARGE", large)
    trial._tried.cache_clear()
    before = torch.get_rng_state()
    assert family_separates_documents(config) == apart
    assert torch.equal(torch.get_rng_state(), before)

    config.vocab_size = len(tokenizer)
    data = CausalLMDataModule(corpus({"text": ["Who is there?", "Nay, answer me."]}), IIDPartitioner(1), 60)
    data.connect(tokenizer, config, seed=0)
    with caplog.at_level(logging.WARNING):
        data.setup()
    assert data.restarts_positions == apart
    assert ("Attention crosses packed documents" in caplog.text) != apart


def test_one_block_of_each_kind_is_tried_of_a_large_model():
    values = {"n_layer": 4, "kinds": ["a", "b", "a", "c"], "rope": [1, 1, 1, 1], "other": [1, 2]}
    found = trial._with_a_block_of_each_kind(values, "n_layer")
    assert found == {"n_layer": 3, "kinds": ["a", "b", "c"], "rope": [1, 1, 1], "other": [1, 2]}
    assert trial._with_a_block_of_each_kind({"n_layer": 32}, "n_layer") == {"n_layer": 1}


def test_a_packed_document_has_the_logits_it_has_alone(corpus, tokenizer, llama_config):
    texts = ["Who is there?", "Nay, answer me.", "Long live the king!"]
    data = CausalLMDataModule(corpus({"text": texts}), IIDPartitioner(1), sequence_length=60)
    data.connect(tokenizer, llama_config, seed=0)
    data.setup()
    model = LlamaForCausalLM(llama_config).eval()
    (batch,) = data.client_dataloader("0", torch.Generator())
    assert len(batch["input_ids"]) == 1
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        for start, end in zip(starts, ends, strict=True):
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(packed[start:end], alone, atol=1e-5, rtol=1e-5)
    assert len(starts) == 3


def test_nothing_is_claimed_of_an_unknown_model():
    assert not family_separates_documents(None)
    assert not family_separates_documents(PretrainedConfig())
