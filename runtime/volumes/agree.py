"""Objects found along several axes: what at least two of them agree on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import numpy as np

from darcnn.runtime.volumes.sections import cut_mask
from darcnn.runtime.volumes.solid import Solid, SolidFile, common_box, cropped, touching

__all__ = ["Agreement", "agree", "cut_merged", "shared_voxels"]

_MIN_IOU = 0.3  # two solids that overlap more, voxel by voxel, are one object
_VOTES = 2  # axes that must hold a voxel
_FEW = 0.8  # of what one axis has found; 0.93 on the volumes of our tests, 0.7 at twice their noise
_INSIDE = 0.5  # share of its voxels with which an object lies in a merged one ...
_PIECE = 0.2  # ... of which it is at least so much
_KEPT_BYTES = 64 << 20  # of objects that are kept while what lies about them is looked at


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many objects were found along each axis, and on how many axes agree."""

    by_axis: Mapping[str, int]
    n_agreed: int | None = None  # found along at least two; None where there is one
    is_of_one: bool = False  # of several axes: what is reported was found along the first alone

    @property
    def is_little(self) -> bool:
        """Whether two axes have found so few of the same that the volume must have much noise.

        >>> found = {"z": 100, "y": 90}
        >>> Agreement(found, n_agreed=79).is_little, Agreement(found, n_agreed=80).is_little
        (True, False)
        """
        return self.n_agreed is not None and self.n_agreed < _FEW * max(self.by_axis.values())


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


def cut_merged(views: Sequence[SolidFile], number: int) -> Iterator[Solid]:
    """Yield the objects of view `number`, cut where another view has found pieces of them as objects.

    Particles that touch look like one along one axis and like two along another: what tells them apart is
    right more often than what does not. Each voxel goes to the piece whose middle is nearest.

    Args:
        views: what was found along each axis.
        number: of the view.
    """
    whole = views[number]
    offers: dict[int, list[list[int]]] = {}  # of an object: the pieces that each other view has
    for view, other in enumerate(views):
        if view != number:
            for row, pieces in _find_pieces(whole, other).items():
                offers.setdefault(row, []).append([view, *pieces])
    for row in range(len(whole)):
        solid = whole[row]
        if row in offers:
            view, *pieces = max(offers[row], key=len)
            yield from _cut(solid, [views[view][piece] for piece in pieces])
        else:
            yield solid


def _find_pieces(whole: SolidFile, other: SolidFile) -> dict[int, list[int]]:
    """Return which two objects or more of `other` are pieces of an object of `whole`.

    Two that lie in one another for more than half are one object, found twice.
    """
    found: dict[int, list[int]] = {}
    for row, piece, shared, (n_whole, n_piece) in _sharing(whole, other):
        if shared >= max(_INSIDE * n_piece, _PIECE * n_whole):
            parts = found.setdefault(row, [])
            if not any(_lies_in(other[piece], other[part]) for part in parts):
                parts.append(piece)
    return {row: parts for row, parts in found.items() if len(parts) > 1}


def _lies_in(one: Solid, other: Solid) -> bool:
    smaller = min(int(np.count_nonzero(solid.mask)) for solid in (one, other))
    return shared_voxels(one, other) > _INSIDE * smaller


def _cut(solid: Solid, pieces: Sequence[Solid]) -> Iterator[Solid]:
    """Yield the parts of a solid that are nearest to the middle of each of the `pieces`."""
    middles = np.array([np.argwhere(one.mask).mean(axis=0) + one.origin for one in pieces])
    for part in cut_mask(solid.mask, solid.origin, middles):
        origin, mask = cropped(solid.origin, part)
        yield replace(solid, origin=origin, mask=mask, n_planes=min(solid.n_planes, max(mask.shape)))


def _overlapping(one: SolidFile, other: SolidFile) -> Iterator[tuple[int, int, float]]:
    """Yield (number, number, IoU) of all pairs that overlap enough."""
    for i, j, shared, voxels in _sharing(one, other):
        iou = shared / (sum(voxels) - shared)
        if iou >= _MIN_IOU:
            yield i, j, iou


def _sharing(one: SolidFile, other: SolidFile) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Yield (number, number, shared voxels, voxels of each) of all pairs that share some, in order."""
    near = _Recent(other)
    for i, pairs in groupby(sorted(zip(*touching(one, other), strict=True)), key=itemgetter(0)):
        here = one[int(i)]
        n_here = int(np.count_nonzero(here.mask))
        for _, j in pairs:
            there = near.get(int(j))
            shared = shared_voxels(here, there)
            if shared:
                yield int(i), int(j), shared, (n_here, int(np.count_nonzero(there.mask)))


class _Recent:
    """The objects of a file that were asked for last, unpacked."""

    def __init__(self, solids: SolidFile) -> None:
        self._solids = solids
        self._kept: OrderedDict[int, Solid] = OrderedDict()
        self._n_bytes = 0

    def get(self, number: int) -> Solid:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        solid = self._kept[number] = self._solids[number]
        self._n_bytes += solid.mask.nbytes
        while self._n_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._n_bytes -= self._kept.popitem(last=False)[1].mask.nbytes
        return solid


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
