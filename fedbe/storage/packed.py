"""A JSON value and tensors as bytes that are a safetensors file, read from whoever sent them without trusting them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedbe.errors import MessageError
from fedbe.storage.checkpoint import raw

MOST_BYTES = 2**35
"""Most bytes that are read at all where nobody says otherwise: 32 GiB."""

MOST_HEADER_BYTES = 2**24
"""Most bytes of names, shapes and the JSON value: 16 MiB."""

MOST_TENSORS = 2**16
"""Most tensors."""

MOST_DIMENSIONS = 16
"""Most dimensions of a tensor."""

_VALUE = "fedbe"
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies, and what it is.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its shape.
        begin: Its first byte, counted from the end of the header.
        end: The byte after its last.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def pack(value: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """Return a JSON value and tensors as bytes, which any reader of safetensors files reads, too.

    Args:
        value: A plain JSON value; NaN and infinities may be in it.
        tensors: By name, of any shape, on any device; `unpack` returns them in the same order.

    Raises:
        MessageError: A value or a tensor cannot be written, or there is more than `unpack` reads.
    """
    # Larger elements first, so that each tensor begins at a multiple of its element's size.
    places, end = {}, 0
    for name in sorted(tensors, key=lambda name: -tensors[name].element_size()):
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        places[name] = [begin, end]
    header = {_METADATA: {_VALUE: _text(value)}} | {
        name: {"dtype": _dtype_name(name, tensor), "shape": list(tensor.shape), "data_offsets": places[name]}
        for name, tensor in tensors.items()
    }
    text = _text(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MOST_HEADER_BYTES or len(tensors) > MOST_TENSORS:
        raise MessageError(f"{len(tensors)} tensors with {len(text)} bytes of names are more than one message holds")
    return b"".join([len(text).to_bytes(8, "little"), text, *(raw(tensors[name]) for name in places)])


def unpack(data: bytes | bytearray | memoryview, most_bytes: int = MOST_BYTES) -> tuple[Any, dict[str, Tensor]]:
    """Return what `pack` got; every size is checked before anything of that size is made, and nothing is executed.

    Args:
        data: The bytes.
        most_bytes: How many there may be.

    Raises:
        MessageError: The bytes are no result of `pack`.
    """
    view = memoryview(data).cast("B")
    if not 8 <= len(view) <= most_bytes:
        raise MessageError(f"a message of {len(view)} bytes: there may be 8 to {most_bytes}")
    size = int.from_bytes(view[:8], "little")
    if size > min(MOST_HEADER_BYTES, len(view) - 8):
        raise MessageError(f"a header of {size} bytes, in {len(view)} bytes")
    header, content = _json(bytes(view[8 : 8 + size])), view[8 + size :]
    if not isinstance(header, dict) or len(header) > MOST_TENSORS + 1:
        raise MessageError("a header that is no JSON object, or names too many tensors")
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict) or metadata.keys() != {_VALUE} or not isinstance(metadata[_VALUE], str):
        raise MessageError("no message of fedbe in the header")
    places = [_place(name, entry) for name, entry in header.items()]
    _check_places(places, len(content))
    return _json(metadata[_VALUE].encode()), {place.name: _tensor(place, content) for place in places}


def _dtype_name(name: str, tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _NAMES:
        raise MessageError(f"{name!r} is a tensor that cannot travel ({tensor.dtype}, {tensor.layout})")
    if tensor.dim() > MOST_DIMENSIONS:
        raise MessageError(f"{name!r} has {tensor.dim()} dimensions, more than {MOST_DIMENSIONS}")
    return _NAMES[tensor.dtype]


def _text(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:  # a lone surrogate is a ValueError, too
        raise MessageError(f"a value that is not plain JSON: {error}") from error
    return text


def _json(text: bytes) -> Any:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object)
        if _SURROGATE.search(text.decode()):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise MessageError(f"no JSON: {str(error)[:200]}") from error
    return value


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _place(name: str, entry: Any) -> _Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MessageError(f"{name!r} is not described as a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MessageError(f"{name!r} has the unknown type {str(dtype)[:40]!r}")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or not _sizes(offsets) or len(offsets) != 2:
        raise MessageError(f"{name!r} has no possible shape or place")
    size = _DTYPES[dtype].itemsize
    if math.prod(shape) * size != offsets[1] - offsets[0]:
        raise MessageError(f"{name!r} has a shape that does not fit its {offsets[1] - offsets[0]} bytes")
    if math.prod(max(1, length) for length in shape) * size >= 2**62:  # in a shape with a 0, which takes no bytes
        raise MessageError(f"{name!r} has an impossible shape")
    return _Place(name, _DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_places(places: Iterable[_Place], size: int) -> None:
    """Refuse tensors that overlap, leave gaps or do not end where the content ends."""
    end = 0
    for place in sorted(places, key=lambda place: (place.begin, place.end)):
        if place.begin != end:
            raise MessageError(f"{place.name!r} does not begin where the tensor before it ends")
        end = place.end
    if end != size:
        raise MessageError(f"tensors of {end} bytes, in {size} bytes")


def _tensor(place: _Place, content: memoryview) -> Tensor:
    tensor = torch.empty(place.shape, dtype=place.dtype)
    values = np.frombuffer(content[place.begin : place.end], np.uint8)
    if place.dtype == torch.bool and values.size and values.max() > 1:
        raise MessageError(f"{place.name!r} has truth values that are neither")
    if values.size:
        tensor.reshape(-1).view(torch.uint8).numpy()[:] = values
    return tensor
