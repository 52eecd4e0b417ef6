"""Whether a model keeps packed documents apart by their positions alone."""

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedbe.modeling.families import family_of
from fedbe.modeling.passes import evaluation_mode


def family_separates_documents(config: PretrainedConfig | None) -> bool:
    """Return whether this model family is known to keep documents apart when positions restart at each.

    It does so only when called without a key-value cache: with ``use_cache=False``.
    """
    return config is not None and family_of(config).separates_documents


def separates_documents(model: PreTrainedModel, tolerance: float = 1e-4) -> bool:
    """Return whether this very model computes the same for a document packed after another as for it alone.

    Args:
        model: A causal language model, in float32; it is left in the mode it was in.
        tolerance: Largest difference of logits that counts as equal.
    """
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=model.device)
    with evaluation_mode(model, inference=False), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        parts = [model(input_ids=part, use_cache=False).logits for part in (ids[:, :3], ids[:, 3:])]
    return torch.allclose(packed, torch.cat(parts, dim=1), atol=tolerance, rtol=tolerance)
