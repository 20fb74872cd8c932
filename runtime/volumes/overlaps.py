"""Objects that share voxels: each voxel is the best one's, as in the labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.volumes.sections import Section, trimmed
from darcnn.runtime.volumes.solid import Solid, SolidFile, common_box, cropped, touching

__all__ = ["cut_overlaps", "cut_sections"]

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
        rest = replace(solid, mask=solid.mask.copy())
        for other in better.get(number, []):
            if is_kept[other] and (parts := common_box(rest, solids[other])) is not None:
                parts[0][parts[1]] = False
        n_left, n_voxels = np.count_nonzero(rest.mask), np.count_nonzero(solid.mask)
        is_kept[number] = n_left >= (1 - _MAX_COVERED) * n_voxels
        if is_kept[number]:
            origin, mask = cropped(solid.origin, rest.mask)
            n_planes = min(solid.n_planes, max(mask.shape))
            yield replace(solid, origin=origin, mask=mask, n_planes=n_planes)


def cut_sections(sections: list[Section]) -> list[Section]:
    """Return the sections of one plane, in their order, without the pixels of better ones: `cut_overlaps`."""
    if len(sections) < 2:
        return sections
    x0, y0 = min(one.x for one in sections), min(one.y for one in sections)
    width = max(one.x + one.mask.shape[1] for one in sections) - x0
    height = max(one.y + one.mask.shape[0] for one in sections) - y0
    taken = np.zeros((height, width), np.bool_)
    left: dict[int, Section] = {}
    for row in np.argsort([-one.score for one in sections], kind="stable").tolist():
        one = sections[row]
        h, w = one.mask.shape
        place = taken[one.y - y0 : one.y - y0 + h, one.x - x0 : one.x - x0 + w]
        mask = one.mask & ~place
        if np.count_nonzero(mask) >= (1 - _MAX_COVERED) * one.area_px:
            place |= mask
            left[row] = trimmed(replace(one, mask=mask))
    return [left[row] for row in sorted(left)]


def _better_neighbours(solids: SolidFile, rank: NDArray[np.int64]) -> dict[int, list[int]]:
    """Return of each object the better ones whose boxes touch its own."""
    better: dict[int, list[int]] = {}
    for one, other in zip(*touching(solids, solids), strict=True):
        if rank[other] < rank[one]:
            better.setdefault(int(one), []).append(int(other))
    return better
