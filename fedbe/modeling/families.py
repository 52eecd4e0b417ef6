"""What is known of the families of architectures: one description each, a user's own among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""How the depth is called in configurations and modules of any family."""

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")
"""How a block's own index is called in the modules of any family."""

COUNT_NAMES = ("first_k_dense_replace", "num_dense_layers")
"""How configurations of any family call the number of lowest blocks that are of another kind than the rest."""


@dataclass(frozen=True)
class Family:
    """What is known of a family of architectures and is not asked of the model itself.

    Everything may be left out: a family that nobody describes is expanded too, if one of the known ways to make a block
    the identity fits its blocks, and whether it does is verified on the live model.

    Attributes:
        model_types: The ``model_type`` of its configurations; of a nested one that of the text part.
        output_norms: Paths inside a block of the norms (or layer scales) through which all of its outputs pass on
            their way into the residual stream.
        norm_offset: 1 where these norms multiply by 1 + θ, otherwise 0.
        writers: Paths inside a block of the projections that write into the residual stream; of a model whose blocks
            differ, those of all kinds: each block has some of them.
        post_norm: Whether there are blocks that end in a norm of the residual stream, LN(x + …).
        depth_names: How its depth is called where that is none of `DEPTH_NAMES`.
        index_names: How a block's own index is called where that is none of `INDEX_NAMES`.
        per_block_lists: Names of lists with one entry per block; those with "layer" in their name are found without.
        block_index_lists: Names of lists that hold the indices of some blocks.
        counts: How the number of lowest blocks of another kind is called where that is none of `COUNT_NAMES`.
        last_indices: How the index of the last block of a kind is called.
        spell_out: Turns what a configuration says of its blocks by a rule (every second one) into lists, before they
            are rearranged; the configuration describes the same model afterwards.
        settle: Makes agree what a configuration holds of its blocks a second time, after they were rearranged.
        positions_after_padding: Whether positions are counted from behind the padding id.
        obstacle: Why no model of the family can be expanded, for whatever reason its outputs would change; a sentence
            about "its blocks" or "it".
        fed_blocks: To how many of the lowest blocks' outputs the model adds something of its own by their index, where
            a configuration says; no block can be inserted between them.
    """

    model_types: tuple[str, ...]
    output_norms: tuple[str, ...] = ()
    norm_offset: float = 0.0
    writers: tuple[str, ...] = ()
    post_norm: bool = False
    depth_names: tuple[str, ...] = ()
    index_names: tuple[str, ...] = ()
    per_block_lists: tuple[str, ...] = ()
    block_index_lists: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    last_indices: tuple[str, ...] = ()
    spell_out: Callable[[PreTrainedConfig], None] | None = None
    settle: Callable[[PreTrainedConfig], None] | None = None
    positions_after_padding: bool = False
    obstacle: str | None = None
    fed_blocks: Callable[[PreTrainedConfig], int] | None = None


_registered: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known, in place of what was known of its model types.

    Call it where the run imports it: in the file of your own algorithm, data module or model.
    """
    for model_type in family.model_types:
        _registered[model_type] = family


def stack_config(config: PreTrainedConfig, images: bool = False) -> PreTrainedConfig:
    """Return the configuration that describes the blocks: of a nested one the text part, or the vision part.

    Args:
        config: A model's configuration.
        images: Whether the model takes images alone.
    """
    vision = getattr(config, "vision_config", None) if images else None
    return vision if isinstance(vision, PreTrainedConfig) else config.get_text_config()


def family_of(config: PreTrainedConfig) -> Family:
    """Return what is known of a model's family, by its (text) configuration."""
    return family_named(str(config.get_text_config().model_type))


def family_named(model_type: str) -> Family:
    """Return what is known of the family of a ``model_type``: nothing beyond the conventions if nobody described it."""
    return _registered.get(model_type) or Family((model_type,))


def stated_depth(config: PreTrainedConfig, images: bool = False) -> int | None:
    """Return the number of blocks that a configuration states, see `stack_config`; ``None`` if it states none.

    A model of several stages, each of a width and a number of blocks of its own, has no one number.
    """
    config = stack_config(config, images)
    if has_stages(config):
        return None
    values = (getattr(config, name, None) for name in (*family_of(config).depth_names, *DEPTH_NAMES))
    return next((value for value in values if isinstance(value, int)), None)


def has_stages(config: PreTrainedConfig) -> bool:
    """Whether a configuration describes stages of different widths, as of Swin, and states how deep each is."""
    return isinstance(getattr(config, "depths", None), (list, tuple))


def known_families() -> Iterator[Family]:
    """Yield every registered family once, in the order of registration."""
    yield from dict.fromkeys(_registered.values())


def _write_attention_types(config: PreTrainedConfig) -> None:
    # GPT-Neo builds its list of attention kinds from this compressed form when a checkpoint is loaded.
    config.attention_types = [[list(config.attention_layers), 1]]


def _list_dense_blocks(config: PreTrainedConfig) -> None:
    """Write "experts in every n-th block" as the list of the other blocks."""
    step = config.decoder_sparse_step
    if step != 1:
        depth, dense = config.num_hidden_layers, set(config.mlp_only_layers or ())
        config.mlp_only_layers = [index for index in range(depth) if index in dense or (index + 1) % step]
        config.decoder_sparse_step = 1


def _list_block_types(config: PreTrainedConfig) -> None:
    """Write a pattern of block types that repeats itself as one list of all."""
    config.block_types = list(config.layers_block_type)


def _deepstack_blocks(config: PreTrainedConfig) -> int:
    for described in (getattr(config, "vision_config", None), config):
        if indexes := getattr(described, "deepstack_visual_indexes", None):
            return len(indexes)
    return 0


def _spatially_fed_blocks(config: PreTrainedConfig) -> int:
    layers = [pair[1] for pair in getattr(config, "deepstack_layer_map", None) or ()]
    spatial = getattr(config, "spatial_target_layers", None) or ()
    return max((*layers, *spatial), default=-1) + 1


_GATED_MLP = ("self_attn.o_proj", "mlp.down_proj")
_EXPERTS = ("self_attn.o_proj", "mlp.experts.down_proj")
_MIXED = ("self_attn.o_proj", "mlp.down_proj", "mlp.experts.down_proj")
_SHARED_EXPERT = (*_MIXED, "mlp.shared_expert.down_proj")
_SHARED_EXPERTS = (*_MIXED, "mlp.shared_experts.down_proj")
_MAMBA_MIXED = ("self_attn.o_proj", "mamba.out_proj")
_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_DENSE = ("mlp_only_layers",)

for _family in (
    Family(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "smollm3", "olmo", "gemma", "granite"),
            *("stablelm", "cohere", "cohere2", "minicpm3", "eurobert", "helium", "seed_oss", "ernie4_5", "arcee"),
            *("apertus", "nemotron", "diffllama", "qwen2_vl_text", "qwen2_5_vl_text", "hunyuan_v1_dense"),
        ),
        writers=_GATED_MLP,
    ),
    Family(("mixtral", "olmoe", "phimoe"), writers=_EXPERTS),
    Family(
        ("jetmoe",),
        writers=(
            *("self_attention.experts.output_linear", "self_attention.experts.bias"),
            *("mlp.output_linear", "mlp.bias"),
        ),
    ),
    Family(("qwen3_moe",), writers=_MIXED, block_index_lists=_DENSE, spell_out=_list_dense_blocks),
    Family(("qwen2_moe",), writers=_SHARED_EXPERT, block_index_lists=_DENSE, spell_out=_list_dense_blocks),
    Family(
        ("qwen3_next",),
        writers=(*_SHARED_EXPERT, "linear_attn.out_proj"),
        block_index_lists=_DENSE,
        spell_out=_list_dense_blocks,
    ),
    Family(("qwen3_5_text", "qwen3_5_moe_text"), writers=(*_SHARED_EXPERT, "linear_attn.out_proj")),
    Family(
        (
            *("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe_text", "dots1", "mistral4", "exaone_moe"),
            *("glm4_moe_lite",),
        ),
        writers=_SHARED_EXPERTS,
    ),
    Family(
        ("ernie4_5_moe",),
        writers=_SHARED_EXPERTS,
        counts=("moe_layer_start_index",),
        last_indices=("moe_layer_end_index",),
    ),
    Family(("gpt_oss",), writers=(*_EXPERTS, "mlp.experts.down_proj_bias")),
    Family(
        ("llama4_text",),
        writers=(
            "self_attn.o_proj",
            "feed_forward.down_proj",
            "feed_forward.experts.down_proj",
            "feed_forward.shared_expert.down_proj",
        ),
        block_index_lists=("moe_layers",),
    ),
    Family(
        ("lfm2", "lfm2_moe"),
        writers=("self_attn.out_proj", "conv.out_proj", "feed_forward.w2", "feed_forward.experts.down_proj"),
        block_index_lists=("full_attn_idxs",),
    ),
    Family(("mamba", "mamba2", "falcon_mamba"), writers=("mixer.out_proj",)),
    Family(
        ("nemotron_h",),
        writers=(
            *("mixer.out_proj", "mixer.o_proj", "mixer.down_proj", "mixer.experts.down_proj"),
            *("mixer.shared_experts.down_proj", "mixer.fc2_latent_proj"),
        ),
    ),
    Family(("bamba",), writers=(*_MAMBA_MIXED, "feed_forward.down_proj"), block_index_lists=("attn_layer_indices",)),
    Family(("falcon_h1",), writers=(*_MAMBA_MIXED, "feed_forward.down_proj")),
    Family(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        writers=(*_MAMBA_MIXED, "block_sparse_moe.experts.down_proj", "shared_mlp.output_linear"),
    ),
    Family(
        ("recurrent_gemma",),
        writers=("temporal_block.linear_out", "temporal_block.o_proj", "mlp_block.down_proj"),
        per_block_lists=("block_types",),
        spell_out=_list_block_types,
    ),
    Family(("gemma2", "gemma3_text"), output_norms=_NORMS, norm_offset=1.0),
    Family(("olmo2", "olmo3"), output_norms=_NORMS),
    Family(("exaone4",), output_norms=_NORMS),
    Family(("afmoe",), output_norms=("post_attention_layernorm", "post_mlp_layernorm")),
    Family(("glm4",), output_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    Family(("phi",), writers=("self_attn.dense", "mlp.fc2")),
    Family(("starcoder2",), writers=("self_attn.o_proj", "mlp.c_proj")),
    Family(("gpt2", "gpt_bigcode"), writers=("attn.c_proj", "mlp.c_proj")),
    Family(("gpt_neo",), writers=("attn.attention.out_proj", "mlp.c_proj"), settle=_write_attention_types),
    Family(("gptj", "codegen"), writers=("attn.out_proj", "mlp.fc_out")),
    Family(("gpt_neox",), writers=("attention.dense", "mlp.dense_4h_to_h")),
    Family(("falcon", "bloom"), writers=("self_attention.dense", "mlp.dense_4h_to_h")),
    Family(("mpt",), writers=("attn.out_proj", "ffn.down_proj")),
    Family(("opt",), writers=("self_attn.out_proj", "fc2"), post_norm=True),
    Family(("biogpt", "xglm"), writers=("self_attn.out_proj", "fc2")),
    Family(("persimmon",), writers=("self_attn.dense", "mlp.dense_4h_to_h")),
    Family(("t5", "mt5", "umt5"), writers=("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")),
    Family(("modernbert",), writers=("attn.out_proj", "attn.Wo", "mlp.Wo")),
    Family(("modernbert-decoder",), writers=("attn.out_proj", "attn.Wo", "mlp.Wo")),
    Family(("esm", "data2vec-vision"), writers=("attention.output.dense", "output.dense")),
    Family(("vit", "deit", "ijepa", "beit"), writers=("attention.o_proj", "mlp.fc2")),
    Family(("clip_vision_model", "clip_text_model", "siglip_vision_model"), writers=("self_attn.out_proj", "mlp.fc2")),
    Family(("dinov2", "dinov3_vit"), output_norms=("layer_scale1", "layer_scale2")),
    Family(
        (
            *("bert", "distilbert", "electra", "deberta", "deberta-v2", "fnet", "convbert", "mobilebert", "roformer"),
            *("rembert", "big_bird", "nomic_bert", "longformer", "openai-gpt"),
        ),
        post_norm=True,
    ),
    Family(("roberta", "xlm-roberta", "camembert"), post_norm=True, positions_after_padding=True),
    Family(("mpnet", "xlnet", "layoutlm"), post_norm=True),
    Family(("roberta-prelayernorm",), writers=("attention.output.dense", "output.dense"), positions_after_padding=True),
    Family(("xlm-roberta-xl",), positions_after_padding=True),
    Family(("flint", "qwen3_omni_moe_text"), block_index_lists=_DENSE),
    Family(("qwen3_vl_text",), writers=_GATED_MLP, fed_blocks=_deepstack_blocks),
    Family(
        ("qwen3_vl_moe_text",),
        writers=_MIXED,
        block_index_lists=_DENSE,
        spell_out=_list_dense_blocks,
        fed_blocks=_deepstack_blocks,
    ),
    Family(("granite_docling", "cohere_compass", "cohere_compass_text"), fed_blocks=_deepstack_blocks),
    Family(("granite4_vision_text", "granite4_vision"), fed_blocks=_spatially_fed_blocks),
    Family(
        ("gemma3n_text",),
        per_block_lists=("kv_sharing_modes", "activation_sparsity_pattern"),
        obstacle="each block has an embedding of its own, and upper blocks take keys and values of lower ones",
    ),
    Family(("gemma4_text", "gemma4_unified_text", "mistral_large4_text"), per_block_lists=("kv_sharing_modes",)),
    Family(
        ("minimax",),
        obstacle="how fast its attention forgets follows from the index of the block and the number of blocks",
    ),
    Family(("albert",), obstacle="its blocks share their weights"),
    Family(("step3p5",), per_block_lists=("swiglu_limits", "swiglu_limits_shared")),
):
    register_family(_family)
