"""The tile lattice: which ground each tile owns and what it reads, in network pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region

__all__ = ["SEAM_PX", "Tile", "owns", "plan_tiles"]

SEAM_PX = 4  # two tiles see an object slightly differently: its centre may lie in neither core, or in both


@dataclass(frozen=True, slots=True)
class Tile:
    """One unit of work; regions are half-open, in network pixels of the slide."""

    index: int  # row-major number in the lattice
    core: Region  # the ground this tile owns, inside the slide
    read: Region  # exactly tile_px x tile_px; sticks out of the slide at its edges


def plan_tiles(width: int, height: int, *, tile_px: int, halo_px: int) -> tuple[Tile, ...]:
    """Return the tiles of a slide of `width` x `height` network pixels, row by row.

    The lattice starts at 0 and steps by `tile_px - 2 * halo_px`; the cores at the far edges are cut,
    so that the cores partition the slide.

    Raises:
        ShapeError: the slide is empty, or the halo leaves no core.

    >>> [(t.core.x0, t.core.x1, t.read.x0, t.read.x1) for t in plan_tiles(10, 4, tile_px=10, halo_px=2)]
    [(0, 6, -2, 8), (6, 10, 4, 14)]
    """
    core_px = tile_px - 2 * halo_px
    if width <= 0 or height <= 0 or halo_px < 0 or core_px <= 0:
        raise ShapeError(f"no tiles of {tile_px} px with a halo of {halo_px} px on {width} x {height} px")
    corners = [(x, y) for y in range(0, height, core_px) for x in range(0, width, core_px)]
    return tuple(
        Tile(
            index=index,
            core=Region(x, y, x + core_px, y + core_px).clip(width, height),
            read=Region(x - halo_px, y - halo_px, x - halo_px + tile_px, y - halo_px + tile_px),
        )
        for index, (x, y) in enumerate(corners)
    )


def owns(tile: Tile, centres: NDArray[np.floating], *, margin_px: float = 0.0) -> NDArray[np.bool_]:
    """Tell which of `centres` (N, 2), x y in network pixels of the slide, lie in the tile's core.

    Half-open: of the tiles of one lattice exactly one owns a point of the slide. With a margin, those that
    lie up to so far beyond the core count too.

    >>> tile = plan_tiles(10, 4, tile_px=10, halo_px=2)[0]
    >>> owns(tile, np.array([[0.0, 0.0], [6.0, 1.0]]))
    array([ True, False])
    >>> owns(tile, np.array([[6.0, 1.0], [9.0, 1.0]]), margin_px=2.0)
    array([ True, False])
    """
    x, y = centres[:, 0], centres[:, 1]
    core = tile.core
    inside: NDArray[np.bool_] = (core.x0 - margin_px <= x) & (x < core.x1 + margin_px)
    inside &= (core.y0 - margin_px <= y) & (y < core.y1 + margin_px)
    return inside
