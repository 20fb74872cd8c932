"""Which sections of one plane or time point go on in the next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.volumes.sections import Section, common_pixels, cut_mask, trimmed

__all__ = [
    "BRIDGED",
    "Chain",
    "centre_of",
    "match_overlapping",
    "overlaps",
    "split_merged",
    "width_of",
    "with_next",
]

Chain = list[Section]  # one section a plane, in order; at most one plane in a row is missing

BRIDGED = 1  # planes in a row on which an object may be missed
_MIN_IOU = 0.2  # sections that overlap less are two objects ...
_CONTAINED = 0.8  # ... unless one lies so far inside the other: the cap of a round object
_COVERED = 0.5  # share of a section that a merged one must cover to hold it


def with_next(planes: Iterable[list[Section]]) -> Iterator[tuple[list[Section], list[Section]]]:
    """Yield each plane with the one after it."""
    before: list[Section] | None = None
    for plane in planes:
        if before is not None:
            yield before, plane
        before = plane
    if before is not None:
        yield before, []


def match_overlapping(ends: list[Section], sections: list[Section]) -> dict[int, int]:
    """Return which section goes on with which chain, one to one: section -> chain."""
    rated = []
    for end, row, shared in overlaps(ends, sections):
        one, other = ends[end].area_px, sections[row].area_px
        iou = shared / (one + other - shared)
        is_cap = shared >= _CONTAINED * min(one, other)
        if iou >= _MIN_IOU or is_cap:
            missed = sections[row].plane - ends[end].plane - 1
            rated.append((missed, -iou, end, row))
    taken: dict[int, int] = {}
    used: set[int] = set()
    for _, _, end, row in sorted(rated):
        if end not in used and row not in taken:
            taken[row] = end
            used.add(end)
    return taken


def split_merged(ends: list[Section], sections: list[Section], after: list[Section]) -> list[Section]:
    """Return `sections`, those cut that join chains for this plane only."""
    covers: dict[int, list[int]] = {}
    for end, row, shared in overlaps(ends, sections):
        is_next = ends[end].plane == sections[row].plane - 1
        if is_next and shared >= _COVERED * ends[end].area_px:
            covers.setdefault(row, []).append(end)
    merged = {row: found for row, found in covers.items() if len(found) > 1}
    if not merged:
        return sections
    leaves: dict[int, int] = {}
    for row, later, shared in overlaps(sections, after):
        if row in merged and shared >= _COVERED * after[later].area_px:
            leaves[row] = leaves.get(row, 0) + 1
    result: list[Section] = []
    for row, section in enumerate(sections):
        is_cut = row in merged and leaves.get(row, 0) > 1
        result.extend(_cut(section, [ends[end] for end in sorted(merged[row])]) if is_cut else [section])
    return result


def _cut(section: Section, ends: list[Section]) -> list[Section]:
    """Return the parts of a section that are nearest to each of the sections `ends` of the plane before."""
    centres = np.array([centre_of(end) for end in ends])
    parts = cut_mask(section.mask, (section.y, section.x), centres)
    return [trimmed(replace(section, mask=part)) for part in parts]


def centre_of(section: Section) -> NDArray[np.float64]:
    """Return the centroid of a section, (2,) y x; the first pixel of a plane has its centre at 0."""
    ys, xs = np.nonzero(section.mask)
    return np.array([ys.mean() + section.y, xs.mean() + section.x])


def overlaps(one: list[Section], other: list[Section]) -> list[tuple[int, int, int]]:
    """Return (index in `one`, index in `other`, shared pixels) of all that share some, in order."""
    if not one or not other:
        return []
    first, second = shapely.STRtree(_boxes(one)).query(_boxes(other), predicate="intersects")[::-1]
    found = []
    for a, b in sorted(zip(first.tolist(), second.tolist(), strict=True)):
        shared = int(np.count_nonzero(common_pixels(one[a], other[b])))
        if shared:
            found.append((a, b, shared))
    return found


def _boxes(sections: list[Section]) -> NDArray[np.object_]:
    low = np.array([(one.x, one.y) for one in sections], np.float64)
    size = np.array([one.mask.shape[::-1] for one in sections], np.float64)
    boxes: NDArray[np.object_] = shapely.box(low[:, 0], low[:, 1], *(low + size).T)
    return boxes


def width_of(area_px: float) -> float:
    """Return the diameter of a disc of this area, pixels of a plane."""
    return 2.0 * math.sqrt(area_px / math.pi)
