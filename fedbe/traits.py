"""What the parts of a run need of each other, and what each leaves to the others: traits out of one enum."""

from __future__ import annotations

from enum import Enum


class Trait(Enum):
    """Something that holds in a run unless one of its parts rules it out; the value says what it is.

    A part says in `Part.needs` what must hold for it to make sense, and in `Part.offers` what still holds with it.
    `fedbe.config.rules.conflicts` refuses a run in which one part needs what another does not offer.
    """

    GLOBAL_MODEL = "one global model that all clients share"
    AGGREGATION = "clients whose training becomes part of the global model"
    LASTING_TENSORS = "trained tensors that last from round to round"
    PLAIN_MEAN = "the sample-weighted mean of what clients send"
    SERVER_SEES_UPDATES = "a server that sees each client's update"
    SERVER_SEES_REPORTS = "a server that acts on what clients report besides tensors"
    EQUAL_SHAPES = "tensors of the same shapes from every client"
    FIXED_STRUCTURE = "a model whose structure stays the same over the run"
    UNCHANGED_BASE = "base weights that nothing changes"
    COPIED_IN_AND_OUT = "clients whose start and end are copies of tensors and nothing else"
    SEVERAL_CLIENTS = "several clients that train in a round"
    SHARED_MEMORY = "clients in this process, whose rows and kept tensors it can see"
    SINGLE_CLIENT_STEPS = "local steps that belong to one client alone"


ALL = frozenset(Trait)
"""Every trait: what a part offers that rules nothing out."""

Traits = frozenset[Trait]


class Part:
    """Base class of what is configured by ``class_path``: by default it needs nothing and rules nothing out.

    Attributes:
        needs: What must hold in a run for this part to make sense.
        offers: What still holds in a run that has this part.
    """

    needs: Traits = frozenset()
    offers: Traits = ALL
