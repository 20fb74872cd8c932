"""How large are the objects of this image? The model itself is asked, at several scales."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.intensity import Window, looks_like_noise
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.planning import SlidePlan, to_level0
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.sampling import sample_slide, spread_evenly
from darcnn.runtime.tiling import Tile

if TYPE_CHECKING:
    from darcnn.runtime.segmenter import Segmenter

Findings = tuple[NDArray[np.float64], NDArray[np.float64]]  # sizes in level-0 pixels, weights
Look = Callable[[float], Findings]  # network pixels per level-0 pixel -> what is found

__all__ = [
    "choose_diameter",
    "estimate_diameter",
    "finds_unasked",
    "is_size_measured",
    "look_for_sizes",
    "settle_diameter",
]

_SCALES = (0.5, 1.0, 2.0)  # network pixels per pixel of the image in the first look
_COARSE = 0.25  # ... and where few large objects may be outvoted by many small ones
_FAR = 1.5  # that the larger size must be larger by
_TILES = 2  # looked at per scale, spread over the image
_FEW_TILES, _MORE_TILES = 64, 8  # an image of more tiles in full may be empty in most places
_CORES_A_TILE = 32  # so that measuring takes little beside the run
_GOLDEN = (5.0**0.5 - 1.0) / 2.0  # its multiples, without their whole parts, lie far from one another
_TRUST = 0.7  # a finding whose size is off the nominal one by this factor's exponential counts 0.6
_MIN_FINDINGS = 1.5  # total weight below which the model does not know
_EDGE_PX = 2.0  # a box this close to an edge is cut
_MIN_SCORE = 1e-6  # of a slot that is not empty


def estimate_diameter(
    segmenter: Segmenter,
    reader: Reader,
    *,
    channel: int | None = None,
    window: Window | None = None,
    touches: Callable[[Region], bool] | None = None,
) -> float | None:
    """Return the diameter of a typical object in level-0 pixels, or None if the model finds too little.

    The image is searched at a quarter, half, full and double size. Each finding votes for its size with its
    squared score, and the more the nearer its size on the network is to the nominal one, which the model
    knows best; the weighted median wins (`settle_diameter`). One more look at the scale that it suggests
    sharpens it. Two tiles are looked at in each, of a large image up to eight of those on its ground, so that
    the time does not grow with the image.

    Where brightness is spread like noise alone there is nothing to measure: enlarged until its grains look
    like nuclei, smooth noise is full of them.

    A box is a little larger than its object, and large objects are found more easily: a model that was
    told the size of its objects in training says itself for what it takes these (`found_diameter_px`).

    Args:
        segmenter: the model.
        reader: the open image; stays open.
        channel: which of several channels.
        window: raw values that become black and white; None: those of the image.
        touches: tells whether a region, level-0 pixels, holds ground of a large image; None: all of it is.
    Raises:
        InputError: the image or its channels do not serve.
    """
    model = segmenter.manifest.input
    if model.intensity.needs_statistics:  # else black and white are told by more than the image itself
        sample = sample_slide(reader, scale=1.0, channels=model.channels, channel=channel)
        if looks_like_noise(sample):
            return None
    if window is None and len(reader.info.levels) == 1:  # then it is the same at every scale
        plan = segmenter.plan(reader.info, diameter_px=model.nominal_diameter_px, channel=channel)
        window = segmenter.measure(reader, plan)

    def look(scale: float) -> Findings:
        return look_for_sizes(segmenter, reader, scale, channel=channel, window=window, touches=touches)

    return settle_diameter(model, look)


def settle_diameter(model: ModelInput, look: Look) -> float | None:
    """Return the diameter that looks at several scales tell, level-0 pixels, or None if they tell too little.

    Hundreds of specks outvote ten nuclei. So the findings vote a second time, each with its size, and at a
    quarter of the size too; where that says something far larger, it is right.

    Args:
        model: what is looked with.
        look: at one scale.
    """
    coarse, *seen = [look(scale) for scale in (_COARSE, *_SCALES)]
    diameter, large = _typical(seen, by_size=False), _typical([coarse, *seen], by_size=True)
    is_outvoted = large is not None and (diameter is None or large > _FAR * diameter)
    if is_outvoted:
        diameter = large
    if diameter is None:
        return None
    closer = _typical([look(_found(model) / diameter)], by_size=is_outvoted)
    return (diameter if closer is None else closer) * (model.nominal_diameter_px / _found(model))


def choose_diameter(
    segmenter: Segmenter,
    reader: Reader,
    *,
    diameter_px: float | Literal["auto"] | None,
    mpp: float | None = None,
    pixels: bool = False,
    channel: int | None = None,
    window: Window | None = None,
    touches: Callable[[Region], bool] | None = None,
) -> float | None:
    """Return the diameter to plan with, level-0 pixels; None leaves the scale to the pixel size.

    Args:
        segmenter: the model.
        reader: the open image; stays open.
        diameter_px: what the user gave; "auto" asks for an estimate.
        mpp: micrometres per pixel that the user gave.
        pixels: the user wants the pixels as they are. Where neither tells the model its scale, one that is
            made for it estimates unasked (`finds_unasked`).
        channel: which of several channels.
        window: raw values that become black and white; None: those of the image.
        touches: as for `estimate_diameter`.
    """
    if diameter_px is not None and diameter_px != "auto":
        return diameter_px
    model, has_pixel_size = segmenter.manifest.input, reader.info.mpp is not None or mpp is not None
    if not is_size_measured(model, diameter_px, pixels=pixels, has_pixel_size=has_pixel_size):
        return None
    found = estimate_diameter(segmenter, reader, channel=channel, window=window, touches=touches)
    if found is None and model.mpp is not None and not has_pixel_size and not pixels:
        return model.nominal_diameter_px  # an empty picture: nothing else tells its scale
    return found


def is_size_measured(
    model: ModelInput,
    diameter_px: float | Literal["auto"] | None,
    *,
    pixels: bool,
    has_pixel_size: bool,
) -> bool:
    """Tell whether the objects' size is measured: asked for, or where nothing else tells the scale."""
    is_unasked = diameter_px is None and not pixels and finds_unasked(model, has_pixel_size)
    return diameter_px == "auto" or is_unasked


def finds_unasked(model: ModelInput, has_pixel_size: bool) -> bool:
    """Tell whether a model estimates the diameter unasked: not if two pixel sizes tell the scale."""
    return model.finds_diameter and (model.mpp is None or not has_pixel_size)


def _found(model: ModelInput) -> float:
    """Return what the model takes objects of the nominal diameter for, network pixels."""
    return model.nominal_diameter_px if model.found_diameter_px is None else model.found_diameter_px


def look_for_sizes(
    segmenter: Segmenter,
    reader: Reader,
    scale: float,
    *,
    channel: int | None = None,
    window: Window | None = None,
    touches: Callable[[Region], bool] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sizes of what is found at one scale, level-0 pixels, and the weight of each.

    Args:
        segmenter: the model.
        reader: the open image; stays open.
        scale: network pixels per level-0 pixel.
        channel: which of several channels.
        window: raw values that become black and white; None: those of the image.
        touches: as for `estimate_diameter`.
    """
    model, engine = segmenter.manifest.input, segmenter.engine
    try:
        plan = segmenter.plan(reader.info, diameter_px=model.nominal_diameter_px / scale, channel=channel)
    except InputError:
        if scale == 1.0:
            raise
        return np.zeros(0), np.zeros(0)  # so small or large an image has no such scale
    window = segmenter.measure(reader, plan) if window is None else window
    sampler = segmenter.sampler(reader, plan, window)
    tiles = _choose_tiles(model, plan, reader.info, touches)
    boxes, scores = [], []
    for start in range(0, len(tiles), engine.spec.batch):
        group = tiles[start : start + engine.spec.batch]
        batch = np.zeros((engine.spec.batch, model.tile_px, model.tile_px, model.channels), np.uint8)
        batch[: len(group)] = np.stack([sampler.read(tile) for tile in group])
        found = segmenter.detect(batch)
        for index, tile in enumerate(group):
            box, score = found.boxes[index].astype(np.float64), found.scores[index].astype(np.float64)
            # cut by its tile, or by the edge of the image, beyond which lies its mirror image
            low = np.maximum([0, 0], [-tile.read.x0, -tile.read.y0]) + _EDGE_PX
            high = (
                np.minimum(model.tile_px, [plan.width - tile.read.x0, plan.height - tile.read.y0]) - _EDGE_PX
            )
            good = score >= max(segmenter.min_score, _MIN_SCORE)
            good &= (box[:, :2] > low).all(axis=1) & (box[:, 2:] < high).all(axis=1)
            boxes.append(box[good])
            scores.append(score[good])
    box, score = np.concatenate(boxes), np.concatenate(scores)
    size = np.sqrt(np.prod(np.maximum(box[:, 2:] - box[:, :2], 1e-3), axis=1))  # network px
    off = np.log(size / _found(model)) / _TRUST
    return size / plan.scale, score**2 * np.exp(-0.5 * off**2)


def _choose_tiles(
    model: ModelInput, plan: SlidePlan, info: SlideInfo, touches: Callable[[Region], bool] | None
) -> list[Tile]:
    """Return the tiles to look at: two, or up to eight on the ground of a large image, far apart."""
    core_px = model.tile_px - 2 * model.halo_px
    n_cores = info.width_px0 * info.height_px0 // core_px**2
    if n_cores <= _FEW_TILES:
        return spread_evenly(plan.tiles, _TILES)
    ground = [tile for tile in plan.tiles if touches is None or touches(to_level0(tile.core, plan, info))]
    chosen = ground or plan.tiles
    # even steps would all lie in one column where the number of rows is a multiple of them
    n_tiles = min(_MORE_TILES, n_cores // _CORES_A_TILE)
    places = ((number * _GOLDEN) % 1.0 for number in range(1, n_tiles + 1))
    return list(dict.fromkeys(chosen[int(len(chosen) * place)] for place in places))


def _typical(seen: Sequence[Findings], *, by_size: bool) -> float | None:
    """Return the median of the sizes of findings by their weight, None where that is too little to tell.

    >>> many = (np.array([4.0] * 9 + [40.0] * 2), np.ones(11))
    >>> _typical([many], by_size=False), _typical([many], by_size=True)
    (4.0, 40.0)
    """
    sizes, weights = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    if weights.sum() < _MIN_FINDINGS:
        return None
    order = np.argsort(sizes, kind="stable")
    reached = np.cumsum((weights * sizes if by_size else weights)[order])
    return float(sizes[order][np.searchsorted(reached, 0.5 * reached[-1])])
