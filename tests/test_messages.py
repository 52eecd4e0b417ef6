"""The codec: every message comes back as it was, to the bit, and whatever is no message is refused as such."""

import dataclasses
import json
import math
import struct
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbe.errors import FedBEError, MessageError
from fedbe.messages import (
    Evaluate,
    Evaluation,
    Failure,
    Farewell,
    FitTask,
    Greeting,
    Prepare,
    Prepared,
    Probe,
    ProbeReport,
    Update,
    decode,
    encode,
)
from fedbe.storage import packed
from fedbe.storage.packed import pack, unpack

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
          torch.float8_e5m2, torch.float8_e5m2fnuz]  # fmt: skip
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def same(first, second):
    """Equal to the bit, NaN to NaN, with the same types and names in the same order."""
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor) and (first.dtype, first.shape) == (second.dtype, second.shape)
        return bits(first) == bits(second)
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first) is type(second) and all(same(getattr(first, n), getattr(second, n)) for n in names)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float) and math.isnan(first):
        return isinstance(second, float) and math.isnan(second)
    return first == second and type(first) is type(second)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from([*FLOATS, *WHOLE, torch.bool]))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    content = draw(st.binary(min_size=(size := math.prod(shape) * dtype.itemsize), max_size=size))
    if dtype == torch.bool:
        return torch.tensor([byte % 2 == 1 for byte in content], dtype=torch.bool).reshape(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).clone().view(dtype).reshape(shape)


names = st.text(max_size=12)
whole = st.integers(-(2**70), 2**70)
numbers = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 5e-324])
by_name = st.dictionaries(names, tensors(), max_size=4)
plain = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
structures = st.dictionaries(names, plain, max_size=3)
tasks = st.builds(
    FitTask, names, whole, whole, by_name, st.lists(names, max_size=4).map(tuple), by_name, structures,
    st.none() | whole, st.none() | whole,
)  # fmt: skip
messages = st.one_of(
    tasks,
    st.builds(Update, names, by_name, whole, st.dictionaries(names, numbers, max_size=4), by_name, names),
    st.builds(Failure, names, st.sampled_from(["error", "timeout", "memory", "update"]), names, names),
    st.builds(
        ProbeReport, names, st.lists(numbers, max_size=4).map(tuple), whole,
        st.none() | st.lists(st.lists(numbers, max_size=3).map(tuple), max_size=3).map(tuple),
        st.none() | st.lists(whole, max_size=4).map(tuple), names,
    ),
    st.builds(Evaluate, tasks, st.sampled_from(["validation", "test"])),
    st.builds(Evaluation, names, numbers, numbers, whole, names),
    st.builds(Greeting, names, whole, names),
    st.builds(Probe, names),
    st.builds(Prepare, names, structures),
    st.builds(Prepared, names, names),
    st.builds(Farewell, names),
)  # fmt: skip


@given(messages)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_message_comes_back_as_it_was(message):
    assert same(decode(encode(message)), message)


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_every_type_and_shape_of_tensor_comes_back(dtype, shape):
    tensor = (torch.arange(math.prod(shape)).reshape(shape) % 2).to(dtype)
    found = decode(encode(Update("a", {"weight": tensor}, 1)))
    assert same(found.tensors["weight"], tensor)


def test_what_comes_back_is_of_its_own_memory_and_can_be_written():
    data = encode(Update("a", {"x": torch.zeros(3, dtype=torch.float16), "y": torch.ones(5)}, 1))
    found = decode(data)
    assert found.tensors["y"].data_ptr() % 64 == 0  # some kernels round by alignment
    found.tensors["x"].add_(1)
    assert same(decode(data).tensors["x"], torch.zeros(3, dtype=torch.float16))


def test_views_and_parameters_travel_as_their_values():
    base = torch.arange(12.0).reshape(3, 4)
    sent = {"column": base[:, 1], "expanded": torch.ones(1).expand(4), "trained": torch.nn.Parameter(base)}
    found = decode(encode(Update("a", sent, 1))).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in sent.items())
    assert not found["trained"].requires_grad


@given(messages)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_reader_of_safetensors_reads_a_message(message):
    expected, found = unpack(encode(message))[1], safetensors.torch.load(encode(message))
    assert found.keys() == expected.keys() and all(same(found[name], tensor) for name, tensor in expected.items())


@given(messages, st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_changed_bytes_are_a_message_or_are_refused(message, data):
    changed = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(start, min(len(changed), start + 9)))
        changed[start:end] = data.draw(st.binary(max_size=9) | st.sampled_from(GARBAGE))
    decoded_or_refused(bytes(changed))


GARBAGE = [b"NaN", b"null", b"-1", b"1e999", b"true", b'"a"', b"[]", b"{}", b"\\ud800", b"[" * 9, b"]" * 9, b'"', b"0",
           b"18446744073709551616", b"\xff" * 8, b"\x00" * 8]  # fmt: skip


@given(st.binary(max_size=64))
@settings(deadline=None)
def test_any_bytes_are_a_message_or_are_refused(data):
    decoded_or_refused(data)
    decoded_or_refused(struct.pack("<Q", len(data)) + data)


def decoded_or_refused(data):
    try:
        decode(data)
    except MessageError as error:
        assert isinstance(error, FedBEError) and str(error)


def header_of(message):
    data = encode(message)
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, content):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


UPDATE = Update("a", {"w": torch.arange(4.0), "b": torch.ones(2)}, 3, {"loss": math.nan})
TENSOR = "tensors/w"


def tensor_with(**changes):
    def change(header):
        header[TENSOR] |= changes

    return change


def value_with(**changes):
    def change(header):
        value = json.loads(header["__metadata__"]["fedbe"]) | changes
        header["__metadata__"]["fedbe"] = json.dumps({k: v for k, v in value.items() if v is not ...})

    return change


def moved(header):
    header["tensors/v"] = header.pop(TENSOR) | {"shape": [2, 2]}
    header["others/w"] = header.pop("tensors/v")


CHANGES = {
    "type": tensor_with(dtype="F128"),
    "type of another size": tensor_with(dtype="F16"),
    "type that is none": tensor_with(dtype=[]),
    "shape of another size": tensor_with(shape=[5]),
    "negative shape": tensor_with(shape=[-2, -2]),
    "shape that is none": tensor_with(shape="4"),
    "shape of truth values": tensor_with(shape=[True, 4]),
    "huge shape of nothing": tensor_with(shape=[0, 2**62], data_offsets=[0, 0]),
    "huge shape": tensor_with(shape=[2**40, 2**40], data_offsets=[0, 2**82]),
    "many dimensions": tensor_with(shape=[1] * 30 + [4]),
    "place outside": tensor_with(data_offsets=[800, 816]),
    "place backwards": tensor_with(data_offsets=[16, 0]),
    "place that is none": tensor_with(data_offsets=[0]),
    "overlap": tensor_with(data_offsets=[8, 24]),
    "more about a tensor": tensor_with(more=1),
    "no tensor": lambda header: header.update({TENSOR: 3}),
    "a gap": lambda header: header.pop(TENSOR),
    "another part": moved,
    "no metadata": lambda header: header.pop("__metadata__"),
    "more metadata": lambda header: header["__metadata__"].update(more="x"),
    "metadata that is no text": lambda header: header.update(__metadata__={"fedbe": 3}),
    "value that is no JSON": lambda header: header.update(__metadata__={"fedbe": "{"}),
    "value that is no object": lambda header: header.update(__metadata__={"fedbe": "[]"}),
    "deep value": lambda header: header.update(__metadata__={"fedbe": "[" * 100_000}),
    "unknown kind": value_with(message="Order"),
    "kind that is no text": value_with(message=[]),
    "other kind": value_with(message="Greeting"),
    "missing field": value_with(samples=...),
    "unknown field": value_with(more=1),
    "text for a number": value_with(samples="3"),
    "truth value for a number": value_with(samples=True),
    "fraction for a whole number": value_with(samples=3.0),
    "number for a text": value_with(client_id=3),
    "half a character": value_with(client_id="\ud800"),
    "metrics that are none": value_with(metrics=[1]),
    "a metric that is none": value_with(metrics={"loss": "low"}),
    "a metric that is too large": value_with(metrics={"loss": 10**400}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_malformed_message_is_refused(what):
    header, content = header_of(UPDATE)
    assert isinstance(decode(with_header(header, content)), Update)
    CHANGES[what](header)
    with pytest.raises(MessageError):
        decode(with_header(header, content))


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", bytes(8), b"\xff" * 8, b"\xff" * 64, with_header(b"\xff\xfe", b""), with_header(b"[]", b""),
     with_header(b'{"a": 1, "a": 1}', b"")],
)  # fmt: skip
def test_bytes_that_begin_wrong_are_refused(data):
    with pytest.raises(MessageError):
        decode(data)


def test_a_name_that_stands_twice_is_refused():
    text = (
        json.dumps(header_of(UPDATE)[0])[:-1]
        + ', "tensors/w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    )
    with pytest.raises(MessageError, match="twice"):
        decode(with_header(text.encode(), header_of(UPDATE)[1]))


def test_a_truncated_message_is_refused_wherever_it_ends():
    data = encode(UPDATE)
    for end in range(len(data)):
        with pytest.raises(MessageError):
            decode(data[:end])
    with pytest.raises(MessageError):
        decode(data + b"\x00")


def test_truth_values_that_are_neither_are_refused():
    data = bytearray(encode(Update("a", {"mask": torch.ones(1, dtype=torch.bool)}, 1)))
    data[-1] = 2
    with pytest.raises(MessageError, match="neither"):
        decode(data)


def test_sizes_are_bounded_before_anything_is_made(monkeypatch):
    data = encode(UPDATE)
    with pytest.raises(MessageError, match="there may be"):
        decode(data, most_bytes=len(data) - 1)
    assert isinstance(decode(data, most_bytes=len(data)), Update)
    monkeypatch.setattr(torch, "empty", None)
    for name, limit in {"MOST_HEADER_BYTES": 50, "MOST_TENSORS": 1}.items():
        with monkeypatch.context() as patch:
            patch.setattr(packed, name, limit)
            with pytest.raises(MessageError):
                decode(data)
            with pytest.raises(MessageError):
                encode(UPDATE)
    header, content = header_of(UPDATE)
    header[TENSOR] |= {"shape": [2**50], "data_offsets": [0, 2**52]}
    with pytest.raises(MessageError):
        decode(with_header(header, content))


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.quint8)


def test_nothing_but_plain_tensors_and_values_can_be_sent():
    refused = {
        "complex": Update("a", {"w": torch.ones(1, dtype=torch.complex64)}, 1),
        "sparse": Update("a", {"w": torch.eye(2).to_sparse()}, 1),
        "meta": Update("a", {"w": torch.ones(1, device="meta")}, 1),
        "quantised": Update("a", {"w": quantised()}, 1),
        "no tensor": Update("a", {"w": 3.0}, 1),
        "no mapping": Update("a", None, 1),
        "a tensor for a number": Update("a", {}, 1, {"loss": torch.ones(())}),
        "half a character": Update("\ud800", {}, 1),
        "many dimensions": Update("a", {"w": torch.ones([1] * 20)}, 1),
        "no message": "update",
    }
    for what, message in refused.items():
        with pytest.raises(MessageError):
            encode(message)
            pytest.fail(what)


def test_a_value_and_tensors_alone_can_be_packed():
    value, tensors_ = unpack(pack([1, None, "é"], {"b": torch.ones(2, dtype=torch.int8), "a": torch.zeros(3)}))
    assert value == [1, None, "é"] and list(tensors_) == ["b", "a"]
