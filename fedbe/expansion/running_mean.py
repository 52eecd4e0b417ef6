"""The mean over the tokens so far, also where they come one at a time and a cache holds the earlier ones."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

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


@dataclass(frozen=True)
class Earlier:
    """What came before the tokens of a pass.

    Attributes:
        cache: A key-value cache; that of a recurrent block is its state.
        sums: Its layer of sums.
        block: The uppermost block that has put the new tokens into the cache already.
    """

    cache: Cache
    sums: RunningSums
    block: int

    def extend(self, counts: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """See `RunningSums.extend`.

        Raises:
            ExpansionError: If the cache holds tokens whose sums are missing.
        """
        counts, sums = self.sums.extend(counts, sums)
        seen = self.sums.get_seq_length()
        if not self._holds(seen, seen - sums.shape[1]):
            raise ExpansionError(
                "The key-value cache holds tokens that the gate has not seen, from a pass in another mode or without "
                "it: begin with an empty cache."
            )
        return counts, sums

    def _holds(self, after: int, before: int) -> bool:
        """Whether the cache holds as many tokens as were seen; recurrent blocks know whether there were any."""
        layers = [(i, layer) for i, layer in enumerate(self.cache.layers) if layer is not self.sums]
        for index, layer in layers:
            if isinstance(layer, CacheLayerMixin):
                return int(layer.get_seq_length()) == (after if index <= self.block else before)
        states = [x for i, x in layers if i > self.block and isinstance(x, LinearAttentionCacheLayerMixin)]
        return not states or states[0].has_previous_state[0] == (before > 0)


def mean_so_far(values: Tensor, mask: Tensor, causal: bool, earlier: Earlier | None = None) -> Tensor:
    """Return the mean over the tokens up to each position, zero before the first.

    Args:
        values: Shape [batch, sequence, features].
        mask: Shape [batch, sequence], False for padding.
        causal: Whether the mean ends at each position; otherwise it is that of the whole sequence.
        earlier: The tokens before these; then there is one feature.

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
        counts, sums = earlier.extend(counts, sums)
    return sums / counts.clamp(min=1)


def earlier_in(cache: Cache | None, depth: int, block: int) -> Earlier | None:
    """Return what a cache holds, with a layer of sums, which is put behind those of the blocks when it is missing."""
    if cache is None:
        return None
    for layer in cache.layers:
        if isinstance(layer, RunningSums):
            return Earlier(cache, layer, block)
    if cache.layer_class_to_replicate is not None:
        # Such a cache makes a block's layer when the block is reached, and would take this one for it.
        cache.layers += [cache.layer_class_to_replicate() for _ in range(depth - len(cache.layers))]
    sums = RunningSums()  # type: ignore[no-untyped-call]
    cache.layers.append(sums)
    return Earlier(cache, sums, block)
