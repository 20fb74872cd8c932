"""A slide whose pixels are wanted twice, soon after each other: to find objects and to measure them."""

from __future__ import annotations

import threading
from collections import deque

from darcnn.runtime.closing import Closing
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.protocol import Pixels, Reader, SlideInfo

__all__ = ["RecentReader"]

_MAX_BYTES = 1 << 27  # of pixels are kept: the tiles of some engine calls


class RecentReader(Closing):
    """Another reader's pixels; what was read last is at hand, in whole or in part, and not decoded again.

    What comes out does not depend on what was read before. So levels whose downsample is no whole number are
    always read anew: OpenSlide reads there from the nearest pixel of level 0, and a part of what was
    read is not what a read of the part gives.
    """

    def __init__(self, reader: Reader, *, max_bytes: int = _MAX_BYTES) -> None:
        """Keep the last `max_bytes` that `reader` reads; closing closes it."""
        self._reader = reader
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, Region, Pixels]] = deque()  # level, where, pixels; the oldest first
        self._bytes = 0

    @property
    def info(self) -> SlideInfo:
        """Facts about the plane that `read` reads."""
        return self._reader.info

    def read(self, region: Region, *, level: int) -> Pixels:
        """Return (H, W, C) pixels of `region` in pixels of `level`; a new array that the caller owns.

        Raises:
            DamagedPixelsError: the file is damaged there.
            InputError: the file cannot be read any more.
            ShapeError: there is no such level; the region is empty or leaves the level.
        """
        with self._lock:
            at_hand = list(self._kept)
        for kept_level, kept, pixels in at_hand:
            if kept_level == level and kept.covers(region):
                x, y = region.x0 - kept.x0, region.y0 - kept.y0
                return pixels[y : y + region.height, x : x + region.width].copy()
        pixels = self._reader.read(region, level=level)
        if float(self.info.levels[level].downsample).is_integer():
            self._keep(level, region, pixels.copy())
        return pixels

    def close(self) -> None:
        """Close the reader whose pixels these are."""
        with self._lock:
            self._kept.clear()
            self._bytes = 0
        self._reader.close()

    def _keep(self, level: int, region: Region, pixels: Pixels) -> None:
        with self._lock:
            self._kept.append((level, region, pixels))
            self._bytes += pixels.nbytes
            while self._bytes > self._max_bytes:
                self._bytes -= self._kept.popleft()[2].nbytes
