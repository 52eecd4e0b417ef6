"""Whether a model keeps packed documents apart by their positions alone."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

# Families whose causal mask is built from `position_ids`, and whose positions enter by nothing else. The tests verify
# each on a tiny model by `separates_documents`. OPT and Falcon, for example, do not hand the positions to the mask.
SEPARATING_FAMILIES = frozenset({
    "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite",
    "llama", "mistral", "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe",
    "smollm3", "stablelm", "starcoder2",
})  # fmt: skip


def family_separates_documents(config: PretrainedConfig | None) -> bool:
    """Return whether this model family is known to keep documents apart when positions restart at each.

    It does so only when called without a key-value cache: with ``use_cache=False``.
    """
    return config is not None and config.get_text_config().model_type in SEPARATING_FAMILIES


@torch.no_grad()
def separates_documents(model: PreTrainedModel, tolerance: float = 1e-4) -> bool:
    """Return whether this very model computes the same for a document packed after another as for it alone.

    Args:
        model: A causal language model, in float32; it is left in the mode it was in.
        tolerance: Largest difference of logits that counts as equal.
    """
    training = model.training
    model.train(False)
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=model.device)
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    parts = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :3], ids[:, 3:])]
    model.train(training)
    return torch.allclose(packed, torch.cat(parts, dim=1), atol=tolerance, rtol=tolerance)
