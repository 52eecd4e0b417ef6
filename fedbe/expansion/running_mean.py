"""The mean over the tokens so far, also where they come one at a time and a cache holds the earlier ones."""

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from fedbe.errors import ExpansionError


class RunningSums(DynamicLayer):  # type: ignore[no-untyped-call]
    """One more layer of a key-value cache, reordered, selected and cropped with the rest of it.

    Its keys are the number of tokens so far and its values their sum, both of shape [batch, 1, sequence, 1].
    """

    def extend(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return counts and sums [batch, sequence, 1] of new tokens with those of all earlier ones added; keep them."""
        if self.keys is not None and self.values is not None and self.get_seq_length() > 0:
            counts, sums = counts + self.keys[:, 0, -1:], sums + self.values[:, 0, -1:]
        self.update(counts[:, None], sums[:, None])
        return counts, sums


def mean_so_far(values: Tensor, mask: Tensor, causal: bool, earlier: tuple[Cache, RunningSums] | None = None) -> Tensor:
    """Return the mean over the tokens up to each position, zero before the first.

    Args:
        values: Shape [batch, sequence, features].
        mask: Shape [batch, sequence], False for padding.
        causal: Whether the mean ends at each position; otherwise it is that of the whole sequence.
        earlier: A key-value cache and its layer with the sums of the tokens before these; then there is one feature.

    Raises:
        ExpansionError: If the cache holds tokens whose sums are missing.

    Source: ours.
    """
    counts = mask[..., None].to(values.dtype)
    sums = values.masked_fill(~mask[..., None], 0)
    if not causal:
        return (sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)).expand_as(values)
    counts, sums = counts.cumsum(1), sums.cumsum(1)
    if earlier is not None:
        cache, layer = earlier
        counts, sums = layer.extend(counts, sums)
        if int(cache.get_seq_length()) != layer.get_seq_length():
            raise ExpansionError(
                "The key-value cache holds tokens that the gate has not seen, from a pass in another mode or without "
                "it: begin with an empty cache."
            )
    return sums / counts.clamp(min=1)


def sums_in(cache: Cache | None, depth: int) -> tuple[Cache, RunningSums] | None:
    """Return a cache and its layer of sums, which is put behind those of the blocks when it is missing."""
    if cache is None:
        return None
    for layer in cache.layers:
        if isinstance(layer, RunningSums):
            return cache, layer
    if cache.layer_class_to_replicate is not None:
        # Such a cache makes a block's layer when the block is reached, and would take this one for it.
        cache.layers += [cache.layer_class_to_replicate() for _ in range(depth - len(cache.layers))]
    sums = RunningSums()  # type: ignore[no-untyped-call]
    cache.layers.append(sums)
    return cache, sums
