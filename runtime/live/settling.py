"""When is an object near a seam certain? Once every tile that could report it too is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.instances import Instances
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.seams import drop_twins, lies_near_seam
from darcnn.runtime.tiling import Tile

__all__ = ["SeamSettler"]


class SeamSettler:
    """Takes tiles of one plan in any order; gives out each object once, when no twin of it can come.

    Reports that overlap hang together, and are given out together: what `drop_twins` decides for one may
    depend on the next. In the end the objects are those of `join_tiles`, whatever the order.
    """

    def __init__(self, plan: SlidePlan, shape: tuple[int, int]) -> None:
        """Begin; `shape` is (H, W) of level 0."""
        self._shape = shape
        self._factor = plan.factor
        self._extent = (plan.width, plan.height)
        self._n_columns = len({tile.core.x0 for tile in plan.tiles})
        self._open = {tile.index for tile in plan.tiles}  # not done
        self._waiting = Instances.empty(shape)
        self._tiles = np.zeros(0, np.int64)  # the tile that reported each that waits

    def add(self, found: Sequence[tuple[Tile, Instances]]) -> Instances:
        """Note that tiles are done; return the objects that are certain now."""
        certain = []
        for tile, reported in found:
            self._open.discard(tile.index)
            near = lies_near_seam(tile, reported.boxes, factor=self._factor, extent=self._extent)
            certain.append(reported.select(~near))
            self._waiting = Instances.concatenate(self._shape, [self._waiting, reported.select(near)])
            self._tiles = np.append(self._tiles, np.full(int(near.sum()), tile.index))
        certain.append(self._settle())
        return Instances.concatenate(self._shape, certain)

    def pass_over(self, tiles: Iterable[int]) -> None:
        """Note that tiles, by their numbers, report nothing; `add` gives out what is certain by that."""
        self._open.difference_update(tiles)

    def _settle(self) -> Instances:
        """Return what is certain of what waits, and forget it and its twins."""
        polygons = self._waiting.polygons()
        has_come = np.array([not self._neighbours(int(tile)) & self._open for tile in self._tiles], np.bool_)
        is_certain = _all_of_group(has_come, polygons, self._tiles)
        chosen = self._waiting.select(is_certain)
        kept = drop_twins(polygons[is_certain], chosen.scores, self._tiles[is_certain])
        self._waiting, self._tiles = self._waiting.select(~is_certain), self._tiles[~is_certain]
        return chosen.select(kept)

    def _neighbours(self, index: int) -> set[int]:
        row, column = divmod(index, self._n_columns)
        return {
            y * self._n_columns + x
            for y in range(row - 1, row + 2)
            for x in range(column - 1, column + 2)
            if 0 <= x < self._n_columns
        }


def _all_of_group(
    holds: NDArray[np.bool_], polygons: NDArray[np.object_], tiles: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell for which polygons something holds for all that hang together with them, across tiles."""
    result = holds.copy()
    if len(polygons) < 2:
        return result
    first, second = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    across = tiles[first] != tiles[second]
    first, second = first[across], second[across]
    while True:  # what does not hold spreads until nothing changes
        spread = result.copy()
        np.logical_and.at(spread, first, result[second])
        if np.array_equal(spread, result):
            return result
        result = spread
