"""The dial of a finished run."""

from fedbe.traits import Trait, Traits

NEEDS: Traits = frozenset({Trait.GLOBAL_MODEL, Trait.AGGREGATION})
"""What must hold in a run so that a part of what it trained can be taken."""
