"""Tiny random models of every family, with nothing left at a neutral value that could hide a mistake."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.seeding import generator

VOCABULARY = 48
PAD, EOS = 0, 1
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
_GROUPED = {**_TOKENS, **_SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
_BERT = {
    **_TOKENS,
    **_SIZES,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
_SLIDING = {"sliding_window": 6, "layer_types": _MIXED}
_GEMMA = {**_GROUPED, **_SLIDING, "head_dim": 8, "query_pre_attn_scalar": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

Builder = Callable[[], PreTrainedModel]


def _causal(config: str, **values: Any) -> Builder:
    def build() -> PreTrainedModel:
        # Configurations may keep and change the lists they are given.
        copied = {name: list(value) if isinstance(value, list) else value for name, value in values.items()}
        return hf.AutoModelForCausalLM.from_config(getattr(hf, config)(**copied))

    return build


def _classifier(config: str, **values: Any) -> Builder:
    return lambda: hf.AutoModelForSequenceClassification.from_config(getattr(hf, config)(num_labels=3, **values))


def _images(config: str, **values: Any) -> Builder:
    sizes = {**_SIZES, "image_size": 8, "patch_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.1}
    return lambda: hf.AutoModelForImageClassification.from_config(getattr(hf, config)(**sizes, **values))


FAMILIES: dict[str, Builder] = {
    "llama": _causal("LlamaConfig", **_GROUPED, attention_bias=True, mlp_bias=True, attention_dropout=0.1),
    "llama_tied": _causal("LlamaConfig", **_GROUPED, tie_word_embeddings=True),
    "mistral": _causal("MistralConfig", **_GROUPED, sliding_window=6),
    "qwen2": _causal("Qwen2Config", **_GROUPED, **_SLIDING, use_sliding_window=True, max_window_layers=2),
    "qwen3": _causal("Qwen3Config", **_GROUPED, **_SLIDING, use_sliding_window=True, head_dim=8),
    "gemma": _causal("GemmaConfig", **_GROUPED, head_dim=8),
    "gemma2": _causal("Gemma2Config", **_GEMMA),
    "gemma3_text": _causal("Gemma3TextConfig", **_GEMMA),
    "phi3": _causal("Phi3Config", **_GROUPED, resid_pdrop=0.1, sliding_window=6),
    "smollm3": _causal("SmolLM3Config", **_GROUPED, **_SLIDING, use_sliding_window=True, no_rope_layers=[1, 0, 1, 1]),
    "olmo": _causal("OlmoConfig", **_GROUPED),
    "olmo2": _causal("Olmo2Config", **_GROUPED),
    "olmo3": _causal("Olmo3Config", **_GROUPED, **_SLIDING),
    "exaone4": _causal("Exaone4Config", **_GROUPED, **_SLIDING),
    "glm4": _causal("Glm4Config", **_GROUPED, head_dim=8),
    "granite": _causal("GraniteConfig", **_GROUPED, residual_multiplier=0.5),
    "cohere2": _causal("Cohere2Config", **_GROUPED, **_SLIDING),
    "stablelm": _causal("StableLmConfig", **_GROUPED, hidden_dropout=0.1),
    "starcoder2": _causal("Starcoder2Config", **_GROUPED, residual_dropout=0.1, sliding_window=None),
    "phi": _causal("PhiConfig", **_GROUPED, resid_pdrop=0.1),
    "gpt2": _causal("GPT2Config", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64, resid_pdrop=0.1),
    "gpt_neo": _causal(
        "GPTNeoConfig",
        **_TOKENS,
        hidden_size=32,
        num_heads=4,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
        max_position_embeddings=64,
    ),
    "gptj": _causal("GPTJConfig", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64, rotary_dim=4),
    "gpt_neox": _causal("GPTNeoXConfig", **_TOKENS, **_SIZES, max_position_embeddings=64, hidden_dropout=0.1),
    "gpt_neox_sequential": _causal(
        "GPTNeoXConfig", **_TOKENS, **_SIZES, max_position_embeddings=64, use_parallel_residual=False
    ),
    "falcon": _causal("FalconConfig", **_TOKENS, **_SIZES, alibi=False, bias=True, hidden_dropout=0.1),
    "falcon_sequential": _causal("FalconConfig", **_TOKENS, **_SIZES, parallel_attn=False, alibi=True, bias=True),
    "falcon_new": _causal("FalconConfig", **_TOKENS, **_SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": _causal("BloomConfig", **_TOKENS, hidden_size=32, n_head=4, n_layer=4, hidden_dropout=0.1),
    "opt": _causal(
        "OPTConfig",
        **_TOKENS,
        hidden_size=32,
        ffn_dim=48,
        num_attention_heads=4,
        num_hidden_layers=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.1,
    ),
    "opt_post_norm": _causal(
        "OPTConfig",
        **_TOKENS,
        hidden_size=32,
        ffn_dim=48,
        num_attention_heads=4,
        num_hidden_layers=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
    ),
    "mixtral": _causal("MixtralConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _causal("Qwen2MoeConfig", **_EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
    "qwen3_moe": _causal("Qwen3MoeConfig", **_EXPERTS, num_experts=4, head_dim=8),
    "bert": _classifier("BertConfig", **_BERT),
    "bert_masked": lambda: hf.AutoModelForMaskedLM.from_config(hf.BertConfig(**_BERT)),
    "roberta": _classifier("RobertaConfig", **_BERT),
    "electra": _classifier("ElectraConfig", **_BERT, embedding_size=16),
    "distilbert": _classifier(
        "DistilBertConfig",
        **_TOKENS,
        dim=32,
        hidden_dim=48,
        n_heads=4,
        n_layers=4,
        max_position_embeddings=64,
        dropout=0.1,
    ),
    "llama_classifier": _classifier("LlamaConfig", **_GROUPED),
    "vit": _images("ViTConfig"),
    "dinov2": _images("Dinov2Config", mlp_ratio=2),
}
GATED = frozenset({"bert", "bert_masked", "roberta", "electra", "distilbert", "opt_post_norm"})
_OTHERS = {"bert", "bert_masked", "roberta", "electra", "distilbert", "llama_classifier", "vit", "dinov2"}
GENERATIVE = tuple(name for name in FAMILIES if name not in _OTHERS)


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the family's model in evaluation mode, every parameter moved away from zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family]()
    perturb(model.named_parameters(), 0.2)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = None  # every generated sequence runs to its full length
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # rotary buffers stay in float32, as they do on loading
    return model.eval()


def perturb(named_parameters: Any, scale: float) -> None:
    """Add noise to parameters in place, each its own."""
    with torch.no_grad():
        for name, parameter in named_parameters:
            noise = torch.randn(parameter.shape, generator=generator(1, name))
            parameter.add_((scale * noise).to(parameter.dtype))


def batch(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a batch with a whole, a left-padded and a right-padded sequence; or two images."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator(2)).to(model.dtype)}
    ids = torch.randint(3, VOCABULARY, (3, 14), generator=generator(2))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, -3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def logits(model: PreTrainedModel) -> Tensor:
    """Return the model's logits on `batch`, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(**batch(model)).logits


def loss(model: PreTrainedModel) -> Tensor:
    """Return a loss on `batch` that reaches every output."""
    output = model(**batch(model)).logits
    weights = torch.randn(output.shape, generator=generator(3)).to(output.dtype)
    return (output.log_softmax(-1) * weights).sum()
