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

_ONLY_EXPERTS = frozenset({"num_experts_per_tok", "moe_intermediate_size"})

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


def _of_class(model: str, config: str, **values: Any) -> Builder:
    return lambda: getattr(hf, model)(getattr(hf, config)(**values))


_LINEAR_MIX = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_DELTA_NET = {
    **_EXPERTS,
    "head_dim": 8,
    "layer_types": _LINEAR_MIX,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {
    **_GROUPED,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_VISION = {**_SIZES, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
_GRID_VISION = {"depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 4}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_VISION_TOKENS = {"image_token_id": 40, "video_token_id": 41, "vision_start_token_id": 42, "vision_end_token_id": 43}

# These and all others, each of them for the matrix alone: see tests/expansion/matrix.py.
MATRIX: dict[str, Builder] = {
    **FAMILIES,
    "gpt_oss": _causal(
        "GptOssConfig",
        **_GROUPED,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        layer_types=_MIXED,
    ),
    "llama4": _causal(
        "Llama4TextConfig",
        **_GROUPED,
        intermediate_size_mlp=40,
        head_dim=8,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        no_rope_layers=[1, 1, 0, 1],
    ),
    "qwen3_next": _causal("Qwen3NextConfig", **_DELTA_NET, num_experts=4, shared_expert_intermediate_size=24),
    "qwen3_next_steps": _causal(
        "Qwen3NextConfig", **_DELTA_NET, num_experts=4, shared_expert_intermediate_size=24, decoder_sparse_step=2
    ),
    "qwen3.5": _causal("Qwen3_5TextConfig", **{k: v for k, v in _DELTA_NET.items() if k not in _ONLY_EXPERTS}),
    "qwen3.5_moe": _causal("Qwen3_5MoeTextConfig", **_DELTA_NET, num_experts=4, shared_expert_intermediate_size=24),
    "qwen2_moe_steps": _causal(
        "Qwen2MoeConfig",
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=24,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "qwen3_moe_steps": _causal("Qwen3MoeConfig", **_EXPERTS, num_experts=4, head_dim=8, decoder_sparse_step=2),
    "qwen3_moe_dense": _causal("Qwen3MoeConfig", **_EXPERTS, num_experts=4, head_dim=8, mlp_only_layers=[0, 2]),
    "deepseek_v2": _causal("DeepseekV2Config", **{**_ROUTED, **_LATENT}),
    "deepseek_v3": _causal("DeepseekV3Config", **{**_ROUTED, **_LATENT}),
    "glm4_moe": _causal("Glm4MoeConfig", **_ROUTED, head_dim=8),
    "dots1": _causal("Dots1Config", **_ROUTED, head_dim=8),
    "ernie4_5": _causal("Ernie4_5Config", **_GROUPED, head_dim=8),
    "ernie4_5_moe": _causal(
        "Ernie4_5_MoeConfig",
        **_GROUPED,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "afmoe": _causal(
        "AfmoeConfig",
        **_EXPERTS,
        head_dim=8,
        num_experts=4,
        num_shared_experts=1,
        num_dense_layers=2,
        sliding_window=6,
        layer_types=_MIXED,
    ),
    "olmoe": _causal("OlmoeConfig", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "phimoe": _causal("PhimoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "granitemoe": _causal("GraniteMoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": _causal(
        "JetMoeConfig",
        **_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    ),
    "mamba": _causal("MambaConfig", **_TOKENS, hidden_size=32, num_hidden_layers=4, state_size=8),
    "falcon_mamba": _causal("FalconMambaConfig", **_TOKENS, hidden_size=32, num_hidden_layers=4, state_size=8),
    "mamba2": _causal(
        "Mamba2Config",
        **_TOKENS,
        hidden_size=32,
        num_hidden_layers=4,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
        chunk_size=4,
    ),
    "bamba": _causal("BambaConfig", **_GROUPED, **_MAMBA_HEADS, attn_layer_indices=[1, 3]),
    "falcon_h1": _causal("FalconH1Config", **_GROUPED, **_MAMBA_HEADS, head_dim=8, mamba_d_ssm=64),
    "granitemoehybrid": _causal(
        "GraniteMoeHybridConfig",
        **_GROUPED,
        **_MAMBA_HEADS,
        mamba_expand=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=24,
        layer_types=_LINEAR_MIX,
    ),
    "nemotron_h": _causal(
        "NemotronHConfig",
        **{k: v for k, v in _GROUPED.items() if k != "num_hidden_layers"},
        head_dim=8,
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
        n_group=1,
        topk_group=1,
    ),
    "lfm2": _causal("Lfm2Config", **_GROUPED, layer_types=["conv", "full_attention", "conv", "full_attention"]),
    "lfm2_moe": _causal(
        "Lfm2MoeConfig",
        **_EXPERTS,
        num_experts=4,
        num_dense_layers=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    ),
    "recurrent_gemma": _causal(
        "RecurrentGemmaConfig",
        **_TOKENS,
        **_SIZES,
        num_key_value_heads=1,
        head_dim=8,
        lru_width=32,
        attention_window_size=6,
        block_types=["recurrent", "attention"],
    ),
    "minimax": _causal(
        "MiniMaxConfig",
        **_GROUPED,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=4,
        layer_types=_LINEAR_MIX,
    ),
    "jamba": _causal(
        "JambaConfig",
        **_GROUPED,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
    ),
    "gemma3n": _causal(
        "Gemma3nTextConfig",
        **_GROUPED,
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=1,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=_MIXED,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4": _causal("Gemma4TextConfig", **_GROUPED, head_dim=8, layer_types=_MIXED),
    "cohere": _causal("CohereConfig", **_GROUPED),
    "helium": _causal("HeliumConfig", **_GROUPED, head_dim=8),
    "seed_oss": _causal("SeedOssConfig", **_GROUPED, head_dim=8),
    "arcee": _causal("ArceeConfig", **_GROUPED),
    "apertus": _causal("ApertusConfig", **_GROUPED),
    "nemotron": _causal("NemotronConfig", **_GROUPED),
    "minicpm3": _causal("MiniCPM3Config", **{**_GROUPED, **_LATENT}),
    "diffllama": _causal("DiffLlamaConfig", **_GROUPED),
    "hunyuan": _causal("HunYuanDenseV1Config", **_GROUPED, head_dim=8),
    "persimmon": _causal("PersimmonConfig", **_TOKENS, **_SIZES, max_position_embeddings=64),
    "mpt": _causal("MptConfig", **_TOKENS, d_model=32, n_heads=4, n_layers=4, max_seq_len=64, expansion_ratio=2),
    "gpt_bigcode": _causal("GPTBigCodeConfig", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64),
    "codegen": _causal("CodeGenConfig", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64, rotary_dim=4),
    "biogpt": _causal("BioGptConfig", **_TOKENS, **_SIZES, max_position_embeddings=64),
    "openai_gpt": _causal("OpenAIGPTConfig", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64),
    "modernbert_decoder": _causal("ModernBertDecoderConfig", **_TOKENS, **_SIZES, local_attention=6),
    "modernbert": _classifier("ModernBertConfig", **_TOKENS, **_SIZES, local_attention=6, global_attn_every_n_layers=2),
    "eurobert": _classifier("EuroBertConfig", **_GROUPED),
    "esm": _classifier("EsmConfig", **_BERT, mask_token_id=3, position_embedding_type="rotary"),
    "deberta_v2": _classifier("DebertaV2Config", **_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "mpnet": _classifier("MPNetConfig", **_BERT),
    "fnet": _classifier("FNetConfig", **_TOKENS, **_SIZES, max_position_embeddings=64),
    "convbert": _classifier("ConvBertConfig", **_BERT, embedding_size=32),
    "xlnet": _classifier("XLNetConfig", **_TOKENS, d_model=32, n_layer=4, n_head=4, d_inner=48),
    "xlm_roberta": _classifier("XLMRobertaConfig", **_BERT),
    "camembert": _classifier("CamembertConfig", **_BERT),
    "roberta_prelayernorm": _classifier("RobertaPreLayerNormConfig", **_BERT),
    "rembert": _classifier("RemBertConfig", **_BERT, input_embedding_size=16, output_embedding_size=16),
    "roformer": _classifier("RoFormerConfig", **_BERT, embedding_size=32),
    "albert": _classifier("AlbertConfig", **_BERT, embedding_size=16),
    "funnel": _classifier("FunnelConfig", **_TOKENS, block_sizes=[2, 2], d_model=32, n_head=4, d_head=8, d_inner=48),
    "gpt2_classifier": _classifier("GPT2Config", **_TOKENS, n_embd=32, n_head=4, n_layer=4, n_positions=64),
    "t5_encoder": _of_class(
        "T5EncoderModel", "T5Config", **_TOKENS, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4
    ),
    "t5": _of_class(
        "T5ForConditionalGeneration", "T5Config", **_TOKENS, d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=4
    ),
    "deit": _of_class("DeiTForImageClassification", "DeiTConfig", **_SIZES, image_size=8, patch_size=4, num_labels=3),
    "beit": _images("BeitConfig", drop_path_rate=0.1, use_relative_position_bias=True),
    "data2vec_vision": _images("Data2VecVisionConfig", drop_path_rate=0.1, use_relative_position_bias=True),
    "dinov3": _of_class("DINOv3ViTModel", "DINOv3ViTConfig", **_SIZES, image_size=8, patch_size=4),
    "ijepa": _images("IJepaConfig"),
    "clip": lambda: hf.AutoModelForImageClassification.from_config(
        hf.CLIPConfig(text_config={**_SIZES, "num_hidden_layers": 2}, vision_config={**_VISION, "num_hidden_layers": 4})
    ),
    "siglip": lambda: hf.AutoModelForImageClassification.from_config(
        hf.SiglipConfig(
            text_config={**_SIZES, "num_hidden_layers": 2}, vision_config={**_VISION, "num_hidden_layers": 4}
        )
    ),
    "swin": lambda: hf.AutoModelForImageClassification.from_config(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2)
    ),
    "gemma3": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            text_config=hf.Gemma3TextConfig(**_GEMMA), vision_config=_VISION, image_token_id=40, mm_tokens_per_image=4
        )
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**_GROUPED),
            vision_config=hf.CLIPVisionConfig(**_VISION),
            image_token_id=40,
            vision_feature_layer=-1,
        )
    ),
    "qwen2_vl": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            text_config={**_GROUPED, "rope_parameters": dict(_SECTIONS)},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
            **_VISION_TOKENS,
        )
    ),
    "qwen3_vl": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            text_config={**_GROUPED, "head_dim": 8, "rope_parameters": dict(_SECTIONS)},
            vision_config={**_GRID_VISION, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1]},
            **_VISION_TOKENS,
        )
    ),
}
GATED = frozenset({"bert", "bert_masked", "roberta", "electra", "distilbert", "opt_post_norm"})
_OTHERS = {"bert", "bert_masked", "roberta", "electra", "distilbert", "llama_classifier", "vit", "dinov2"}
GENERATIVE = tuple(name for name in FAMILIES if name not in _OTHERS)


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the family's model in evaluation mode, every parameter moved away from zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MATRIX[family]()
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
    """Return the model's logits on `batch`, or its hidden states where it has none, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return _outputs(model)


def _outputs(model: PreTrainedModel) -> Tensor:
    output = model(**batch(model))
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def loss(model: PreTrainedModel) -> Tensor:
    """Return a loss on `batch` that reaches every output."""
    output = _outputs(model)
    weights = torch.randn(output.shape, generator=generator(3)).to(output.dtype)
    return (output.log_softmax(-1) * weights).sum()
