"""FFA-LoRA: A is frozen and the same for all, so that averaging B is exact and half as much travels."""

from fedbe.algorithms.lora.base import LoRA


class FFALoRA(LoRA):
    """Freeze A where it starts and train B alone: B ← Σ p_k B_k, so that B̄A = Σ p_k B_k A.

    A is drawn from the run's seed, which server and clients share: it never travels. All clients have one rank.

    Source: FFA-LoRA (arXiv 2403.12313) (C).
    """

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of all B, and of a new task head."""
        return (*(adapter.b for adapter in self.adapters), *self._head)
