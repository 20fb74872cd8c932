"""Reads files in ONNX field by field of their protobuf, without the package onnx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["as_bytes", "as_number", "keeps_weights_elsewhere", "read_fields"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protobuf; graphs have no groups, 3 and 4
_SIZES = {_FIXED64: 8, _FIXED32: 4}
_MAX_NUMBER = 2**29 - 1  # of a field: parsers take the lowest bits of a larger one for another field

# The ways from a model to its tensors, of messages nested at any depth: message -> field -> message
# (numbers of fields in onnx/onnx.proto of the ONNX project).
_WAYS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor",
        6: "graph",
        10: "tensor",
        11: "graph",
        22: "sparse tensor",
        23: "sparse tensor",
    },
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor: where its values lie, and whether in another file


def keeps_weights_elsewhere(model: bytes) -> bool:
    """Tell whether a tensor of `model`, a file in ONNX, lies in another file.

    Raises:
        ValueError: it may, and it is no file in ONNX.
    """
    if b"location" not in model:  # no file is named without this word: most graphs need not be walked
        return False
    todo = [("model", memoryview(model))]
    while todo:
        kind, message = todo.pop()
        for number, value in read_fields(message):
            if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value)):
                return True
            if number in _WAYS[kind]:
                todo.append((_WAYS[kind][number], as_bytes(value)))
    return False


def read_fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field of a protobuf message.

    Raises:
        ValueError: it is none.

    >>> [(number, bytes(value)) for number, value in read_fields(memoryview(bytes([0x22, 2, 65, 66])))]
    [(4, b'AB')]
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number > _MAX_NUMBER or kind not in (_VARINT, _BYTES, *_SIZES):
            raise ValueError(f"it has a field {number} of type {kind}")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        size, at = _varint(message, at) if kind == _BYTES else (_SIZES[kind], at)
        if size > len(message) - at:
            raise ValueError("it is cut short")
        yield number, message[at : at + size]
        at += size


def as_bytes(value: int | memoryview) -> memoryview:
    """Return what a field holds that is no number.

    Raises:
        ValueError: it is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number stands where bytes are due")
    return value


def as_number(value: int | memoryview) -> int:
    """Return the number that a field holds.

    Raises:
        ValueError: it holds none.
    """
    if isinstance(value, int):
        return value
    raise ValueError("bytes stand where a number is due")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number of variable length at `at`, and where it ends."""
    value = 0
    for n, byte in enumerate(message[at : at + 10]):  # ten bytes hold 64 bits
        value |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return value, at + n + 1
    raise ValueError("it is cut short, or a number has more than 64 bits")
