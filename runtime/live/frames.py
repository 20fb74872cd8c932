"""Frames of cameras, wherever they lie, as arrays of this process; buffers that are used again."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.engines.cuda import copy_to_host
from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import pixel_type

__all__ = ["BufferPool", "check_frame", "view_frame"]

_HOST_DEVICES = {1, 3}  # DLPack: the CPU's memory, and what CUDA pinned of it


def view_frame(frame: Any) -> tuple[NDArray[Any], bool]:
    """Return the frame as an array, and whether that is a copy already.

    NumPy arrays, and what offers DLPack, the buffer protocol, `__array__` or `__array_interface__` in host
    memory, are viewed without a copy. What lies on a GPU is copied to the host once: engines take tiles
    from there.

    Raises:
        InputError: it is no array, or lies where it cannot be fetched.
        DeviceError: CUDA failed to copy it.
    """
    if isinstance(frame, np.ma.MaskedArray):
        raise InputError("is a masked array", where="frame", fix="say what is hidden: frame.filled(0)")
    if isinstance(frame, np.ndarray):
        return np.asarray(frame), False
    if hasattr(frame, "__cuda_array_interface__"):
        return copy_to_host(frame.__cuda_array_interface__), True
    if hasattr(frame, "__dlpack__") and hasattr(frame, "__dlpack_device__"):
        return _from_dlpack(frame)
    if hasattr(frame, "__array_interface__") or hasattr(frame, "__array__"):
        return np.asarray(frame), False
    with contextlib.suppress(TypeError):  # no buffer
        return np.asarray(memoryview(frame)), False
    raise InputError(
        f"is of type {type(frame).__name__}, no array",
        where="frame",
        fix="push a NumPy array, or anything with __dlpack__ or __cuda_array_interface__",
    )


def check_frame(array: NDArray[Any]) -> None:
    """Refuse what is no image.

    Raises:
        InputError: another number of axes, no pixels, or values that are not real numbers.
    """
    if array.ndim not in (2, 3):
        raise InputError(
            f"has the shape {array.shape}", where="frame", fix="push (height, width) or (height, width, C)"
        )
    if array.size == 0:
        raise InputError(f"of shape {array.shape} has no pixels", where="frame", fix="check the camera's ROI")
    if pixel_type(array.dtype) is None:
        raise InputError(f"holds {array.dtype}", where="frame", fix="push integers, floats or bools")


class BufferPool:
    """Copies frames into memory that is used again, so that a steady camera costs no new memory."""

    def __init__(self, n_kept: int) -> None:
        self._n_kept = n_kept
        self._lock = threading.Lock()
        self._free: list[NDArray[Any]] = []

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return a contiguous copy, in a buffer given back before if one fits."""
        with self._lock:
            fits = bool(self._free) and self._free[-1].nbytes == array.nbytes
            buffer = self._free.pop() if fits else None
            if not fits:
                self._free.clear()  # the camera changed: old sizes will not come again
        if buffer is None:
            buffer = np.empty(array.nbytes, np.uint8)
        copied = buffer.view(array.dtype).reshape(array.shape)
        np.copyto(copied, array)
        return copied

    def give_back(self, array: NDArray[Any]) -> None:
        """Let the memory of `array`, which `copy` returned, be used again."""
        buffer = array.reshape(-1).view(np.uint8)
        with self._lock:
            if len(self._free) < self._n_kept:
                self._free.append(buffer)


def _from_dlpack(frame: Any) -> tuple[NDArray[Any], bool]:
    kind = int(frame.__dlpack_device__()[0])
    try:
        if kind in _HOST_DEVICES:
            return np.from_dlpack(frame), False
        return np.from_dlpack(frame, device="cpu"), True  # its owner copies
    except (BufferError, TypeError, ValueError, RuntimeError, NotImplementedError) as err:
        problem = " ".join(str(err).split()) or type(err).__name__
        place = "host memory" if kind in _HOST_DEVICES else f"DLPack device {kind}"
        raise InputError(
            f"cannot be fetched from {place} ({problem})",
            where="frame",
            fix="copy it to a NumPy array first",
        ) from err
