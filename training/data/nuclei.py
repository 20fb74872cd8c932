"""Random nuclei: how large, how long, how rough and how crowded, and where in a tile each lies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Nucleus", "NucleusRanges", "Plan", "draw_log", "draw_outline", "plan_nuclei"]

Mask = NDArray[np.bool_]  # (H, W)
Values = NDArray[np.float32]  # (h, w)

_MAX_TRIES = 150  # places that a tile looks for
_MIN_AREA_PX = 12  # smaller ones no one could outline
_MIN_VISIBLE = 0.4  # share of a nucleus inside the tile, else it is not put there
_MAX_DEVIATIONS = 2.0  # sizes are normal in their logarithm, cut here
_EDGE_PX = 3  # how far beyond its outline a nucleus is described, for soft edges
_ANGLES = np.linspace(-math.pi, math.pi, 65)
# An outline is an ellipse with waves of 2 to 6 periods, the shorter the weaker.
_WAVES = np.stack([wave(n * _ANGLES) / n for n in range(2, 7) for wave in (np.cos, np.sin)])


@dataclass(frozen=True, slots=True)
class NucleusRanges:
    """What nuclei are like. From each range one value is drawn a tile, so that its nuclei are of a kind."""

    size: tuple[float, float] = (0.75, 1.3)  # typical diameter, times the nominal one
    spread: tuple[float, float] = (0.08, 0.3)  # deviation of the diameter's logarithm within a tile
    elongation: tuple[float, float] = (1.05, 2.0)  # typical length over width
    roughness: tuple[float, float] = (0.02, 0.12)  # how far outlines wander from an ellipse, in radii
    cover: tuple[float, float] = (0.05, 0.45)  # share of the tile that nuclei take, if there is room
    crowding: tuple[float, float] = (0.1, 0.9)  # share of nuclei that lie beside another one
    apart: tuple[float, float] = (0.7, 1.2)  # middles of two that lie side by side, times their mean diameter
    max_overlap: float = 0.25  # share of a nucleus that later ones may hide


@dataclass(frozen=True, slots=True)
class Nucleus:
    """One nucleus: `depth` (h, w) px, about how far inside its outline a pixel lies, at the tile's (x0, y0).

    `centre` is (x, y) and `diameter_px` that of the circle of the same area, roughness apart.
    """

    x0: int
    y0: int
    depth: Values
    centre: tuple[float, float]
    diameter_px: float

    @property
    def place(self) -> tuple[slice, slice]:
        """Where it lies in the tile, rows and columns."""
        height, width = self.depth.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)


@dataclass(frozen=True, slots=True)
class Plan:
    """Nuclei in the order of painting, and `owner` (H, W): the number of the topmost from 1, 0 for none."""

    nuclei: list[Nucleus]
    owner: NDArray[np.int32]

    @property
    def masks(self) -> NDArray[np.bool_]:
        """(N, H, W): what is visible of each, hence disjoint."""
        return np.asarray(self.owner[None] == np.arange(1, len(self.nuclei) + 1)[:, None, None])


def plan_nuclei(allowed: Mask, diameter_px: float, ranges: NucleusRanges, rng: np.random.Generator) -> Plan:
    """Return nuclei for a tile: each keeps all but `max_overlap` of its area visible.

    Args:
        allowed: (H, W), where the centre of a nucleus may lie.
        diameter_px: nominal.
    """
    height, width = allowed.shape
    typical = diameter_px * draw_log(rng, ranges.size)
    spread, roughness = rng.uniform(*ranges.spread), rng.uniform(*ranges.roughness)
    elongation, crowding = draw_log(rng, ranges.elongation), rng.uniform(*ranges.crowding)
    direction, disorder = rng.uniform(0.0, math.pi), rng.uniform(0.0, 1.5)  # nuclei of a tissue may lie alike
    wanted_px = rng.uniform(*ranges.cover) * height * width
    field = _Field(np.zeros(allowed.shape, np.int32), ranges.max_overlap)
    for _ in range(_MAX_TRIES):
        if field.area_px >= wanted_px:
            break
        size = typical * math.exp(spread * np.clip(rng.normal(), -_MAX_DEVIATIONS, _MAX_DEVIATIONS))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if field.nuclei and rng.random() < crowding:
            beside, turn = field.nuclei[rng.integers(len(field.nuclei))], rng.uniform(0.0, 2.0 * math.pi)
            apart = (beside.diameter_px + size) / 2.0 * rng.uniform(*ranges.apart)
            x, y = beside.centre[0] + apart * math.cos(turn), beside.centre[1] + apart * math.sin(turn)
        if not (0 <= x < width and 0 <= y < height):
            continue
        if not allowed[int(y), int(x)] or field.owner[int(y), int(x)]:
            continue
        longer = 1.0 + (elongation - 1.0) * rng.uniform(0.5, 1.5)
        angle = direction + rng.normal(0.0, disorder)
        whole = draw_outline(size, longer, angle, roughness * rng.uniform(0.5, 1.5), rng)
        field.put(whole, (x, y), size)
    return Plan(field.nuclei, field.owner)


class _Field:
    """A tile that fills with nuclei; refuses those that would hide too much or show too little."""

    def __init__(self, owner: NDArray[np.int32], max_overlap: float) -> None:
        self.owner = owner
        self.max_overlap = max_overlap
        self.nuclei: list[Nucleus] = []
        self.area_px = 0
        self._may_lose: list[float] = []  # pixels that may yet be hidden of each

    def put(self, whole: Values, centre: tuple[float, float], diameter_px: float) -> None:
        height, width = self.owner.shape
        x, y = (round(at - side / 2.0) for at, side in zip(centre, whole.shape[::-1], strict=True))
        x0, y0 = max(x, 0), max(y, 0)
        depth = whole[y0 - y : height - y, x0 - x : width - x]
        nucleus = Nucleus(x0, y0, depth, centre, diameter_px)
        mask, under = depth > 0, self.owner[nucleus.place]
        area = int(mask.sum())
        if area < max(_MIN_AREA_PX, _MIN_VISIBLE * float((whole > 0).sum())):
            return
        hidden = np.bincount(under[mask], minlength=len(self.nuclei) + 1)[1:]
        if hidden.sum() > self.max_overlap * area or (hidden > self._may_lose).any():
            return
        self._may_lose = [*(self._may_lose - hidden), self.max_overlap * area]
        self.nuclei.append(nucleus)
        self.area_px += area - int(hidden.sum())
        under[mask] = len(self.nuclei)


def draw_log(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """Return a number between the limits, all ratios alike likely."""
    return math.exp(rng.uniform(math.log(limits[0]), math.log(limits[1])))


def draw_outline(
    diameter_px: float, elongation: float, angle: float, roughness: float, rng: np.random.Generator
) -> Values:
    """Return (h, w), h = w, px: how far each pixel lies inside a smooth random outline around the middle.

    Args:
        diameter_px: of the circle of the same area, roughness apart.
        elongation: length over width of the ellipse that the outline follows.
        angle: of its long axis, radians.
        roughness: how far the outline wanders from the ellipse, in radii.
        rng: decides where it does.
    """
    long, short = diameter_px / 2.0 * math.sqrt(elongation), diameter_px / 2.0 / math.sqrt(elongation)
    ellipse = long * short / np.hypot(short * np.cos(_ANGLES - angle), long * np.sin(_ANGLES - angle))
    waves = rng.normal(size=len(_WAVES)) @ _WAVES
    radii = ellipse * np.maximum(0.5, 1.0 + roughness * waves)
    reach = math.ceil(radii.max()) + _EDGE_PX
    at = np.arange(-reach, reach + 1, dtype=np.float32)
    inside = np.interp(np.arctan2(at[:, None], at), _ANGLES, radii) - np.hypot(at[:, None], at)
    return inside.astype(np.float32)
