"""What adaptations have in common whose units of allocation are blocks."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from fedbe.adaptation.base import Adaptation
from fedbe.expansion import head_parameter_names

HEAD = "head"


class BlockUnits(Adaptation):
    """Base class: the units are blocks, and a new task head where there is one."""

    _units: Mapping[str, tuple[str, ...]] = {}

    @property
    def trainable_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of the blocks, and of a new task head."""
        return tuple(name for names in self._units.values() for name in names)

    @property
    def dialled_names(self) -> tuple[str, ...]:
        """Exact names of the parameters of the blocks."""
        return tuple(name for unit, names in self._units.items() if unit != HEAD for name in names)

    def units(self) -> dict[str, tuple[str, ...]]:
        """Return each block, ``block_<label>``, from the lowest to the highest, and the head."""
        return dict(self._units)

    def _set_units(self, model: PreTrainedModel, blocks: Mapping[str, tuple[str, ...]]) -> None:
        """Take these blocks, label → parameter names, as units, and the model's head."""
        head = head_parameter_names(model)
        self._units = {f"block_{label}": names for label, names in blocks.items()} | ({HEAD: head} if head else {})
