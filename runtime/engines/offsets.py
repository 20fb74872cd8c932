"""Tells int8 graphs made for CPUs from those that TensorRT compiles, without the package onnx."""

from __future__ import annotations

from collections.abc import Iterator

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.graphs import OUTPUTS

__all__ = ["OFFSETS_FIX", "OFFSETS_PROBLEM", "has_offsets"]

OFFSETS_PROBLEM = "was made in int8 for CPUs, which TensorRT does not compile"
OFFSETS_FIX = (
    "compile what `darcnn-export bundle` makes of it, which is float32, "
    "or run this one with --backend onnxruntime"
)

# Numbers of fields and types in onnx.proto (onnx/onnx.proto3 of the ONNX project).
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OP_TYPE = _NODE_NAMES = 1, 4
_TENSOR_DATA_TYPE, _TENSOR_NAME = 2, 8
_UINT8, _INT32 = 2, 6  # of a zero point with an offset, and of a bias in steps of two scales
_QUANTISING = frozenset({b"QuantizeLinear", b"DequantizeLinear"})

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf


def has_offsets(bundle: Bundle) -> bool:
    """Tell whether a graph quantises with offsets, uint8 zero points or int32 biases.

    What is no graph has none: whoever compiles it will say what it is.
    """
    return any(_graph_has_offsets(memoryview(bundle.read(f"{graph}.onnx"))) for graph in OUTPUTS)


def _graph_has_offsets(model: memoryview) -> bool:
    types: dict[bytes, int] = {}
    used: set[bytes] = set()
    try:
        for part, content in _all(model, _MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER):
            if part == _GRAPH_INITIALIZER:
                fields = dict(_fields(content))
                types[bytes(_view(fields[_TENSOR_NAME]))] = _number(fields[_TENSOR_DATA_TYPE])
            else:
                used.update(_quantised_inputs(content))
    except (IndexError, KeyError, ValueError):
        return False
    return any(types.get(name) in (_UINT8, _INT32) for name in used)


def _all(model: memoryview, outer: int, *inner: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the fields `inner` of every field `outer` of `model`."""
    for number, value in _fields(model):
        if number == outer:
            for part, content in _fields(_view(value)):
                if part in inner:
                    yield part, _view(content)


def _quantised_inputs(node: memoryview) -> list[bytes]:
    names = [(number, bytes(_view(value))) for number, value in _fields(node) if number in _NODE_NAMES]
    if not any(number == _NODE_OP_TYPE and name in _QUANTISING for number, name in names):
        return []
    return [name for number, name in names if number == _NODE_INPUT]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a protobuf message.

    >>> [(number, bytes(value)) for number, value in _fields(memoryview(bytes([0x22, 2, 65, 66])))]
    [(4, b'AB')]
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        else:
            size = {_FIXED64: 8, _FIXED32: 4}[kind]
        yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number of variable length at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):  # ten bytes hold 64 bits
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number has more than 64 bits")


def _view(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes are due")
    return value


def _number(value: int | memoryview) -> int:
    if isinstance(value, int):
        return value
    raise ValueError("bytes stand where a number is due")
