"""Objects that share voxels: each voxel is the best one's, as in the labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.volumes.solid import Solid, SolidFile

__all__ = ["cut_overlaps"]

_MAX_COVERED = 0.5  # share of its voxels that an object may lose to better ones, as in a plane


def cut_overlaps(solids: SolidFile) -> Iterator[Solid]:
    """Yield the objects without the voxels of better ones, the best first.

    The higher score is better, of equal ones the object that comes first along z, y and x. One that loses
    more than half to better ones is the same object again and left out. So the table, the coordinates and the
    labels say the same.
    """
    order = np.lexsort((*solids.boxes.T[::-1], -solids.scores))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    better = _better_neighbours(solids, rank)
    is_kept = np.ones(len(order), np.bool_)
    for number in order.tolist():
        solid = solids[number]
        mask = solid.mask.copy()
        for other in better.get(number, []):
            if is_kept[other]:
                _take_away(mask, solid, solids[other])
        is_kept[number] = np.count_nonzero(mask) >= (1 - _MAX_COVERED) * np.count_nonzero(solid.mask)
        if is_kept[number]:
            yield _cropped(solid, mask)


def _better_neighbours(solids: SolidFile, rank: NDArray[np.int64]) -> dict[int, list[int]]:
    """Return of each object the better ones whose boxes touch its own."""
    better: dict[int, list[int]] = {}
    if len(solids):
        footprints = solids.footprints()
        ours, theirs = shapely.STRtree(footprints).query(footprints, predicate="intersects")
        z0, z1 = solids.boxes[:, 0], solids.boxes[:, 3]
        near = (rank[theirs] < rank[ours]) & (z0[ours] < z1[theirs]) & (z0[theirs] < z1[ours])
        for one, other in zip(ours[near].tolist(), theirs[near].tolist(), strict=True):
            better.setdefault(one, []).append(other)
    return better


def _take_away(mask: NDArray[np.bool_], solid: Solid, other: Solid) -> None:
    """Remove from `mask`, of the box of `solid`, the voxels of `other`."""
    low = np.maximum(solid.origin, other.origin)
    high = np.minimum(solid.stop, other.stop)
    if (high > low).all():
        here, there = (
            tuple(slice(a, b) for a, b in zip(low - one.origin, high - one.origin, strict=True))
            for one in (solid, other)
        )
        mask[here] &= ~other.mask[there]


def _cropped(solid: Solid, mask: NDArray[np.bool_]) -> Solid:
    filled = np.nonzero(mask)
    low = [int(one.min()) for one in filled]
    high = [int(one.max()) + 1 for one in filled]
    z, y, x = (start + first for start, first in zip(solid.origin, low, strict=True))
    inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    cropped = np.ascontiguousarray(mask[inside])
    n_planes = min(solid.n_planes, max(cropped.shape))
    return replace(solid, origin=(z, y, x), mask=cropped, n_planes=n_planes)
