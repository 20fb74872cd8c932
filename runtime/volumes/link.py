"""From sections on planes to chains: which sections of neighbouring planes are one object.

The result is a function of the sections alone, in whatever blocks they were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.volumes.sections import Section, common_pixels, trimmed

__all__ = [
    "BRIDGED",
    "Chain",
    "centre_of",
    "link_sections",
    "match_overlapping",
    "overlaps",
    "split_merged",
    "width_px",
    "with_next",
]

Chain = list[Section]  # one section a plane, in order; at most one plane in a row is missing

_MIN_IOU = 0.2  # sections that overlap less are two objects ...
_CONTAINED = 0.8  # ... unless one lies so far inside the other: the cap of a round object
_COVERED = 0.5  # share of a section that a merged one must cover to hold it
_WAIST = 0.5  # a chain is cut where its area falls below this share of the maxima on both sides
_DEEP = 0.7  # ... and only into objects that are this deep, in shares of their width
_LONG = 1.5  # a chain deeper than so many widths is a column of several, and is cut at slighter waists
_WAIST_OF_COLUMN, _DEEP_OF_COLUMN = 0.85, 0.3
BRIDGED = 1  # planes in a row on which an object may be missed


def link_sections(
    planes: Iterable[list[Section]],
    *,
    min_planes: int = 1,
    plane_px: float = 1.0,
) -> Iterator[Chain]:
    """Yield the chains of the sections of consecutive planes, each as soon as it has ended.

    1. Sections of two planes are candidates for one object where their masks overlap (IoU 0.2 or more, or one
       lies in the other), and are joined one to one, the best overlap first.
    2. An object missed on one plane goes on if it is found on the next.
    3. Where two chains run into one section and out of it on the next plane, that section is cut in two.
    4. A chain with a waist, two objects one behind the other, is cut there, if both would be about as deep as
       they are wide: a flat piece is no object of its own. A chain far deeper than it is wide is a column of
       several: there, without slabs, slight waists and flatter pieces will do.
    5. Chains of fewer than `min_planes` sections are left out: even what is one plane thick shows in all
       slabs that hold it, and what shows in fewer is noise.

    Time points of a series are no planes: `darcnn.runtime.volumes.follow`.

    Args:
        planes: the sections of each plane; three planes are in memory, and the chains that go on.
        min_planes: of a chain.
        plane_px: distance of two planes in pixels of a plane.
    """
    linker = _Linker()
    for current, after in with_next(planes):
        for chain in linker.add(current, after):
            yield from _finish(chain, min_planes, plane_px)
    for chain in linker.active:
        yield from _finish(chain, min_planes, plane_px)


def with_next(planes: Iterable[list[Section]]) -> Iterator[tuple[list[Section], list[Section]]]:
    """Yield each plane with the one after it."""
    before: list[Section] | None = None
    for plane in planes:
        if before is not None:
            yield before, plane
        before = plane
    if before is not None:
        yield before, []


@dataclass(slots=True)
class _Linker:
    active: list[Chain] = field(default_factory=list)
    _plane: int = -1  # the last one taken

    def add(self, current: list[Section], after: list[Section]) -> list[Chain]:
        """Take the next plane; return the chains that have ended before it."""
        self._plane += 1
        ends = [chain[-1] for chain in self.active]
        sections = split_merged(ends, current, after)
        taken = match_overlapping(ends, sections)
        for row, section in enumerate(sections):
            if row in taken:
                self.active[taken[row]].append(section)
            else:
                self.active.append([section])
        ended = [chain for chain in self.active if chain[-1].plane < self._plane - BRIDGED]
        self.active = [chain for chain in self.active if chain[-1].plane >= self._plane - BRIDGED]
        return ended


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
    ys, xs = np.nonzero(section.mask)
    points = np.stack([ys + section.y, xs + section.x], axis=1).astype(np.float64)
    centres = np.array([centre_of(end) for end in ends])
    nearest = ((points[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    parts = []
    for number in range(len(ends)):
        own = nearest == number
        if own.any():
            mask = np.zeros_like(section.mask)
            mask[ys[own], xs[own]] = True
            parts.append(trimmed(replace(section, mask=mask)))
    return parts


def centre_of(section: Section) -> NDArray[np.float64]:
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


def _finish(chain: Chain, min_planes: int, plane_px: float) -> Iterator[Chain]:
    """Yield the chain, cut at its waists, without what is too short."""
    waist = _find_waist([section.area_px for section in chain], min_planes, plane_px)
    if waist is not None:
        yield from _finish(chain[:waist], min_planes, plane_px)
        yield from _finish(chain[waist:], min_planes, plane_px)
    elif len(chain) >= min_planes:
        yield chain


def _find_waist(areas: list[int], min_planes: int, plane_px: float) -> int | None:
    """Return where to cut: the first section of the second object, None where there is one object.

    >>> _find_waist([4, 6, 2, 5, 4], 2, 1.0), _find_waist([4, 6, 4, 5, 4], 2, 1.0)
    (2, None)
    >>> _find_waist([50, 90, 30, 80, 60], 2, 1.0)  # flat pieces
    >>> _find_waist([5, 9, 7, 5, 7, 9, 5], 1, 1.0)  # a column
    3
    """
    # slabs blur slight waists, and noise makes others
    is_column = min_planes == 1 and len(areas) * plane_px > _LONG * width_px(areas)
    waist, deep = (_WAIST_OF_COLUMN, _DEEP_OF_COLUMN) if is_column else (_WAIST, _DEEP)
    best: tuple[float, int] | None = None
    for at in range(min_planes, len(areas) - min_planes + 1):
        pieces = areas[:at], areas[at:]
        depth = areas[at] / min(max(piece) for piece in pieces)
        is_deep = all(len(piece) * plane_px >= deep * width_px(piece) for piece in pieces)
        if depth < waist and is_deep and (best is None or depth < best[0]):
            best = (depth, at)
    return None if best is None else best[1]


def width_px(areas: list[int]) -> float:
    """Return the diameter of the largest of sections of these areas, pixels of a plane."""
    return 2.0 * math.sqrt(max(areas) / math.pi)
