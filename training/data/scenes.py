"""Scenes: many objects cut out of photographs on one background, as dense as a field of cells.

COCO shows seven objects an image, a histology tile a hundred. A scene keeps COCO's
objects and outlines, and changes their number, their size and what lies between them. It needs no
label of any target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from darcnn.training.data.source import Cutout, LabelledTile

__all__ = ["make_scene"]

_MIN_CONTRAST = 18.0  # grey levels between an object and the background, else no one could see it
_MAX_HIDDEN = 0.3  # an object may lose this share of its area to later ones, else the later one is left out
_MIN_AREA_PX = 30


def make_scene(
    cutouts: Sequence[Cutout], rng: np.random.Generator, tile_px: int, diameter_px: tuple[float, float]
) -> LabelledTile:
    """Return a scene, `tile_px` a side, whose objects have one typical size drawn from `diameter_px`."""
    canvas = _background(rng, tile_px)
    typical = math.exp(rng.uniform(*np.log(diameter_px)))
    spread = rng.uniform(0.05, 0.35)
    density = rng.uniform(0.05, 0.55)  # share of the tile that objects cover
    wanted = max(1, min(120, round(density * tile_px**2 / (math.pi * typical**2 / 4))))
    tone = _tone(rng, canvas)
    flatness = rng.uniform(0.0, 1.0)
    few = [cutouts[i] for i in rng.integers(len(cutouts), size=min(12, wanted))]
    owner = np.zeros((tile_px, tile_px), np.int32)
    areas: list[int] = []
    for _ in range(wanted):
        size = typical * math.exp(rng.normal(0.0, spread))
        image, alpha = _shape(few[rng.integers(len(few))], size, rng)
        height, width = alpha.shape
        ranges = [(-side // 3, tile_px - side + side // 3 + 1) for side in (width, height)]
        if any(low >= high for low, high in ranges):  # it is far larger than the tile
            continue
        x, y = (int(rng.integers(*ends)) for ends in ranges)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, tile_px), min(y + height, tile_px)
        if x1 - x0 < 3 or y1 - y0 < 3:
            continue
        image, alpha = image[y0 - y : y1 - y, x0 - x : x1 - x], alpha[y0 - y : y1 - y, x0 - x : x1 - x]
        mask = alpha > 0.5
        under = owner[y0:y1, x0:x1]
        if mask.sum() < _MIN_AREA_PX or (under[mask] > 0).mean() > _MAX_HIDDEN or _hides(under, mask, areas):
            continue
        areas.append(int(mask.sum()))
        under[mask] = len(areas)
        painted = _paint(image, mask, tone, flatness, rng)
        place = canvas[y0:y1, x0:x1]
        place += alpha[..., None] * (painted - place)
    masks = owner[None] == np.arange(1, len(areas) + 1)[:, None, None]
    kept = masks.sum(axis=(1, 2)) >= _MIN_AREA_PX
    return LabelledTile(np.clip(canvas, 0, 255).astype(np.uint8), masks[kept])


def _background(rng: np.random.Generator, tile_px: int) -> NDArray[np.float32]:
    """Return (S, S, 3): a colour with a slow gradient and a texture of random strength and grain."""
    colour = rng.uniform(10, 245, size=3) if rng.random() < 0.5 else np.repeat(rng.uniform(5, 250), 3)
    canvas = np.ones((tile_px, tile_px, 3), np.float32) * colour.astype(np.float32)
    slow = _noise(rng, tile_px, grain=tile_px / 3)
    fine = _noise(rng, tile_px, grain=float(rng.choice([2, 4, 8, 16])))
    canvas += slow[..., None] * rng.uniform(0, 20) + fine[..., None] * rng.exponential(6.0)
    return canvas


def _noise(rng: np.random.Generator, tile_px: int, grain: float) -> NDArray[np.float32]:
    """Return (S, S) smooth noise of unit deviation whose spots are about `grain` pixels wide."""
    cells = max(2, round(tile_px / grain))
    small = rng.normal(size=(cells, cells)).astype(np.float32)
    picture = Image.fromarray(small).resize((tile_px, tile_px), Image.Resampling.BICUBIC)
    noise = np.asarray(picture)
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)


def _tone(rng: np.random.Generator, canvas: NDArray[np.float32]) -> NDArray[np.float32] | None:
    """Return a colour that the objects of this scene share, away from the background; or None: their own."""
    if rng.random() < 0.35:
        return None
    background = canvas.mean(axis=(0, 1))
    room = np.array([float(background.mean()), 255.0 - float(background.mean())])
    sign = -1.0 if rng.random() < room[0] / room.sum() else 1.0
    strength = rng.uniform(_MIN_CONTRAST, max(_MIN_CONTRAST + 1, 0.9 * room[int(sign > 0)]))
    tint = rng.normal(0.0, 10.0, size=3)
    return np.asarray(background + sign * strength + tint, dtype=np.float32)


def _shape(
    cutout: Cutout, size: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the cut-out at diameter `size`, turned and mirrored: image (h, w, 3) and soft mask (h, w)."""
    scale = size / cutout.diameter_px
    height, width = cutout.mask.shape
    # objects in photographs are longer than cells: squeeze them towards a square, keeping their area
    squeeze = (width / height) ** (0.5 * rng.uniform(0.0, 1.0))
    new = (max(3, round(width * scale / squeeze)), max(3, round(height * scale * squeeze)))
    image = Image.fromarray(cutout.image).resize(new, Image.Resampling.BILINEAR)
    alpha = Image.fromarray(cutout.mask.view(np.uint8) * 255).resize(new, Image.Resampling.BILINEAR)
    angle = float(rng.uniform(0, 360))
    image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    alpha = alpha.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.7:  # cells have soft, round outlines
        alpha = alpha.filter(ImageFilter.GaussianBlur(size * rng.uniform(0.02, 0.16)))
    return np.asarray(image, np.float32), np.asarray(alpha, np.float32) / 255.0


def _hides(under: NDArray[np.int32], mask: NDArray[np.bool_], areas: list[int]) -> bool:
    """Tell whether the mask would hide too much of an object that lies there already."""
    numbers, counts = np.unique(under[mask], return_counts=True)
    return any(n > 0 and c > _MAX_HIDDEN * areas[n - 1] for n, c in zip(numbers, counts, strict=True))


def _paint(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    tone: NDArray[np.float32] | None,
    flatness: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Return the object in the scene's tone, its own texture flattened as much as the scene's objects are."""
    own = image[mask].mean(axis=0)
    texture = (image - own) * (1.0 - flatness)
    if tone is None:
        return np.asarray(own + texture, dtype=np.float32)
    grey = texture.mean(axis=2, keepdims=True)
    return np.asarray(tone * rng.uniform(0.9, 1.1) + 0.6 * grey, dtype=np.float32)
