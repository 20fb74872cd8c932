"""Bare glass in stained tissue: lumens, tears and fat, laid between the objects of a tile."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from darcnn.training.data.crowding import clip_window
from darcnn.training.data.nuclei import draw_log, draw_outline
from darcnn.training.data.source import LabelledTile

__all__ = ["lay_glass"]

Values = NDArray[np.float32]  # (S, S)

_HOLES = (1, 8)  # a tile
_SIZES = (0.35, 4.3)  # typical diameter of a tile's holes, times an object's
_SPREAD = 0.35  # deviation of the diameter's logarithm within a tile
_MAX_SIZE = 6.5  # times an object's diameter
_TEARS = 0.5  # share of tiles whose holes may be tears,
_TORN = 6.0  # up to so many times as long as wide; else
_ROUND = 1.6
_ROUGHNESS = (0.03, 0.3)  # how far outlines wander from an ellipse, in radii
_SOFTNESS_PX = (0.7, 3.0)  # from tissue to glass
_CLEARANCE_PX = 2.0  # from an object to where glass is bare
_LIGHT = (215.0, 250.0)  # of glass, unless the tile is brighter
_BRIGHTEST = 0.995  # share of a tile's pixels that are no brighter than its brightest
_TINT = 6.0  # of each colour, up or down
_MAX_GRAIN = 4.0  # deviation of noise on glass


def lay_glass(tile: LabelledTile, rng: np.random.Generator, *, diameter_px: float) -> LabelledTile:
    """Return the tile with holes of bare glass between its objects, which stay as they are.

    Not in the paper. A network that learned from photographs takes a bright hole in dark tissue for an
    object, and images that hardly have holes do not teach it otherwise.

    Args:
        tile: stained tissue on bright glass.
        rng: decides how many holes there are, and what they are like.
        diameter_px: of a typical object.
    """
    image = tile.image.astype(np.float32)
    opacity = (_draw_holes(len(image), diameter_px, rng) * _clearance(tile))[..., None]
    brightest = float(np.quantile(image.mean(axis=2), _BRIGHTEST))
    light = max(brightest, rng.uniform(*_LIGHT)) + rng.uniform(-_TINT, _TINT, 3)
    grain = rng.normal(0.0, rng.uniform(0.0, _MAX_GRAIN), opacity.shape)
    mixed = image * (1.0 - opacity) + (light + grain) * opacity
    return replace(tile, image=np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def _draw_holes(side: int, diameter_px: float, rng: np.random.Generator) -> Values:
    """Return (side, side), 1 in holes and 0 in tissue."""
    typical = diameter_px * draw_log(rng, _SIZES)
    longest = _TORN if rng.random() < _TEARS else _ROUND
    holes = np.zeros((side, side), np.float32)
    for _ in range(int(rng.integers(_HOLES[0], _HOLES[1] + 1))):
        size = min(typical * math.exp(rng.normal(0.0, _SPREAD)), _MAX_SIZE * diameter_px)
        elongation = draw_log(rng, (1.0, longest))
        depth = draw_outline(size, elongation, rng.uniform(0.0, math.pi), rng.uniform(*_ROUGHNESS), rng)
        hole = np.clip(depth / rng.uniform(*_SOFTNESS_PX) + 0.5, 0.0, 1.0)
        reach = len(hole)
        low, high = sorted((-reach / 4.0, side - 3.0 * reach / 4.0))  # it may be far larger than the tile
        x, y = (int(at) for at in rng.uniform(low, high, 2))
        place, part = clip_window(hole.shape, holes.shape, (y, x))
        holes[place] = np.maximum(holes[place], hole[part])
    return holes


def _clearance(tile: LabelledTile) -> Values:
    """Return (S, S), 0 on objects, doubtful ones too, and 1 away from them."""
    taken = tile.masks.any(axis=0)
    if tile.doubtful is not None:
        taken = taken | tile.doubtful.any(axis=0)
    if not taken.any():
        return np.ones(tile.image.shape[:2], np.float32)
    away = ndimage.distance_transform_edt(~taken) - 0.5
    return np.asarray(np.clip(away / _CLEARANCE_PX, 0.0, 1.0), np.float32)
