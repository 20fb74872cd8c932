"""A damaged slide as it is looked at from afar: what cannot be read takes the slide's typical colour."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.closing import Closing
from darcnn.runtime.errors import DamagedPixelsError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.protocol import Pixels, Reader, SlideInfo

__all__ = ["MendedReader"]

_PIECE_PX = 128  # what is lost round a damaged tile is at most so much wider on each side
_SPOTS, _SPOT_PX = 8, 64  # 8 x 8 spots of the coarsest level say what a typical pixel is


class MendedReader(Closing):
    """Another reader's pixels, but damage does not stop it: for pictures and statistics, not for objects.

    A region that is damaged is read in pieces. Those that cannot be read get the median of each channel over
    the slide, which moves no percentile and no threshold. What comes out depends on the slide only, not on
    what was read before.
    """

    def __init__(self, reader: Reader) -> None:
        """Mend what `reader` reads; closing closes it."""
        self._reader = reader
        self._holes: list[Region] = []

    @property
    def info(self) -> SlideInfo:
        """Facts about the plane that `read` reads."""
        return self._reader.info

    @property
    def holes(self) -> tuple[Region, ...]:
        """What could not be read so far, level-0 pixels."""
        return tuple(self._holes)

    def read(self, region: Region, *, level: int) -> Pixels:
        """Return (H, W, C) pixels of `region` in pixels of `level`; a new array that the caller owns.

        Raises:
            DamagedPixelsError: nothing of the slide can be read.
            InputError: the file cannot be read any more.
            ShapeError: there is no such level; the region is empty or leaves the level.
        """
        try:
            return self._reader.read(region, level=level)
        except DamagedPixelsError:
            return self._read_in_pieces(region, level)

    def close(self) -> None:
        """Close the reader whose pixels these are."""
        self._reader.close()

    def _read_in_pieces(self, region: Region, level: int) -> Pixels:
        info = self.info
        pixels: Pixels = np.empty((region.height, region.width, len(info.channel_names)), info.dtype)
        for piece, found in self._parts(region, level):
            target = pixels[
                piece.y0 - region.y0 : piece.y1 - region.y0, piece.x0 - region.x0 : piece.x1 - region.x0
            ]
            target[:] = self._typical if found is None else found
            if found is None:
                self._holes.append(_to_level0(piece, info.levels[level].downsample))
        return pixels

    def _pieces(self, region: Region, level: int) -> Iterator[tuple[Region, Pixels | None]]:
        """Yield `region` in as few pieces as halving gives, with their pixels; None where damaged."""
        try:
            yield region, self._reader.read(region, level=level)
        except DamagedPixelsError:
            yield from self._parts(region, level)

    def _parts(self, region: Region, level: int) -> Iterator[tuple[Region, Pixels | None]]:
        """Yield the pieces of a region that cannot be read as a whole."""
        if max(region.width, region.height) <= _PIECE_PX:
            yield region, None
            return
        for half in _halves(region):
            yield from self._pieces(half, level)

    @cached_property
    def _typical(self) -> NDArray[Any]:
        """The median of each channel (C,), of spots spread over the coarsest level."""
        level = self.info.levels[-1]
        spots: list[Pixels] = []
        damage: DamagedPixelsError | None = None
        for row in range(_SPOTS):
            for column in range(_SPOTS):
                x0, y0 = level.width_px * column // _SPOTS, level.height_px * row // _SPOTS
                spot = Region(x0, y0, x0 + _SPOT_PX, y0 + _SPOT_PX).clip(level.width_px, level.height_px)
                try:
                    spots.append(self._reader.read(spot, level=level.index))
                except DamagedPixelsError as err:
                    damage = err
        if not spots and damage is not None:
            raise damage
        values = np.concatenate([spot.reshape(-1, spot.shape[2]) for spot in spots])  # (N, C)
        typical: NDArray[Any] = np.median(values, axis=0).astype(self.info.dtype)
        return typical


def _halves(region: Region) -> tuple[Region, Region]:
    """Cut a region across its longer side.

    >>> _halves(Region(0, 0, 5, 2))
    (Region(x0=0, y0=0, x1=2, y1=2), Region(x0=2, y0=0, x1=5, y1=2))
    """
    x0, y0, x1, y1 = region.x0, region.y0, region.x1, region.y1
    if region.width >= region.height:
        middle = (x0 + x1) // 2
        return Region(x0, y0, middle, y1), Region(middle, y0, x1, y1)
    middle = (y0 + y1) // 2
    return Region(x0, y0, x1, middle), Region(x0, middle, x1, y1)


def _to_level0(region: Region, downsample: float) -> Region:
    return Region(
        math.floor(region.x0 * downsample),
        math.floor(region.y0 * downsample),
        math.ceil(region.x1 * downsample),
        math.ceil(region.y1 * downsample),
    )
