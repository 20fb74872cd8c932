"""Objects found along several axes: what at least two of them agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from darcnn.runtime.volumes.solid import Solid, SolidFile, common_box, cropped, touching

__all__ = ["agree", "shared_voxels"]

_MIN_IOU = 0.3  # two solids that overlap more, voxel by voxel, are one object
_VOTES = 2  # axes that must hold a voxel


def agree(views: Sequence[SolidFile]) -> Iterator[Solid]:
    """Yield the objects that at least two of the `views` (one an axis) have found, in the order z y x.

    Objects of two views are one where their voxels overlap with IoU 0.3 or more; the best overlap is joined
    first, each object once a view. What is yielded has the voxels that at least two views hold.
    """
    pairs: list[tuple[float, tuple[int, int], tuple[int, int]]] = []
    for a in range(len(views)):
        for b in range(a + 1, len(views)):
            pairs.extend((-iou, (a, i), (b, j)) for i, j, iou in _overlapping(views[a], views[b]))
    groups: dict[tuple[int, int], dict[int, int]] = {}  # of each object its group: view -> object
    for _, one, other in sorted(pairs):
        joint = {**groups.get(one, {one[0]: one[1]}), **groups.get(other, {other[0]: other[1]})}
        apart = [groups.get(key, {key[0]: key[1]}) for key in (one, other)]
        if apart[0] is apart[1] or set(apart[0]) & set(apart[1]):
            continue  # joined already, or a view would be there twice
        for key in joint.items():
            groups[key] = joint
    found = []
    for group in {id(one): one for one in groups.values()}.values():
        solid = _vote([views[view][number] for view, number in sorted(group.items())])
        if solid is not None:
            found.append(solid)
    yield from sorted(found, key=lambda solid: (solid.origin, solid.stop))


def _overlapping(one: SolidFile, other: SolidFile) -> Iterator[tuple[int, int, float]]:
    """Yield (number, number, IoU) of all pairs that overlap enough."""
    first, second = touching(one, other)
    for i, j in sorted(zip(first.tolist(), second.tolist(), strict=True)):
        a, b = one[i], other[j]
        shared = shared_voxels(a, b)
        iou = shared / (np.count_nonzero(a.mask) + np.count_nonzero(b.mask) - shared)
        if iou >= _MIN_IOU:
            yield i, j, float(iou)


def shared_voxels(one: Solid, other: Solid) -> int:
    """Return how many voxels both have."""
    parts = common_box(one, other)
    return 0 if parts is None else int(np.count_nonzero(parts[0] & parts[1]))


def _vote(members: list[Solid]) -> Solid | None:
    """Return the solid of the voxels that two or more members have, None where there are none."""
    low = np.min([one.origin for one in members], axis=0)
    high = np.max([one.stop for one in members], axis=0)
    votes = np.zeros(high - low, np.uint8)
    for one in members:
        votes[tuple(slice(a, b) for a, b in zip(one.origin - low, one.stop - low, strict=True))] += one.mask
    mask = votes >= _VOTES
    if not mask.any():
        return None
    z, y, x = (int(start) for start in low)
    return Solid(
        *cropped((z, y, x), mask),
        score=float(np.mean([one.score for one in members])),
        truncated=any(one.truncated for one in members),
        n_planes=max(one.n_planes for one in members),
    )
