import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from fedbe.datamodules import CausalLMDataModule, IIDPartitioner, family_separates_documents, separates_documents
from fedbe.modeling.families import known_families

SEPARATING = {name for family in known_families() if family.separates_documents for name in family.model_types}

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXTRA = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16},
    "olmoe": EXPERTS,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
}


def tiny(family: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL, **EXTRA.get(family, {})))
        for parameter in model.parameters():  # strong enough for every attended token to show in the logits
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("family", sorted(SEPARATING))
def test_every_family_listed_keeps_packed_documents_apart(family: str):
    assert separates_documents(tiny(family))


@pytest.mark.parametrize("family", ["opt", "bloom", "xglm"])
def test_families_that_let_attention_cross_are_told_apart(family: str):
    model = tiny(family).train()
    assert not separates_documents(model)
    assert not family_separates_documents(model.config)
    assert model.training


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
