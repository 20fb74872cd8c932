"""Tells int8 graphs made for CPUs from those that TensorRT compiles, without the package onnx."""

from __future__ import annotations

from collections.abc import Iterator

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.graphs import OUTPUTS
from darcnn.runtime.onnx_fields import as_bytes, as_number, read_fields

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
                fields = dict(read_fields(content))
                types[bytes(as_bytes(fields[_TENSOR_NAME]))] = as_number(fields[_TENSOR_DATA_TYPE])
            else:
                used.update(_quantised_inputs(content))
    except (KeyError, ValueError):
        return False
    return any(types.get(name) in (_UINT8, _INT32) for name in used)


def _all(model: memoryview, outer: int, *inner: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the fields `inner` of every field `outer` of `model`."""
    for number, value in read_fields(model):
        if number == outer:
            for part, content in read_fields(as_bytes(value)):
                if part in inner:
                    yield part, as_bytes(content)


def _quantised_inputs(node: memoryview) -> list[bytes]:
    names = [(number, bytes(as_bytes(value))) for number, value in read_fields(node) if number in _NODE_NAMES]
    if not any(number == _NODE_OP_TYPE and name in _QUANTISING for number, name in names):
        return []
    return [name for number, name in names if number == _NODE_INPUT]
