"""Regions and levels: where pixels lie, how large they are, which level a model reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Grid", "Level", "Region", "choose_level", "span_px0", "whole_factor"]

# A level whose pixels are up to this much coarser than asked for still serves: 0.499 um/px is "0.5".
_COARSER_BY = 1.05


@dataclass(frozen=True, slots=True)
class Region:
    """A half-open rectangle `[x0, x1) x [y0, y1)` in integer pixels of some level."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def width(self) -> int:
        """Extent along x, pixels."""
        return self.x1 - self.x0

    @property
    def height(self) -> int:
        """Extent along y, pixels."""
        return self.y1 - self.y0

    def clip(self, width: int, height: int) -> Region:
        """Return the part of this region inside `[0, width) x [0, height)`; empty stays empty."""
        x0, x1 = (min(max(v, 0), width) for v in (self.x0, self.x1))
        y0, y1 = (min(max(v, 0), height) for v in (self.y0, self.y1))
        return Region(x0, y0, x1, y1)

    def contains(self, x: float, y: float) -> bool:
        """Tell whether the point lies inside, the upper borders excluded."""
        return self.x0 <= x < self.x1 and self.y0 <= y < self.y1

    def covers(self, other: Region) -> bool:
        """Tell whether all of `other`, which is not empty, lies inside."""
        return self.x0 <= other.x0 and self.y0 <= other.y0 and other.x1 <= self.x1 and other.y1 <= self.y1


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a pyramid; `downsample` is relative to level 0."""

    index: int
    width_px: int
    height_px: int
    downsample: float


def whole_factor(full: tuple[int, int], reduced: tuple[int, int]) -> int | None:
    """Return the whole number of pixels of `full` (width, height) that one of `reduced` stands for.

    None where no whole number explains both sides, rounded up or down.

    >>> whole_factor((2220, 2967), (1110, 1484)), whole_factor((100, 100), (40, 40))
    (2, None)
    """
    pairs = list(zip(full, reduced, strict=True))
    factor = max(round(sum(whole / part for whole, part in pairs) / len(pairs)), 1)
    explains = all(part in (whole // factor, -(-whole // factor)) for whole, part in pairs)
    return factor if explains else None


def span_px0(level: Level, full: Level) -> tuple[int, int]:
    """Return the level-0 pixels (width, height) that `level` shows; `full` is level 0.

    A size that was rounded changes no pixel: 320 pixels of 8 show 2560 of 2567, not all of them stretched.
    One rounded up goes beyond the slide. Of other reduced images all that is known is that they show all.

    >>> span_px0(Level(1, 320, 250, 8.0), Level(0, 2567, 1999, 1.0))
    (2560, 2000)
    """
    sides = (full.width_px, full.height_px)
    factor = whole_factor(sides, (level.width_px, level.height_px))
    return sides if factor is None else (level.width_px * factor, level.height_px * factor)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the pixels of an image lie, along each of its axes: pixel i at `origin` + i * `steps`."""

    steps: tuple[float, ...]
    units: tuple[str | None, ...]  # as NGFF writes them: "micrometer", "second"; None: not known
    origin: tuple[float, ...]

    @property
    def makes_sense(self) -> bool:
        """Whether all places are numbers, in the order of the pixels."""
        return all(0 < step < math.inf for step in self.steps) and all(map(math.isfinite, self.origin))

    @classmethod
    def of_steps(cls, steps: Sequence[float] | None, unit: str, *, n_axes: int) -> Grid:
        """Return the grid of an image that begins at 0; steps that are not known (None) are 1 of no unit."""
        known = (1.0,) * n_axes if steps is None else tuple(steps)
        return cls(known, (None if steps is None else unit,) * n_axes, (0.0,) * n_axes)


def choose_level(levels: Sequence[Level], downsample: float) -> Level:
    """Return the coarsest level that is not coarser than `downsample` (within 5 %).

    A finer level is resampled down; a coarser one would have to be invented. If even level 0 is
    coarser, level 0 is returned and the caller enlarges it.

    >>> pyramid = [Level(0, 8, 8, 1.0), Level(1, 4, 4, 2.0), Level(2, 2, 2, 4.0)]
    >>> [choose_level(pyramid, d).index for d in (0.5, 1.0, 1.95, 3.9, 9.0)]
    [0, 0, 1, 2, 2]
    """
    fitting = [level for level in levels if level.downsample <= downsample * _COARSER_BY]
    return max(fitting, key=lambda level: level.downsample, default=levels[0])
