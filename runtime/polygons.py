"""The pixels inside polygons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region

__all__ = ["draw_polygon", "draw_polygons"]


def draw_polygon(ring: NDArray[np.float64], region: Region) -> NDArray[np.bool_]:
    """Return which pixels of `region` have their centre inside the closed `ring`.

    A centre exactly on the outline is inside on the left and upper side only, so neighbours that
    share a border share no pixel.

    Args:
        ring: (K, 2) x y, pixels, first point repeated at the end.
        region: pixels to draw on.
    Returns:
        (height, width) of the region.

    >>> square = np.array([[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]], "f8")
    >>> draw_polygon(square, Region(-1, 0, 3, 2)).astype(int)
    array([[0, 1, 1, 0],
           [0, 0, 0, 0]])
    """
    corners = np.array([[region.x0, region.y0, region.x1, region.y1]], np.int64)
    inside = _is_inside(ring, np.zeros(len(ring), np.int64), corners)
    return inside.reshape(region.height, region.width + 1)[:, :-1]


def draw_polygons(
    points: NDArray[np.float64], owner: NDArray[np.int64], regions: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels of N polygons, each where `draw_polygon` draws it.

    Args:
        points: (K, 2) x y of closed rings, pixels, one ring after another.
        owner: (K,) which polygon each point belongs to, ascending from 0.
        regions: (N, 4) x0 y0 x1 y1, pixels to draw each polygon on; not empty.
    Returns:
        polygon, y and x of each pixel, (P,) each; polygon by polygon, row by row.

    >>> square = np.array([[0, 0], [2, 0], [2, 1], [0, 1], [0, 0]], "f8")
    >>> draw_polygons(square, np.zeros(5, int), np.array([[-1, 0, 3, 2]]))
    (array([0, 0]), array([0, 0]), array([0, 1]))
    """
    starts, widths = _cells(regions)
    cells = np.flatnonzero(_is_inside(points, owner, regions))
    polygon = np.searchsorted(starts, cells, "right") - 1
    y, x = np.divmod(cells - starts[polygon], widths[polygon])
    return polygon, y + regions[polygon, 1], x + regions[polygon, 0]


def _cells(regions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the cells of each region begin, and how many a row has: a column more than pixels."""
    widths = regions[:, 2] - regions[:, 0] + 1
    sizes = widths * (regions[:, 3] - regions[:, 1])
    return np.cumsum(sizes) - sizes, widths


def _is_inside(
    points: NDArray[np.float64], owner: NDArray[np.int64], regions: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return whether each cell of `_cells` lies in its polygon; those of the last column do not."""
    starts, widths = _cells(regions)
    x0, y0, x1, y1 = regions[owner].T
    x, y = points[:, 0], points[:, 1]
    is_edge = owner[:-1] == owner[1:]
    # an edge crosses the centre line of row r where ceil(y - 0.5) passes over r
    ends = np.clip(np.ceil(y - 0.5).astype(np.int64) - y0, 0, y1 - y0)
    first = np.minimum(ends[:-1], ends[1:])
    n_rows = np.where(is_edge, np.abs(np.diff(ends)), 0)
    edge = np.repeat(np.arange(len(n_rows)), n_rows)  # one entry a crossing
    row = np.arange(len(edge)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows) + first[edge]
    xa, ya, xb, yb = x[edge], y[edge], x[edge + 1], y[edge + 1]
    crossing = xa + (row + y0[edge] + 0.5 - ya) * ((xb - xa) / (yb - ya))
    column = np.clip(np.ceil(crossing - 0.5).astype(np.int64) - x0[edge], 0, (x1 - x0)[edge])
    of = owner[edge]
    n_cells = int((widths * (regions[:, 3] - regions[:, 1])).sum())
    turns = np.bincount(starts[of] + row * widths[of] + column, minlength=n_cells)
    # inside and outside change at each turn; a closed ring turns an even number of times in every row
    inside: NDArray[np.bool_] = np.cumsum(turns) % 2 == 1
    return inside
