"""Tensors into and out of the resident model, by exact parameter name."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fedbe.modeling.index import ModelIndex


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into the model's parameters of these exact names; the parameters stay the same objects."""
    ModelIndex(model).load(tensors)


def copy_tensors(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the model's parameters of these exact names."""
    return ModelIndex(model).copy(names)


def parameters_of(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of these exact names, in one pass over the model: hundreds one by one take milliseconds.

    Raises:
        AttributeError: There is none of a name.
    """
    return ModelIndex(model).parameters(names)
