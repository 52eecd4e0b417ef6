"""What algorithms that train whole blocks have in common."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from fedbe.algorithms.base import Algorithm
from fedbe.expansion import head_parameter_names


class BlockAlgorithm(Algorithm):
    """Base class of algorithms whose units are blocks, and a new task head where there is one."""

    _units: Mapping[str, tuple[str, ...]] = {}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of the blocks, and of a new task head."""
        return tuple(name for names in self._units.values() for name in names)

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of the blocks."""
        return tuple(name for unit, names in self._units.items() if unit != "head" for name in names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return each block, from the lowest to the highest, and the head."""
        return dict(self._units)

    def _set_units(
        self, model: PreTrainedModel, blocks: Mapping[int, tuple[str, ...]] | Mapping[str, tuple[str, ...]]
    ) -> None:
        head = head_parameter_names(model)
        self._units = {f"block_{index}": names for index, names in blocks.items()} | ({"head": head} if head else {})
