"""Tiles on their way to the GPU while it computes the ones before, on a stream of their own.

None of this ever ran on a GPU.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.engines.cuda import DeviceBuffer, Event, PinnedBuffer, Stream, copy_in

__all__ = ["UploadedTiles", "Uploader"]

_SLOTS = 3  # one computed on, one that waits for it, one on its way


class _Slot:
    """Room for one batch in the GPU's memory, and in page-locked memory of the host."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        with ExitStack() as held:
            self.buffer = DeviceBuffer(shape, "uint8")
            held.callback(self.buffer.close)
            self.pinned = PinnedBuffer(shape, "uint8")
            held.callback(self.pinned.close)
            self.is_there = Event()
            held.callback(self.is_there.close)
            self._held = held.pop_all()

    def close(self) -> None:
        self._held.close()  # all of them, whatever becomes of one


class UploadedTiles:
    """A batch of tiles that is on the GPU, or will be once `is_there` has happened; for `detect`."""

    def __init__(self, slot: _Slot) -> None:
        self.buffer, self.is_there = slot.buffer, slot.is_there
        self.shape, self.dtype = slot.buffer.shape, slot.buffer.dtype


class Uploader:
    """Copies batches of one shape to the GPU beside its computations."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Allocate the slots.

        Raises:
            DeviceError: the GPU has no memory for them.
        """
        self._slots: list[_Slot] = []
        self._stream = Stream()
        try:
            for _ in range(_SLOTS):
                self._slots.append(_Slot(shape))
        except BaseException:
            self.close()
            raise
        self._free = deque(self._slots)

    def upload(self, tiles: NDArray[np.uint8]) -> UploadedTiles | NDArray[np.uint8]:
        """Queue a copy of `tiles` and return at once; where no slot is free, return `tiles` as they are.

        A slot is free again once nobody holds what was returned.

        Raises:
            DeviceError: the copy failed.
        """
        try:
            slot = self._free.popleft()
        except IndexError:
            return tiles
        uploaded = UploadedTiles(slot)
        weakref.finalize(uploaded, self._free.append, slot)
        slot.is_there.wait()  # the copy before, perhaps never asked for, may still read the pinned memory
        copy_in(slot.buffer, tiles, slot.pinned.array, self._stream)
        slot.is_there.record(self._stream)
        return uploaded

    def close(self) -> None:
        """Give the memory back; closing twice is allowed."""
        slots, self._slots = self._slots, []
        self._free = deque()
        with ExitStack() as releases:  # all of them, whatever becomes of one
            releases.callback(self._stream.close)
            for slot in slots:
                releases.callback(slot.close)
