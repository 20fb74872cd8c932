"""Objects on the seams of tiles: two tiles may both report one, and only one report stays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.instances import Instances
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.tiling import SEAM_PX, Tile

__all__ = ["drop_twins", "join_tiles", "lies_near_seam"]

_MAX_COVERED = 0.5  # what lies for more in a better one is the same object, as inside a tile (`drop_covered`)
_REACH_PX = 2 * SEAM_PX  # two tiles see an outline slightly differently


def lies_near_seam(
    tile: Tile, boxes0: NDArray[np.floating], *, factor: tuple[float, float], extent: tuple[int, int]
) -> NDArray[np.bool_]:
    """Tell which objects of `tile` another tile may have reported too: those that reach a seam, or nearly.

    Where their centres lie says less: of two nuclei that touch, one tile may see the pair and one a nucleus,
    with centres far apart.

    Args:
        tile: the tile that reported them.
        boxes0: (N, 4) level-0 pixels, clipped to the slide.
        factor: level-0 pixels per network pixel, along x and y.
        extent: width and height of the slide, network pixels; its edges are no seams.
    """
    core = tile.core
    near = np.zeros(len(boxes0), np.bool_)
    for axis, (low, high) in enumerate(((core.x0, core.x1), (core.y0, core.y1))):
        if low > 0:
            near |= boxes0[:, axis] <= (low + _REACH_PX) * factor[axis]
        if high < extent[axis]:
            near |= boxes0[:, axis + 2] >= (high - _REACH_PX) * factor[axis]
    return near


def drop_twins(
    polygons: NDArray[np.object_], scores: NDArray[np.floating], tiles: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which reports stay, (N,): of two from different tiles that are one object, the better one.

    They are one if more than half of the worse lies in the better, as it does wherever their IoU is above
    0.5. The higher score is the better, of equal ones that of the lower tile. What is decided for an object
    depends on those that overlap it only, never on the order of work.

    Args:
        polygons: (N,) outlines of objects near seams, level-0 pixels.
        scores: (N,).
        tiles: (N,) the index of the tile that reported each.

    >>> squares = shapely.box(np.array([0, 1, 50]), 0, np.array([10, 11, 60]), 10)
    >>> drop_twins(squares, np.array([0.8, 0.9, 0.7]), np.array([0, 1, 1]))
    array([False,  True,  True])
    """
    kept = np.ones(len(polygons), np.bool_)
    if len(polygons) < 2:
        return kept
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    others = tiles[first] != tiles[second]
    first, second = first[others], second[others]
    common = shapely.area(shapely.intersection(polygons[first], polygons[second]))
    is_covered = common > _MAX_COVERED * shapely.area(polygons)[second]
    covered: dict[int, list[int]] = {}  # by which it is covered -> what is
    for one, other in zip(first[is_covered].tolist(), second[is_covered].tolist(), strict=True):
        covered.setdefault(one, []).append(other)
    is_decided = np.zeros(len(polygons), np.bool_)
    for row in np.lexsort((np.arange(len(polygons)), tiles, -scores)).tolist():  # the best first
        if kept[row]:
            is_decided[row] = True
            for other in covered.get(row, []):
                kept[other] = is_decided[other]
    return kept


def join_tiles(plan: SlidePlan, shape: tuple[int, int], found: Sequence[tuple[Tile, Instances]]) -> Instances:
    """Return the objects that tiles of one plan report, each once, in the order given.

    Args:
        plan: of the slide.
        shape: (H, W) of level 0.
        found: each tile with what it reports, level-0 pixels.
    """
    factor = plan.factor
    extent = (plan.width, plan.height)
    joint = Instances.concatenate(shape, [part for _, part in found])
    tiles = np.repeat([tile.index for tile, _ in found], [len(part) for _, part in found]).astype(np.int64)
    near = [lies_near_seam(tile, part.boxes, factor=factor, extent=extent) for tile, part in found]
    rows = np.flatnonzero(np.concatenate([np.zeros(0, np.bool_), *near]))
    candidates = joint.select(rows)
    kept = np.ones(len(joint), np.bool_)
    kept[rows] = drop_twins(candidates.polygons(), candidates.scores, tiles[rows])
    return joint.select(kept)
