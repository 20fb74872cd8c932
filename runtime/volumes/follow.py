"""From sections at time points to tracks: which sections of a series are one object, and which divide.

The result is a function of the sections alone, in whatever blocks they were found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.volumes.matching import (
    BRIDGED,
    Chain,
    centre_of,
    match_overlapping,
    split_merged,
    width_of,
    with_next,
)
from darcnn.runtime.volumes.sections import Section

__all__ = ["Track", "follow_sections"]

_REACH = 2.0  # diameters that an object moves at most from time point to time point ...
# ... and its area changes by this factor at most, where nearness alone joins it: chromosomes that draw
# together before a division, and spread after it, take a third of the room of a nucleus
_ALIKE = 3.0
_FEW = 5  # objects do not tell that the whole field has moved
_JUMP = 6.0  # diameters that it moves at most
_SHARED, _CLEARLY = 0.5, 1.5  # of the objects move alike; times as many as stay where they were
# Daughters lie on both sides of where their mother was: at most so far apart, and the middle between them at
# most so far from her, in her usual diameters.
_APART, _ASIDE = 1.8, 0.45
_EACH, _BOTH = 0.8, 0.2  # of her usual area each has at most so much, both together at least so much ...
_TWINS = 2.0  # ... and one at most so many times that of the other
_USUAL = 25  # time points, the last ones, whose median is usual: just before she divides she is small


@dataclass(frozen=True, slots=True)
class Track:
    """An object of a series."""

    sections: Chain
    number: int  # in the order in which objects appear
    parent: int | None  # number of the track that divided into this one and another


def follow_sections(time_points: Iterable[list[Section]]) -> Iterator[Track]:
    """Yield the tracks of the sections of consecutive time points, each as soon as it has ended.

    1. Overlap joins one to one, an object missed at one time point goes on if it is found at the next, and a
       section that joins two tracks for one time point is cut: rules 1 to 3 of `link_sections`.
    2. What no overlap joins is joined to what is left of the time point before: of those alike in area and at
       most two diameters apart, the ones nearest to each other.
    3. A field that has moved as a whole is first moved back.
    4. A track ends in a division where two sections alike, each smaller than it usually was, lie on both
       sides of where it was at the time point before, and both go on at the next one: a cell that was found
       in two pieces once has not divided. Both are new tracks.

    Args:
        time_points: the sections of each; three time points are in memory, and the tracks that go on.
    """
    follower = _Follower()
    ordered = (sorted(sections, key=lambda one: (one.y, one.x)) for sections in time_points)
    for current, after in with_next(ordered):
        yield from follower.add(current, after)
    yield from follower.active


@dataclass(slots=True)
class _Follower:
    active: list[Track] = field(default_factory=list)
    _time: int = -1  # the last time point taken
    _n_tracks: int = 0
    # how far the field has moved since the first time point, y x, at each
    _moved: list[NDArray[np.int64]] = field(default_factory=lambda: [np.zeros(2, np.int64)])

    def add(self, current: list[Section], after: list[Section]) -> list[Track]:
        """Take the next time point; return the tracks that have ended before it."""
        self._time += 1
        self._moved.append(self._moved[-1] + _find_jump(current, after))
        ends = self._seen_now([track.sections[-1] for track in self.active])
        after = self._seen_now(after)
        sections = split_merged(ends, current, after)
        taken = _match(ends, sections)
        usual_px = [_usual_area(track) for track in self.active]
        divided = _find_divisions(ends, usual_px, sections, taken, after)
        mothers = {self.active[end].number for end in divided.values()}
        begun: list[Track] = []
        for row, section in enumerate(sections):
            if row in taken and row not in divided:
                self.active[taken[row]].sections.append(section)
            else:
                parent = self.active[divided[row]].number if row in divided else None
                begun.append(Track([section], self._n_tracks + len(begun), parent))
        self._n_tracks += len(begun)
        going: list[Track] = []
        ended: list[Track] = []
        for track in self.active:
            is_over = track.number in mothers or track.sections[-1].plane < self._time - BRIDGED
            (ended if is_over else going).append(track)
        self.active = going + begun
        return ended

    def _seen_now(self, sections: list[Section]) -> list[Section]:
        """Return sections of any time point where they would lie now, if only the field had moved."""
        seen: list[Section] = []
        for one in sections:
            dy, dx = (self._moved[self._time] - self._moved[one.plane]).tolist()
            seen.append(replace(one, x=one.x + dx, y=one.y + dy))
        return seen


def _match(ends: list[Section], sections: list[Section]) -> dict[int, int]:
    """Return which section goes on with which track, one to one, by overlap or nearness: section -> track."""
    taken = match_overlapping(ends, sections)
    return taken | _match_near(ends, sections, taken)


def _usual_area(track: Track) -> float:
    return float(np.median([one.area_px for one in track.sections[-_USUAL:]]))


def _find_divisions(
    ends: list[Section],
    usual_px: list[float],
    sections: list[Section],
    taken: dict[int, int],
    after: list[Section],
) -> dict[int, int]:
    """Return which sections are the daughters of which track: section -> track, two sections a track.

    One daughter is a section that goes on with no track, the other may be what is `taken` for her mother:
    where all cells move, what looks like two daughters is a cell and its neighbour.
    """
    goes_on = {end: row for row, end in taken.items()}
    rated = sorted(
        (aside, end, one, other)
        for end, rows in _find_new(ends, usual_px, sections, taken).items()
        for one, other in product([goes_on[end]] if end in goes_on else rows, rows)
        if one != other
        for aside in [_judge_daughters(ends[end], usual_px[end], sections[one], sections[other])]
        if aside is not None
    )
    if not rated:
        return {}
    going_on = set(_match(sections, after).values())
    daughters: dict[int, int] = {}
    for _, end, one, other in rated:
        is_free = end not in daughters.values() and one not in daughters and other not in daughters
        if is_free and one in going_on and other in going_on:
            daughters |= {one: end, other: end}
    return daughters


def _find_new(
    ends: list[Section], usual_px: list[float], sections: list[Section], taken: dict[int, int]
) -> dict[int, list[int]]:
    """Return the sections, not `taken`, that lie where daughters of a track of the time point before may."""
    new = [row for row in range(len(sections)) if row not in taken]
    mothers = [end for end, one in enumerate(ends) if sections and one.plane == sections[0].plane - 1]
    if not new or not mothers:
        return {}
    here, there = (
        [shapely.Point(centre_of(part[number])) for number in chosen]
        for part, chosen in ((sections, new), (ends, mothers))
    )
    reach = [_APART * width_of(usual_px[end]) for end in mothers]
    which, found = shapely.STRtree(here).query(there, predicate="dwithin", distance=reach)
    near: dict[int, list[int]] = {}
    for mother, row in zip(which.tolist(), found.tolist(), strict=True):
        near.setdefault(mothers[mother], []).append(new[row])
    return near


def _judge_daughters(mother: Section, usual_px: float, one: Section, other: Section) -> float | None:
    """Return how far the middle of two sections lies from where their mother was, in her usual diameters.

    None: they are not her daughters.
    """
    areas = one.area_px, other.area_px
    if max(areas) > min(_EACH * usual_px, _TWINS * min(areas)) or sum(areas) < _BOTH * usual_px:
        return None
    width = width_of(usual_px)
    centres = centre_of(one), centre_of(other)
    apart = float(np.linalg.norm(centres[0] - centres[1])) / width
    aside = float(np.linalg.norm((centres[0] + centres[1]) / 2 - centre_of(mother))) / width
    return aside if apart <= _APART and aside <= _ASIDE else None


def _match_near(ends: list[Section], sections: list[Section], taken: dict[int, int]) -> dict[int, int]:
    """Return which section that is not `taken` goes on with which track: those nearest to each other."""
    used = set(taken.values())
    rows = [row for row in range(len(sections)) if row not in taken]
    left = [end for end in range(len(ends)) if end not in used]
    if not rows or not left:
        return {}
    here, there = ([one[k] for k in chosen] for one, chosen in ((sections, rows), (ends, left)))
    now, before = ([shapely.Point(centre_of(one)) for one in part] for part in (here, there))
    reach = [_REACH * width_of(one.area_px) for one in here]
    near = shapely.STRtree(before).query(now, predicate="dwithin", distance=reach).T
    pairs = [(k, n) for k, n in near.tolist() if _is_next(there[n], here[k])]
    pairs.sort(key=lambda pair: (shapely.distance(now[pair[0]], before[pair[1]]), pair))
    of_now, of_before = ({pair[side]: pair for pair in reversed(pairs)} for side in (0, 1))  # the nearest
    return {rows[k]: left[n] for k, n in pairs if of_now[k] == of_before[n] == (k, n)}


def _find_jump(before: list[Section], sections: list[Section]) -> NDArray[np.int64]:
    """Return how far the whole field has moved since the time point before, (2,) y x: a stage that jumped.

    Each pair of objects of both time points votes for the way between them. The ways of cells that move on
    their own differ; a jump is what half of them share, and half as many again as stay where they were.
    """
    n_pairs = min(len(before), len(sections))
    if n_pairs < _FEW:
        return np.zeros(2, np.int64)
    step = width_of(float(np.median([one.area_px for one in sections]))) / 3.0
    there, here = ([shapely.Point(centre_of(one)) for one in part] for part in (before, sections))
    k, n = shapely.STRtree(there).query(here, predicate="dwithin", distance=3.0 * _JUMP * step)
    ways = shapely.get_coordinates(here)[k] - shapely.get_coordinates(there)[n]  # (P, 2) y x
    side = 2 * math.ceil(3.0 * _JUMP) + 3
    cells = np.round(ways / step).astype(np.int64) + side // 2
    votes = np.zeros((side, side), np.int64)
    np.add.at(votes, (cells[:, 0], cells[:, 1]), 1)
    padded = np.pad(votes, 1)
    around = np.sum([padded[y : y + side, x : x + side] for y in range(3) for x in range(3)], axis=0)
    best = np.unravel_index(int(np.argmax(around)), around.shape)
    if around[best] < max(_SHARED * n_pairs, _CLEARLY * around[side // 2, side // 2]):
        return np.zeros(2, np.int64)
    jump: NDArray[np.float64] = np.median(ways[(np.abs(cells - best) <= 1).all(axis=1)], axis=0)
    return np.round(jump).astype(np.int64)


def _is_next(one: Section, other: Section) -> bool:
    """Tell whether `other` is of the next time point and about as large."""
    areas = one.area_px, other.area_px
    return one.plane == other.plane - 1 and max(areas) <= _ALIKE * min(areas)
