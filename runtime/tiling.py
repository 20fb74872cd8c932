"""The tile lattice: which ground each tile owns and what it reads, in network pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region

__all__ = ["SEAM_PX", "Tile", "halo_for", "owns", "plan_tiles"]

SEAM_PX = 4  # two tiles see an object slightly differently: its centre may lie in neither core, or in both


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work; regions are half-open, in network pixels of the slide."""

    index: int  # row-major number in the lattice
    core: Region  # the ground this tile owns, inside the slide
    read: Region  # exactly tile_px x tile_px; may stick out of the slide at its far edges


def plan_tiles(width: int, height: int, *, tile_px: int, halo_px: int) -> tuple[Tile, ...]:
    """Return the tiles of a slide of `width` x `height` network pixels, row by row.

    Reads start at 0 and step by `tile_px - 2 * halo_px`. A core is its read without the halo, but for the
    edges of the slide: nothing lies beyond them that a halo could show, so the first and the last cores
    reach as far, and what fits into one tile is one tile. The cores partition the slide.

    Raises:
        ShapeError: the slide is empty, or the halo leaves no core.

    >>> [(t.core.x0, t.core.x1, t.read.x0, t.read.x1) for t in plan_tiles(15, 4, tile_px=10, halo_px=2)]
    [(0, 8, 0, 10), (8, 15, 6, 16)]
    """
    core_px = tile_px - 2 * halo_px
    if width <= 0 or height <= 0 or halo_px < 0 or core_px <= 0:
        raise ShapeError(f"no tiles of {tile_px} px with a halo of {halo_px} px on {width} x {height} px")
    columns, rows = (_spans(size, core_px=core_px, halo_px=halo_px) for size in (width, height))
    spans = [(column, row) for row in rows for column in columns]
    return tuple(
        Tile(
            index=index,
            core=Region(x0, y0, x1, y1),
            read=Region(left, top, left + tile_px, top + tile_px),
        )
        for index, ((left, x0, x1), (top, y0, y1)) in enumerate(spans)
    )


def _spans(size: int, *, core_px: int, halo_px: int) -> list[tuple[int, int, int]]:
    """Return where each tile's read starts along an axis, and where its core starts and ends."""
    n = max(1, math.ceil((size - 2 * halo_px) / core_px))
    inner = [i * core_px + halo_px for i in range(1, n)]
    return [(i * core_px, *core) for i, core in enumerate(zip([0, *inner], [*inner, size], strict=True))]


def owns(tile: Tile, centres: NDArray[np.floating], *, margin_px: float = 0.0) -> NDArray[np.bool_]:
    """Tell which of `centres` (N, 2), x y in network pixels of the slide, lie in the tile's core.

    Half-open: of the tiles of one lattice exactly one owns a point of the slide. With a margin, those that
    lie up to so far beyond the core count too.

    >>> tile = plan_tiles(15, 4, tile_px=10, halo_px=2)[0]
    >>> owns(tile, np.array([[0.0, 0.0], [8.0, 1.0]]))
    array([ True, False])
    >>> owns(tile, np.array([[8.0, 1.0], [11.0, 1.0]]), margin_px=2.0)
    array([ True, False])
    """
    x, y = centres[:, 0], centres[:, 1]
    core = tile.core
    inside: NDArray[np.bool_] = (core.x0 - margin_px <= x) & (x < core.x1 + margin_px)
    inside &= (core.y0 - margin_px <= y) & (y < core.y1 + margin_px)
    return inside


def halo_for(nominal_diameter_px: float, stride_px: int) -> int:
    """Return the halo of a tile: at least 1.5 nominal diameters, a multiple of half the stride.

    The core of a tile, which two halos leave, is then a multiple of the stride, and so are the places where
    tiles begin: all tiles lie on one grid of the network's cells.

    >>> halo_for(28.0, 32), halo_for(42.0, 32)
    (48, 64)
    """
    step = stride_px // 2
    return step * math.ceil(1.5 * nominal_diameter_px / step)
