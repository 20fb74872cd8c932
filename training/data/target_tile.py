"""A tile of an unlabelled image: a random crop at the network's scale, with its pseudo-labels."""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import label as number_regions

from darcnn.runtime.sampling import resize_box
from darcnn.training.data.source import LabelledTile
from darcnn.training.model.backbone import to_three_channels

__all__ = ["cut_tile"]

_Value = TypeVar("_Value", bound=np.generic)

_MIN_AREA_PX = 12  # network pixels: less of a pseudo-label is left out


def cut_tile(
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int32] | None,
    rng: np.random.Generator,
    *,
    tile_px: int,
    scale: float,
    jitter: float,
) -> LabelledTile:
    """Return a crop of an image, with its labels or none, scaled by up to `jitter` either way.

    An image that the tile is larger than is enlarged as far as `jitter` goes; beyond that its mirror image
    follows to the right and below, as in a run.

    Args:
        pixels: the image, (H, W, C).
        labels: its pseudo-labels, (H, W), negative where doubtful; the crop holds one, and the masks of all.
        rng: all that is random comes from it.
        tile_px: side of the tile, network pixels.
        scale: network pixels per image pixel.
        jitter: at least 1.
    """
    drawn = scale * math.exp(rng.uniform(-math.log(jitter), math.log(jitter)))
    shortest = min(pixels.shape[:2])
    drawn = max(drawn, min(tile_px / shortest, scale * jitter))
    if tile_px / drawn > shortest * (1.0 + 1e-9):
        side = math.ceil(tile_px / drawn)
        pixels = _mirror(pixels, side)
        labels = None if labels is None else _separate(_mirror(labels, side))
    height, width = pixels.shape[:2]
    extent = min(tile_px / drawn, width, height)  # the quotient may exceed them by rounding
    x, y = rng.uniform(0, width - extent), rng.uniform(0, height - extent)
    if labels is not None:
        x, y = _towards_object(labels, extent, x, y, rng)
    box = (x, y, x + extent, y + extent)
    size = (tile_px, tile_px)
    crop = _as_inputs(resize_box(pixels, box, size))
    if labels is None:
        return LabelledTile(crop, np.zeros((0, *size), bool))
    numbers = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST, box=box))
    present, areas = np.unique(numbers, return_counts=True)
    present = present[areas >= _MIN_AREA_PX]
    sure, doubtful = present[present > 0], present[present < 0]
    return LabelledTile(crop, numbers[None] == sure[:, None, None], numbers[None] == doubtful[:, None, None])


def _mirror(values: NDArray[_Value], side: int) -> NDArray[_Value]:
    """Return (H, W, ...) with its mirror image to the right and below, at least `side` each way."""
    height, width = values.shape[:2]
    beyond = [(0, max(0, side - height)), (0, max(0, side - width))] + [(0, 0)] * (values.ndim - 2)
    return np.pad(values, beyond, mode="reflect")


def _separate(labels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return mirrored `labels` with a number for each mirror image that lies apart from its object."""
    regions: NDArray[np.int32] = number_regions(labels, connectivity=2).astype(np.int32)  # type: ignore[no-untyped-call]
    return regions * np.sign(labels)


def _as_inputs(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (S, S, 3), what the network sees of (S, S, C); a tile holds bytes, so means are rounded."""
    inputs = to_three_channels(torch.from_numpy(crop).permute(2, 0, 1)[None].float())[0]  # (3, S, S)
    return np.ascontiguousarray(inputs.round().byte().permute(1, 2, 0).numpy())  # (S, S, 3)


def _towards_object(
    labels: NDArray[np.int32], side: float, x: float, y: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Return the crop's corner, moved so that the crop holds a labelled pixel drawn at random."""
    height, width = labels.shape
    rows, columns = np.nonzero(labels > 0)
    if len(rows) == 0:
        return x, y
    chosen = rng.integers(len(rows))
    x = float(np.clip(columns[chosen] - side * rng.uniform(0.1, 0.9), 0, width - side))
    y = float(np.clip(rows[chosen] - side * rng.uniform(0.1, 0.9), 0, height - side))
    return x, y
