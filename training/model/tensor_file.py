"""Tensors in files of other programs, read without running what else such a file may hold.

A pickle is a program. This module is the only place where one is read, by an unpickler that knows a handful
of names and builds arrays itself.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from darcnn.runtime.errors import InputError

__all__ = ["read_tensors"]

_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
# What a damaged file makes an unpickler raise; the list is open, say the documents of both.
_DAMAGE = (
    UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    RuntimeError,
    OSError,  # torch seeks to where something should be
)
_FIX = "give a checkpoint (.pkl or .pth) that detectron2 wrote"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the checkpoint `path` by name; those under "model" where it has that entry.

    A `.pkl` holds NumPy arrays, any other file is one of `torch.save`.

    Raises:
        InputError: the file cannot be read, is damaged, holds no tensors or anything that could run.
    """
    try:
        file = path.open("rb")
    except OSError as err:
        raise InputError(err.strerror or str(err), where=path, fix="give the path of a checkpoint") from err
    with file:
        try:
            content = _ArrayUnpickler(file, path).load() if path.suffix == ".pkl" else _read_torch(file, path)
        except _DAMAGE as err:
            problem = f"is damaged or no checkpoint ({type(err).__name__})"
            raise InputError(problem, where=path, fix=_FIX) from err
    model = content.get("model", content) if isinstance(content, Mapping) else {}
    items = model.items() if isinstance(model, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(value, (Tensor, _Array))}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError("holds no named tensors", where=path, fix=_FIX)
    return {name: v if isinstance(v, Tensor) else v.tensor() for name, v in tensors.items()}


def _read_torch(file: IO[bytes], path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError:
        file.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if not names:
            raise
        raise _forbidden(path, min(names)) from None


def _forbidden(path: Path, name: str) -> InputError:
    return InputError(f"holds {name!r}, which could run as a program", where=path, fix="give only tensors")


class _ArrayUnpickler(Unpickler):
    """Reads dicts, lists, text, numbers and arrays; every name that these do not need is refused.

    A pickle may call what `find_class` returns, with any arguments, and set attributes on it. So it gets
    methods of this object, which make `_Kind`, `_Array` and bytes, but nothing of NumPy.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="latin1")  # text of Python 2 is bytes
        self._path = path

    def find_class(self, module: str, name: str, /) -> Any:
        known = {
            "collections.OrderedDict": OrderedDict,
            "_codecs.encode": self._encode,
            "numpy.dtype": self._kind,
            "numpy.ndarray": "numpy.ndarray",  # an argument of the next
            "numpy.core.multiarray._reconstruct": self._array,
            "numpy._core.multiarray._reconstruct": self._array,
            "numpy.core.numeric._frombuffer": self._array_of,
            "numpy._core.numeric._frombuffer": self._array_of,
        }
        full_name = f"{module}.{name}"
        if full_name not in known:
            raise _forbidden(self._path, full_name)
        return known[full_name]

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _forbidden(self._path, f"_codecs.encode({encoding})")
        return text.encode("latin1")

    def _kind(self, code: str, *_: object) -> _Kind:
        if code not in _NUMBERS:
            raise _forbidden(self._path, f"numpy.dtype({code})")
        return _Kind(code)

    def _array(self, *_: object) -> _Array:
        return _Array()

    def _array_of(self, content: bytes, kind: _Kind, shape: tuple[int, ...], order: str) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, kind, order == "F", content))
        return array


class _Kind:
    """A NumPy number type in the making: byte order follows."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array in the making: shape, type and content follow."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        raw = content.encode("latin1") if isinstance(content, str) else content
        values = np.frombuffer(raw, kind.dtype)
        self.values = values.reshape(shape, order="F" if is_fortran else "C")

    def tensor(self) -> Tensor:
        """Return the content, in the byte order of this machine."""
        return torch.from_numpy(np.array(self.values, self.values.dtype.newbyteorder("="), order="C"))
