"""From sections on planes to chains: which sections of neighbouring planes are one object.

The result is a function of the sections alone, in whatever blocks they were found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from darcnn.runtime.volumes.matching import (
    BRIDGED,
    Chain,
    match_overlapping,
    split_merged,
    width_of,
    with_next,
)
from darcnn.runtime.volumes.sections import Section

__all__ = ["link_sections"]

_WAIST = 0.5  # a chain is cut where its area falls below this share of the maxima on both sides
_DEEP = 0.7  # ... and only into objects that are this deep, in shares of their width
_LONG = 1.5  # a chain deeper than so many widths is a column of several, and is cut at slighter waists
_WAIST_OF_COLUMN, _DEEP_OF_COLUMN = 0.85, 0.3


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
    is_column = min_planes == 1 and len(areas) * plane_px > _LONG * width_of(max(areas))
    waist, deep = (_WAIST_OF_COLUMN, _DEEP_OF_COLUMN) if is_column else (_WAIST, _DEEP)
    best: tuple[float, int] | None = None
    for at in range(min_planes, len(areas) - min_planes + 1):
        pieces = areas[:at], areas[at:]
        depth = areas[at] / min(max(piece) for piece in pieces)
        is_deep = all(len(piece) * plane_px >= deep * width_of(max(piece)) for piece in pieces)
        if depth < waist and is_deep and (best is None or depth < best[0]):
            best = (depth, at)
    return None if best is None else best[1]
