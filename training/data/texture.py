"""What the nuclei of a tile look like inside, and new nuclei made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

__all__ = ["Stock", "brightness", "sample_texture", "take_stock"]

Mask = NDArray[np.bool_]  # (H, W)
Values = NDArray[np.float32]

_CORE = 0.15  # so many diameters inside its outline a nucleus is free of blur from outside
_APART = 0.4  # in diameters, how far the middles of nuclei are apart at least
_STRONGEST = 0.98  # quantile of contrast that counts as full strength
_PALE = 0.25  # of full strength: what has less is a gap, not a nucleus
_CLEAR = 0.5  # a nucleus whose middle has less lends no texture
_MIN_RADIUS = 0.15  # in diameters; thinner things lend none either, where there are others
_FITS = 1.1  # a new nucleus may be so much larger than the circle of its texture, else that is enlarged
_SCALES = (0.4, 1.2)  # pixels of texture a pixel of the new nucleus


@dataclass(frozen=True, slots=True)
class Stock:
    """Real nuclear pixels of one tile. `texture` (H, W, 3) goes on beyond nuclei, mirrored at their edge."""

    texture: Values
    middles: NDArray[np.int64]  # (K, 2), y x, of circles inside nuclei
    radii_px: Values  # (K,), of those circles
    colour: Values  # (3,), typical
    contrast: float  # grey levels from the ground to that, below 0 where nuclei are dark


def brightness(image: NDArray[np.uint8] | Values) -> Values:
    """Return the mean of red, green and blue, (..., 3) -> (...)."""
    return np.asarray(image.astype(np.float32) @ np.full(3, 1.0 / 3.0, np.float32))


def take_stock(image: Values, mask: Mask, *, ground: Values, diameter_px: float) -> Stock:
    """Return the real nuclear pixels that `mask` (H, W; not empty) shows in the image (H, W, 3).

    `ground` (3,) is the colour of what lies between nuclei. Strength is how far a pixel is from it on the way
    to the strongest pixels, so that dirt of another colour lends nothing.
    """
    away = image - ground
    contrast = np.abs(brightness(away))
    axis = away[mask & (contrast >= np.quantile(contrast[mask], _STRONGEST))].mean(axis=0)
    strength = away @ (axis / max(float(axis @ axis), 1e-6))
    half = ndimage.distance_transform_edt(np.pad(_halve(mask), 1))[1:-1, 1:-1]
    inside = 2.0 * np.asarray(half, np.float32)  # in steps of two pixels: four times as fast
    deep = np.repeat(np.repeat(inside > min(_CORE * diameter_px, inside.max() / 2.0), 2, 0), 2, 1)
    deep = deep[: mask.shape[0], : mask.shape[1]]
    core = _first_of(deep & (strength >= _PALE), deep)
    peaks = inside == ndimage.maximum_filter(inside, 2 * round(_APART * diameter_px / 4.0) + 1)
    peaks &= deep[::2, ::2]
    peaks = _first_of(peaks & (strength[::2, ::2] >= _CLEAR), peaks)
    peaks = _first_of(peaks & (inside >= _MIN_RADIUS * diameter_px), peaks)
    colour = np.median(image[_first_of(core & (strength >= _CLEAR), core)], axis=0)
    return Stock(
        texture=_mirror_outwards(image, core),
        middles=2 * np.argwhere(peaks),
        radii_px=inside[peaks],
        colour=colour,
        contrast=float(colour.mean() - ground.mean()),
    )


def _first_of(wanted: Mask, otherwise: Mask) -> Mask:
    return wanted if wanted.any() else otherwise


def _halve(mask: Mask) -> Mask:
    """Return which blocks of 2 x 2 pixels show something."""
    even = np.pad(mask, ((0, mask.shape[0] % 2), (0, mask.shape[1] % 2)))
    rows = even[::2] | even[1::2]
    return np.asarray(rows[:, ::2] | rows[:, 1::2])


def _mirror_outwards(image: Values, core: Mask) -> Values:
    """Return the image with pixels outside `core` mirrored at its edge, or copied from there."""
    height, width = core.shape
    nearest = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    y = np.clip(2 * nearest[0] - np.arange(height)[:, None], 0, height - 1)
    x = np.clip(2 * nearest[1] - np.arange(width), 0, width - 1)
    real = core[y, x]
    return np.asarray(image[np.where(real, y, nearest[0]), np.where(real, x, nearest[1])])


def sample_texture(
    stock: Stock,
    offsets: Values,
    n_pixels: NDArray[np.int64],
    diameters_px: Values,
    rng: np.random.Generator,
) -> Values:
    """Return texture for N new nuclei, each from another circle of the stock, turned and mirrored at random.

    Texture is enlarged where its circle is smaller than the new nucleus.

    Args:
        offsets: (P, 2), y x, px, of pixels from the middle of their nucleus; nucleus 0's first, and so on.
        n_pixels: (N,), how many of them each nucleus has.
        diameters_px: (N,).
    Returns:
        (P, 3).
    """
    n_nuclei = len(n_pixels)
    weights = stock.radii_px.astype(np.float64) ** 2
    chosen = rng.choice(len(weights), size=n_nuclei, p=weights / weights.sum())
    scale = np.clip(2.0 * _FITS * stock.radii_px[chosen] / diameters_px, *_SCALES)
    angle = rng.uniform(0.0, 2.0 * math.pi, size=n_nuclei)
    mirror = rng.choice((-1.0, 1.0), size=n_nuclei)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turns = np.stack([cos, mirror * sin, -sin, mirror * cos], axis=1).astype(np.float32)  # (N, 4)
    turn = np.repeat(turns, n_pixels, axis=0)  # (P, 4)
    middle = np.repeat(stock.middles[chosen].astype(np.float32), n_pixels, axis=0)  # (P, 2)
    y = middle[:, 0] + offsets[:, 0] * turn[:, 0] + offsets[:, 1] * turn[:, 1]
    x = middle[:, 1] + offsets[:, 0] * turn[:, 2] + offsets[:, 1] * turn[:, 3]
    return _sample(stock.texture, y, x)


def _sample(image: Values, y: Values, x: Values) -> Values:
    """Return (P, C): the image (H, W, C) at (y, x), linear between pixels, mirrored at its borders."""
    height, width, channels = image.shape
    y, x = _reflect(y, height), _reflect(x, width)
    row, column = y.astype(np.int64), x.astype(np.int64)
    down, right = (y - row).astype(np.float32)[:, None], (x - column).astype(np.float32)[:, None]
    pixels = image.reshape(-1, channels)
    first = row * width + column
    upper = pixels[first] * (1 - right) + pixels[first + 1] * right
    lower = pixels[first + width] * (1 - right) + pixels[first + width + 1] * right
    return np.asarray(upper * (1 - down) + lower * down)


def _reflect(position: Values, length: int) -> Values:
    """Return positions folded into 0 .. length - 1, the end excluded, each at most one length outside."""
    last = np.float32(length - 1.001)
    return np.asarray(np.clip(last - np.abs(last - np.abs(position)), 0.0, last))
