"""Names of tensors with the owner in front, as they stand in a file: ``owner/name``."""

from collections.abc import Mapping

from torch import Tensor


def prefixed(owner: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with ``owner/`` before each name."""
    return {f"{owner}/{name}": tensor for name, tensor in tensors.items()}


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return owner → name → tensor, undoing `prefixed`; the owner is what stands before the first slash."""
    owners: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.partition("/")
        owners.setdefault(owner, {})[name] = tensor
    return owners
