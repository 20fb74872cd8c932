"""Random changes of training images: strong for photographs, the paper's for pseudo-labelled tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scipy import ndimage
from skimage.color import hed_from_rgb, rgb_from_hed

from darcnn.training.data.source import LabelledTile

__all__ = [
    "add_noise",
    "adjust_contrast",
    "augment_target",
    "randomise_source",
    "turn",
    "vary_stains",
    "vary_synthesized",
]

_BLUR_SIGMA = 1.0  # DARCNN, section 3.3
_CONTRAST = 1.5  # DARCNN, section 3.3: x -> clip(1.5 x - 150, 0, 255)
_SHIFT = 150.0
_TO_DEVIATION = 1.4826  # of normal noise, the standard over the median absolute deviation


def turn(tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
    """Return the tile mirrored and turned by quarters at random, image and masks alike."""
    quarters, mirrored = int(rng.integers(4)), bool(rng.integers(2))

    def turned(stack: NDArray[Any]) -> NDArray[Any]:
        """Turn (N, S, S, ...) in its second and third axis."""
        quartered = np.rot90(stack, quarters, axes=(1, 2))
        return np.ascontiguousarray(quartered[:, :, ::-1] if mirrored else quartered)

    return LabelledTile(
        turned(tile.image[None])[0],
        turned(tile.masks),
        None if tile.doubtful is None else turned(tile.doubtful),
    )


def randomise_source(
    tile: LabelledTile, rng: np.random.Generator, grey_fraction: float, invert: bool | None = None
) -> LabelledTile:
    """Return a photograph without its habits: polarity, colour, contrast, sharpness and noise are drawn anew.

    Not in the paper: targets are bright on black or dark on pink, and neither is a photograph. `invert` fixes
    the polarity of a source whose objects are known to be bright or dark (the paper inverts BBBC for Kumar).
    """
    tile = turn(tile, rng)
    image = tile.image.astype(np.float32)
    if rng.random() < grey_fraction:
        weights = rng.dirichlet((2.0, 2.0, 2.0)).astype(np.float32)
        image = np.repeat((image @ weights)[..., None], 3, axis=2)
    else:
        image = image[..., rng.permutation(3)]
        image = image * rng.uniform(0.7, 1.3, size=3).astype(np.float32) + rng.normal(0, 10, size=3).astype(
            np.float32
        )
    if rng.random() < 0.5 if invert is None else invert:
        image = 255.0 - image
    unit = np.clip(image / 255.0, 0.0, 1.0) ** np.exp(rng.uniform(-0.8, 0.8))
    image = np.asarray(unit * 255.0, np.float32)
    image = _blur(image, sigma=float(rng.choice([0.0, rng.uniform(0.3, 1.5)])))
    if rng.random() < 0.5:
        noise = rng.normal(0.0, rng.exponential(6.0), size=image.shape[:2])
        image = image + noise.astype(np.float32)[..., None]
    return LabelledTile(np.clip(image, 0, 255).astype(np.uint8), tile.masks)


def vary_synthesized(tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
    """Return a synthesized tile mirrored and turned, a little brighter or darker, stronger or weaker.

    No more than that: such a tile looks like the target already, and what `randomise_source` does to a
    photograph (polarity, colours) would take away the very thing it was made for.
    """
    tile = turn(tile, rng)
    gain, shift = rng.uniform(0.9, 1.1), rng.uniform(-8.0, 8.0)
    image = (tile.image.astype(np.float32) - 128.0) * gain + 128.0 + shift
    return LabelledTile(np.clip(image, 0, 255).astype(np.uint8), tile.masks)


def augment_target(tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
    """Return a pseudo-labelled tile as stage 2 sees it.

    DARCNN, section 3.3: Gaussian blur with sigma 1; contrast and brightness x -> clip(1.5 x - 150, 0, 255).
    Deviation: drawn at random in both directions up to those strengths, plus mirroring and quarter turns.
    """
    tile = turn(tile, rng)
    image = _blur(tile.image.astype(np.float32), sigma=float(rng.uniform(0.0, _BLUR_SIGMA)))
    strength = float(rng.uniform(-1.0, 1.0))
    return replace(tile, image=adjust_contrast(image, strength))


def vary_stains(tile: LabelledTile, rng: np.random.Generator, *, most: float) -> LabelledTile:
    """Return the tile as another laboratory might have stained and scanned it.

    Not in the paper: Tellez et al. 2018 (arXiv:1808.05896). The optical density is separated into
    haematoxylin, eosin and a rest (Ruifrok and Johnston 2001), and each is multiplied by a factor of its own
    and shifted.

    Args:
        tile: colours on bright glass.
        rng: decides how each stain changes.
        most: factors are 1 - `most` to 1 + `most`, shifts -`most` to `most`, in natural optical density.
    """
    density = -np.log(np.maximum(tile.image.astype(np.float32), 1.0) / 255.0)  # (S, S, 3)
    factor, shift = rng.uniform(1.0 - most, 1.0 + most, 3), rng.uniform(-most, most, 3)
    stains = (density @ hed_from_rgb) * factor + shift
    image = 255.0 * np.exp(-(stains @ rgb_from_hed))
    return replace(tile, image=np.clip(np.rint(image), 0, 255).astype(np.uint8))


def add_noise(tile: LabelledTile, rng: np.random.Generator, *, most: float, grain_px: float) -> LabelledTile:
    """Return the tile with more noise, as a volume taken with fewer electrons has it.

    Not in the paper. The noise of the tile itself, the robust deviation of its grey levels, is the measure:
    up to `most` times as much is added, as coarse as smoothing leaves it, and the contrast is taken back, as
    the intensity rule does for a noisier volume.

    Args:
        tile: a slab of a volume, mostly ground.
        rng: decides how much, and the noise.
        most: deviation of what is added, in deviations of the tile; sqrt(3) doubles the noise.
        grain_px: standard deviation of the Gaussian that smoothed the planes, network pixels.
    """
    share = float(rng.uniform(0.0, most))
    image = tile.image.astype(np.float32)
    middle = np.median(image, axis=(0, 1))
    deviation = _TO_DEVIATION * np.median(np.abs(image - middle), axis=(0, 1))  # (C,)
    noise = ndimage.gaussian_filter(rng.normal(size=image.shape[:2]), grain_px, mode="wrap")
    noise = (noise / max(float(noise.std()), 1e-6)).astype(np.float32)[..., None]
    mixed = middle + (image - middle + share * deviation * noise) / np.sqrt(1.0 + share**2)
    return replace(tile, image=np.clip(mixed, 0, 255).astype(np.uint8))


def adjust_contrast(image: NDArray[np.float32], strength: float) -> NDArray[np.uint8]:
    """Return clip(c x - b, 0, 255) with c and b the paper's at `strength` 1 and their inverse at -1.

    DARCNN, section 3.3. At strength 1 this is clip(1.5 x - 150, 0, 255); at -1 it is (x + 150) / 1.5, so that
    the second undoes the first where nothing was clipped.

    >>> adjust_contrast(np.array([100.0, 200.0, 250.0], np.float32), 1.0)
    array([  0, 150, 225], dtype=uint8)
    """
    contrast = 1.0 + (_CONTRAST - 1.0) * abs(strength)
    shift = _SHIFT * abs(strength)
    changed = contrast * image - shift if strength >= 0 else (image + shift) / contrast
    return np.asarray(np.clip(changed, 0, 255), dtype=np.uint8)


def _blur(image: NDArray[np.float32], *, sigma: float) -> NDArray[np.float32]:
    if sigma < 0.1:
        return image
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(sigma)), np.float32)
