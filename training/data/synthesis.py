"""Synthesized tiles: an unlabelled tile whose nuclei are replaced by others, whose outlines are known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from darcnn.runtime.errors import InputError
from darcnn.training.data.inpaint import fill_holes
from darcnn.training.data.nuclei import Nucleus, NucleusRanges, plan_nuclei
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.target import TargetImages
from darcnn.training.data.texture import Stock, brightness, sample_texture, take_stock

__all__ = ["SynthesisOptions", "SynthesizedSource", "find_nuclei", "remove_nuclei", "synthesize_tile"]

Mask = NDArray[np.bool_]  # (H, W)
Values = NDArray[np.float32]

_MIN_CONTRAST = 18.0  # grey levels between nuclei and the rest, else the tile has none that we can find
_MIN_NUCLEI_PX = 50  # so many real pixels are needed for the texture of new ones
_MAX_HOLE = 0.9  # share of the tile: what is left must show the background
_FAINT = 0.4  # of the contrast between strong nuclei and the rest: what has more is a nucleus as well
# In diameters of a typical nucleus:
_SMOOTHING = 0.06
_AROUND = 4.0  # side of the square that a local threshold looks at
_OPENING = 0.08  # radius
_HALO = 0.15  # the blur around a nucleus, which goes with it
_FREE = 0.3  # texture of the background is fetched no nearer to a nucleus
_RIM = 0.08  # width of a nucleus' stronger edge
_STRENGTHS = (0.4, 2.0)  # the weakest and strongest of unequal nuclei, times the contrast of their texture
_WHITE = 0.99  # share of a bright tile's pixels that are not clipped
_MIN_STRENGTH = 0.5  # of the real nuclei's contrast, else no one could see a new nucleus
_LIGHT_MARGIN = 3.0  # grey levels by which new nuclei's ground may be lighter than nine in ten real ones'
_TRIES = 100  # tiles


@dataclass(frozen=True, slots=True)
class SynthesisOptions:
    """How tiles are synthesized."""

    diameter_px: float  # of a typical nucleus
    is_stained: bool  # dark with haematoxylin in three channels; else bright on dark, as in fluorescence,
    is_dark: bool = False  # or dark on bright: what of the negative holds
    ranges: NucleusRanges = field(default_factory=NucleusRanges)
    softness_px: tuple[float, float] = (1.0, 7.0)  # width of an edge: some tiles are out of focus
    rim: tuple[float, float] = (0.0, 0.25)  # how much stronger than its inside a nucleus' edge is
    transparency: float = 0.08  # deviation of how far the ground shines through, cut at 0.3
    unevenness: float = 0.5  # how far the logarithm of nuclei's strength deviates within a tile, at most
    adding: tuple[float, float] = (0.0, 1.0)  # where nuclei overlap: 0 the later one alone, 1 the sum of both


class SynthesizedSource:
    """A labelled source that needs no label: synthesized tiles made of crops of unlabelled images."""

    def __init__(self, targets: TargetImages, *, is_dark: bool | None = None) -> None:
        """Draw from `targets`, whose objects are darker than what surrounds them if `is_dark`.

        None: nobody knows; colours are then taken for stained tissue, grey for fluorescence.
        """
        self.targets = targets
        target = targets.target
        is_stained = target.channels == 3 and is_dark is not False
        self.options = SynthesisOptions(
            target.nominal_diameter_px, is_stained=is_stained, is_dark=bool(is_dark) and not is_stained
        )

    def tile(self, rng: np.random.Generator, tile_px: int) -> LabelledTile:
        """Return a synthesized tile with at least one nucleus.

        Raises:
            InputError: no nuclei were found in many crops of the images.
        """
        for _ in range(_TRIES):
            tile = synthesize_tile(self.targets.tile(rng, tile_px).image, rng, self.options)
            if len(tile.masks):
                return tile
        raise InputError(
            f"no nuclei found in {_TRIES} crops to synthesize tiles from",
            where=self.targets.target.sets[0].images,
            fix="correct target.nominal_diameter_px, or set source.synthetic_fraction and "
            "refine_stage.synthetic_every to 0",
        )


def synthesize_tile(
    image: NDArray[np.uint8], rng: np.random.Generator, options: SynthesisOptions
) -> LabelledTile:
    """Return the tile with other nuclei in place of its own, each with its mask.

    The synthesis of Hou et al. 2019 (Robust Histopathology Image Analysis: to Label or to Synthesize?,
    CVPR 2019), as far as it needs no network: background with the nuclei inpainted, random polygons,
    texture from real nuclei of the same tile, blended.

    Deviation: no network refines the result; one bright channel serves too. What a network joins are nuclei
    that overlap, out of focus, without a line between them, told apart by shape, by unequal strength, or by a
    lens in which both are seen: so nuclei are crowded, uneven, and may add up.

    Args:
        image: (H, W, 3) uint8, at the network's scale; not changed.
        rng: all that is random comes from it.
        options: the nominal diameter and the ranges.
    Returns:
        Image (H, W, 3) and masks (N, H, W), disjoint; no mask, and the image as it was, where no nuclei
        were found to take texture from, no background between them, or no place for new ones.
    """
    if options.is_dark:
        tile = synthesize_tile(255 - image, rng, replace(options, is_dark=False))
        return replace(tile, image=255 - tile.image)
    mask = find_nuclei(image, options)
    nothing = LabelledTile(image, np.zeros((0, *mask.shape), bool))
    if mask.sum() < _MIN_NUCLEI_PX:
        return nothing
    picture = image.astype(np.float32)
    background = remove_nuclei(picture, mask, rng, options)
    if background is None:
        return nothing
    ground = background[mask]
    stock = take_stock(picture, mask, ground=np.median(ground, axis=0), diameter_px=options.diameter_px)
    allowed = np.ones_like(mask)
    if options.is_stained:  # nuclei in tissue do not lie on empty glass
        lightest = float(np.quantile(brightness(ground), 0.9)) + _LIGHT_MARGIN
        allowed = brightness(background) <= lightest
    plan = plan_nuclei(allowed, options.diameter_px, options.ranges, rng)
    if not plan.nuclei:
        return nothing
    canvas = _paint(background, plan.nuclei, stock, rng, options)
    near = ndimage.uniform_filter(ndimage.maximum_filter(plan.owner > 0, 7).astype(np.float32), 5)
    canvas += near[..., None] * (_soften(canvas) - canvas)
    if not options.is_stained:  # the brightest nuclei are white, as the intensity rule has it
        canvas *= 255.0 / max(255.0, float(np.quantile(canvas, _WHITE)))
    return LabelledTile(np.rint(np.clip(canvas, 0.0, 255.0)).astype(np.uint8), plan.masks)


def find_nuclei(image: NDArray[np.uint8], options: SynthesisOptions) -> Mask:
    """Return (H, W), roughly where the nuclei of the image (H, W, 3) are: too much rather than too little.

    Haematoxylin by separation of the stains, or brightness; a threshold that follows the surroundings;
    small holes closed, and an opening. Nothing where there is next to no contrast.
    """
    grey = brightness(image)
    strength = rgb2hed(image.astype(np.float32) / 255.0)[..., 0] if options.is_stained else grey
    smooth = ndimage.gaussian_filter(strength, _SMOOTHING * options.diameter_px)
    nothing = np.zeros(grey.shape, bool)
    if smooth.min() == smooth.max():
        return nothing
    split = threshold_otsu(smooth)  # type: ignore[no-untyped-call]  # scikit-image leaves it untyped
    low, high = float(np.median(smooth[smooth <= split])), float(smooth[smooth > split].mean())
    level = low + _FAINT * (high - low)
    around = ndimage.uniform_filter(smooth, max(3, round(_AROUND * options.diameter_px)))
    mask = _close_holes(smooth > np.minimum(level, (level + around) / 2.0), options.diameter_px)
    mask = _open(mask, max(1, round(_OPENING * options.diameter_px)))
    if not mask.any() or mask.all() or abs(grey[mask].mean() - grey[~mask].mean()) < _MIN_CONTRAST:
        return nothing
    return mask


def _close_holes(mask: Mask, diameter_px: float) -> Mask:
    """Return the mask without holes smaller than half a nucleus: pale insides, not gaps between nuclei."""
    labels, _ = ndimage.label(~mask)
    is_small = np.bincount(labels.reshape(-1)) <= math.pi * diameter_px**2 / 8.0
    return np.asarray(mask | is_small[labels])


def _open(mask: Mask, radius: int) -> Mask:
    wide = ndimage.binary_opening(np.pad(mask, radius, mode="edge"), iterations=radius)
    return np.asarray(wide[radius:-radius, radius:-radius])


def remove_nuclei(
    image: Values, mask: Mask, rng: np.random.Generator, options: SynthesisOptions
) -> Values | None:
    """Return the image (H, W, 3) with what `mask` shows, and a margin, inpainted from its surroundings.

    Hou et al. 2019, background; the inpainting itself is ours (see `fill_holes`). None where there is too
    little left to inpaint from.
    """
    distance = np.asarray(ndimage.distance_transform_edt(~mask), np.float32)
    hole = distance <= _HALO * options.diameter_px
    if hole.mean() > _MAX_HOLE:
        return None
    free = distance > _FREE * options.diameter_px
    return fill_holes(image, hole, rng, reach_px=options.diameter_px, plain=free)


def _paint(
    background: Values,
    nuclei: list[Nucleus],
    stock: Stock,
    rng: np.random.Generator,
    options: SynthesisOptions,
) -> Values:
    """Return the background with the nuclei on it, the later over the earlier."""
    canvas = background.copy()
    softness, rim = rng.uniform(*options.softness_px), rng.uniform(*options.rim)
    edges_px = softness * rng.uniform(0.7, 1.4, size=len(nuclei))  # not all are equally in focus
    solid = 1.0 - np.minimum(0.3, np.abs(rng.normal(0.0, options.transparency, size=len(nuclei))))
    strength = np.exp(rng.normal(0.0, rng.uniform(0.0, options.unevenness), size=len(nuclei)))
    adding = rng.uniform(*options.adding)
    pixels = [np.nonzero(one.depth > -edge / 2.0) for one, edge in zip(nuclei, edges_px, strict=True)]
    depth = np.concatenate([one.depth[at] for one, at in zip(nuclei, pixels, strict=True)])  # (P,)
    corners = np.array([(one.y0, one.x0) for one in nuclei])
    middles = np.array([(one.centre[1], one.centre[0]) for one in nuclei])
    diameters = np.array([one.diameter_px for one in nuclei])
    n_pixels = np.array([len(at[0]) for at in pixels])

    def spread(values: NDArray[np.float64]) -> Values:
        return np.repeat(values.astype(np.float32), n_pixels, axis=0)

    places = np.concatenate([np.stack(at, axis=1) for at in pixels]) + np.repeat(corners, n_pixels, axis=0)
    offsets = (places + np.float32(0.5)).astype(np.float32) - spread(middles)
    skin = sample_texture(stock, offsets, n_pixels, diameters, rng)  # (P, 3)
    ground = background[places[:, 0], places[:, 1]]
    starts = np.cumsum(n_pixels) - n_pixels
    own = np.add.reduceat(skin, starts) / n_pixels[:, None]  # (N, 3)
    below = np.add.reduceat(ground, starts) / n_pixels[:, None]
    is_weak = (own - below).mean(axis=1) * stock.contrast < _MIN_STRENGTH * stock.contrast**2
    skin += spread(np.where(is_weak[:, None], stock.colour - own, 0.0))
    skin = ground + spread(np.clip(strength, *_STRENGTHS))[:, None] * (skin - ground)
    stronger = rim * np.exp(-np.square(np.maximum(depth, 0.0) / (_RIM * spread(diameters))))
    skin += stronger[:, None].astype(np.float32) * (skin - ground)
    alpha = (spread(solid) * np.clip(depth / spread(edges_px) + 0.5, 0.0, 1.0))[:, None]
    for start, n in zip(starts, n_pixels, strict=True):
        part = slice(start, start + n)
        y, x = places[part, 0], places[part, 1]
        under = canvas[y, x]
        hidden = under + adding * (ground[part] - under)
        canvas[y, x] = under + alpha[part] * (skin[part] - hidden)
    return canvas


def _soften(image: Values) -> Values:
    """Return the image (H, W, C) blurred a little: binomial, 1 2 1 along both sides."""
    for axis in (0, 1):
        line = np.moveaxis(image, axis, 0)
        line = np.concatenate([line[:1], line, line[-1:]])
        image = np.moveaxis(0.25 * line[:-2] + 0.5 * line[1:-1] + 0.25 * line[2:], 0, axis)
    return image
