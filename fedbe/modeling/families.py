"""What is known of the families of architectures: one description each, a user's own among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

DEPTH_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""How the depth is called in configurations and modules of any family."""

INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num", "block_idx")
"""How a block's own index is called in the modules of any family."""


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
        writers: Paths inside a block of the projections that write into the residual stream.
        post_norm: Whether there are blocks that end in a norm of the residual stream, LN(x + …).
        depth_names: How its depth is called where that is none of `DEPTH_NAMES`.
        index_names: How a block's own index is called where that is none of `INDEX_NAMES`.
        per_block_lists: Names of lists with one entry per block; those with "layer" in their name are found without.
        block_index_lists: Names of lists that hold the indices of some blocks.
        settle: Makes agree what a configuration holds of its blocks a second time, after they were rearranged.
        positions_after_padding: Whether positions are counted from behind the padding id.
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
    settle: Callable[[PreTrainedConfig], None] | None = None
    positions_after_padding: bool = False


_registered: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known, in place of what was known of its model types.

    Call it where the run imports it: in the file of your own algorithm, data module or model.
    """
    for model_type in family.model_types:
        _registered[model_type] = family


def family_of(config: PreTrainedConfig) -> Family:
    """Return what is known of a model's family, by its (text) configuration."""
    return family_named(str(config.get_text_config().model_type))


def family_named(model_type: str) -> Family:
    """Return what is known of the family of a ``model_type``: nothing beyond the conventions if nobody described it."""
    return _registered.get(model_type) or Family((model_type,))


def stated_depth(config: PreTrainedConfig) -> int | None:
    """Return the number of blocks that a (text) configuration states; ``None`` if it states none."""
    config = config.get_text_config()
    values = (getattr(config, name, None) for name in (*family_of(config).depth_names, *DEPTH_NAMES))
    return next((value for value in values if isinstance(value, int)), None)


def known_families() -> Iterator[Family]:
    """Yield every registered family once, in the order of registration."""
    yield from dict.fromkeys(_registered.values())


def _write_attention_types(config: PreTrainedConfig) -> None:
    # GPT-Neo builds its list of attention kinds from this compressed form when a checkpoint is loaded.
    config.attention_types = [[list(config.attention_layers), 1]]


_GATED_MLP = ("self_attn.o_proj", "mlp.down_proj")
_EXPERTS = ("self_attn.o_proj", "mlp.experts.down_proj")
_SHARED_EXPERTS = (*_EXPERTS, "mlp.shared_expert.down_proj")
_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_DENSE = ("mlp_only_layers",)

for _family in (
    Family(
        ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo", "gemma", "granite", "stablelm", "cohere2"),
        writers=_GATED_MLP,
    ),
    Family(("mixtral",), writers=_EXPERTS),
    Family(("qwen3_moe",), writers=_EXPERTS, block_index_lists=_DENSE),
    Family(("qwen2_moe",), writers=_SHARED_EXPERTS, block_index_lists=_DENSE),
    Family(("gemma2", "gemma3_text"), output_norms=_NORMS, norm_offset=1.0),
    Family(("olmo2", "olmo3"), output_norms=_NORMS),
    Family(("exaone4",), output_norms=_NORMS),
    Family(("glm4",), output_norms=("post_self_attn_layernorm", "post_mlp_layernorm")),
    Family(("phi",), writers=("self_attn.dense", "mlp.fc2")),
    Family(("starcoder2",), writers=("self_attn.o_proj", "mlp.c_proj")),
    Family(("gpt2",), writers=("attn.c_proj", "mlp.c_proj")),
    Family(("gpt_neo",), writers=("attn.attention.out_proj", "mlp.c_proj"), settle=_write_attention_types),
    Family(("gptj",), writers=("attn.out_proj", "mlp.fc_out")),
    Family(("gpt_neox",), writers=("attention.dense", "mlp.dense_4h_to_h")),
    Family(("falcon", "bloom"), writers=("self_attention.dense", "mlp.dense_4h_to_h")),
    Family(("opt",), writers=("self_attn.out_proj", "fc2"), post_norm=True),
    Family(("vit",), writers=("attention.o_proj", "mlp.fc2")),
    Family(("dinov2",), output_norms=("layer_scale1", "layer_scale2")),
    Family(("bert", "distilbert", "electra"), post_norm=True),
    Family(("roberta",), post_norm=True, positions_after_padding=True),
    Family(("xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm"), positions_after_padding=True),
    Family(("flint", "qwen3_next", "qwen3_omni_moe_text", "qwen3_vl_moe_text"), block_index_lists=_DENSE),
    Family(("gemma3n_text",), per_block_lists=("kv_sharing_modes", "activation_sparsity_pattern")),
    Family(("gemma4_text", "gemma4_unified_text", "mistral_large4_text"), per_block_lists=("kv_sharing_modes",)),
    Family(("step3p5",), per_block_lists=("swiglu_limits", "swiglu_limits_shared")),
):
    register_family(_family)
