"""Holes in a picture, filled from what surrounds them: colour by slow change, texture from real pixels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill_holes"]

Mask = NDArray[np.bool_]  # (H, W)
Values = NDArray[np.float32]  # (H, W, C)

_SLOW_LEVEL = 3  # what is coarser than 2**3 px counts as colour, what is finer as texture
_COARSEST_PX = 4  # the pyramid ends at this side
_TRIES = 16  # shifts at which a pixel looks for texture before it stays smooth


def fill_holes(
    image: Values, hole: Mask, rng: np.random.Generator, *, reach_px: float, plain: Mask | None = None
) -> Values:
    """Return the image with every pixel of `hole` replaced, as if its surroundings went on there.

    Colour comes from a pyramid of averages over the pixels outside the hole, each level handing down what
    the finer one lacks. Texture is what such averages leave of real pixels, fetched at a few shifts that
    many neighbours share, so that its grain stays whole.

    Args:
        image: (H, W, C) float32.
        hole: (H, W), not everywhere.
        rng: draws the shifts.
        reach_px: how far away texture is fetched, about.
        plain: (H, W), whose texture may be fetched; None: all outside the hole.
    Returns:
        (H, W, C) float32, equal to `image` outside the hole; values may leave the range of bytes.

    >>> hole = np.zeros((8, 8), bool)
    >>> hole[2:5, 2:5] = True
    >>> damaged = np.where(hole[..., None], np.float32(0), np.float32(7))
    >>> bool(np.allclose(fill_holes(damaged, hole, np.random.default_rng(0), reach_px=3.0), 7.0))
    True
    """
    height, width, channels = image.shape
    slow = _slow_colour(image, ~hole).reshape(-1, channels)
    texture = image.reshape(-1, channels) - slow
    usable = (~hole if plain is None else plain & ~hole).reshape(-1)
    waiting = np.flatnonzero(hole)
    for _ in range(_TRIES):
        angle, reach = rng.uniform(0.0, 2.0 * math.pi), reach_px * rng.uniform(0.5, 2.0)
        shift = round(reach * math.sin(angle)) * width + round(reach * math.cos(angle))
        fetched = waiting + shift % (height * width)
        fetched[fetched >= height * width] -= height * width  # round to the other border
        found = usable[fetched]
        slow[waiting[found]] += texture[fetched[found]]
        waiting = waiting[~found]
    return np.where(hole[..., None], slow.reshape(image.shape), image)


def _slow_colour(image: Values, known: Mask) -> Values:
    """Return (H, W, C), smooth: the averages of known pixels, at the finest level that has some."""
    height, width, _ = image.shape
    step = 2**_SLOW_LEVEL
    pad = ((0, -height % step), (0, -width % step), (0, 0))
    weight = np.pad(known[..., None].astype(np.float32), pad)
    colour = np.pad(image, pad) * weight
    for _ in range(_SLOW_LEVEL):
        colour, weight = _halve(colour), _halve(weight)
    slow = _hand_down(colour, weight)
    for _ in range(_SLOW_LEVEL):
        slow = _double(slow)
    return np.ascontiguousarray(slow[:height, :width])


def _hand_down(colour: Values, weight: Values) -> Values:
    """Return colour divided by weight; where weight is small, mixed with the same of the coarser level."""
    own = colour / np.maximum(weight, 1e-6)
    if min(colour.shape[:2]) <= _COARSEST_PX:
        coarse = colour.sum(axis=(0, 1)) / max(float(weight.sum()), 1e-6)
    else:
        odd = ((0, colour.shape[0] % 2), (0, colour.shape[1] % 2), (0, 0))
        below = _hand_down(_halve(np.pad(colour, odd)), _halve(np.pad(weight, odd)))
        coarse = _double(below)[: colour.shape[0], : colour.shape[1]]
    trust = np.minimum(1.0, 2.0 * weight)
    return np.asarray(trust * own + (1.0 - trust) * coarse, dtype=np.float32)


def _halve(values: Values) -> Values:
    """Return the means of 2 x 2 pixels, (H / 2, W / 2, C); both sides are even."""
    rows = values[::2] + values[1::2]
    return np.asarray((rows[:, ::2] + rows[:, 1::2]) * np.float32(0.25))


def _double(values: Values) -> Values:
    """Return (2 H, 2 W, C), linear between the centres of the pixels."""
    for axis in (0, 1):
        near = np.moveaxis(values, axis, 0)
        line = np.concatenate([near[:1], near, near[-1:]])
        doubled = np.empty((2 * len(near), *near.shape[1:]), np.float32)
        doubled[::2] = 0.25 * line[:-2] + 0.75 * line[1:-1]
        doubled[1::2] = 0.75 * line[1:-1] + 0.25 * line[2:]
        values = np.moveaxis(doubled, 0, axis)
    return values
