"""Tiles that are looked at once more: those that hold too many objects, and those that cut a large one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import DamagedPixelsError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import drop_covered
from darcnn.runtime.placement import is_small_enough
from darcnn.runtime.sampling import SampledTile
from darcnn.runtime.seams import join_tiles
from darcnn.runtime.tiling import SEAM_PX, Tile, owns

__all__ = ["look_at_quarters", "look_wider", "quarter_tile", "widen"]

_COVERED = 0.5  # share of a cut object's box in that of the whole

Look = Callable[[Sequence[SampledTile]], list[Instances]]


def look_at_quarters(look: Look, sampled: SampledTile, *, halo_px: int, batch: int) -> Instances:
    """Return the objects of a tile that holds as many as the model can report, looked at quarter by quarter.

    A quarter shows half of the objects or fewer, so that four times as many can be reported. `is_saturated`
    says that a quarter is full as well.

    Args:
        look: finds what up to `batch` tiles report.
        sampled: the tile.
        halo_px: of the model's tiles.
        batch: of the engine.
    """
    quarters = quarter_tile(sampled, halo_px)
    found: list[tuple[Tile, Instances]] = []
    for start in range(0, len(quarters), batch):
        some = quarters[start : start + batch]
        found += zip([one.tile for one in some], look(some), strict=True)
    return drop_covered(join_tiles(sampled.plan, sampled.shape, found))


def quarter_tile(sampled: SampledTile, halo_px: int) -> list[SampledTile]:
    """Return the quarters of a tile's core as tiles of their own, numbered from 0, each with its halo.

    What is left of their pixels has the median colour: mirrored pixels would bring more objects.
    """
    core, read = sampled.tile.core, sampled.tile.read
    middle_x, middle_y = (core.x0 + core.x1) // 2, (core.y0 + core.y1) // 2
    quarters: list[SampledTile] = []
    for y0, y1 in pairwise((core.y0, middle_y, core.y1)):
        for x0, x1 in pairwise((core.x0, middle_x, core.x1)):
            seen = Region(
                max(x0 - halo_px, read.x0),
                max(y0 - halo_px, read.y0),
                min(x1 + halo_px, read.x1),
                min(y1 + halo_px, read.y1),
            )
            crop = sampled.pixels[
                seen.y0 - read.y0 : seen.y1 - read.y0, seen.x0 - read.x0 : seen.x1 - read.x0
            ]
            pixels = np.empty_like(sampled.pixels)
            pixels[:] = np.median(crop, axis=(0, 1)).astype(np.uint8)
            pixels[: seen.height, : seen.width] = crop
            if x0 < x1 and y0 < y1:
                tile = Tile(index=len(quarters), core=Region(x0, y0, x1, y1), read=seen)
                quarters.append(replace(sampled, tile=tile, pixels=pixels))
    return quarters


def widen(tile: Tile) -> Tile:
    """Return the tile twice as large in which a tile's cut objects are looked at again."""
    read = tile.read
    left, top = read.x0 - read.width // 2, read.y0 - read.height // 2
    around = Region(left, top, left + 2 * read.width, top + 2 * read.height)
    return Tile(tile.index, core=around, read=around)


def look_wider(
    look: Look, sampled: SampledTile, seen: Instances, *, max_diameter_px: float | None
) -> Instances:
    """Return what a tile reports with the objects that it cuts looked at again in a tile twice as large.

    The larger tile shows half of the details: what does not fit into a tile is large. An object that it cuts
    as well is reported as `truncated`, one that is not found again is not reported: the end of a tile made it
    look like an object. If its centre turns out to lie on the ground of another tile, it is that tile's.

    Args:
        look: finds what tiles report.
        sampled: the tile; it knows how to read what lies around it.
        seen: what it reports so far.
        max_diameter_px: network pixels; a larger object is none of the model's.
    """
    plan, tile, wide = sampled.plan, sampled.tile, widen(sampled.tile)
    assert sampled.sampler is not None  # without it there is nothing more to be seen
    try:
        pixels = _halve(sampled.sampler.read(wide))
    except DamagedPixelsError:  # the tile itself is whole
        return seen
    (found,) = look([replace(sampled, tile=wide, pixels=pixels, zoom=2)])
    whole = found.select(_covering(seen.select(seen.truncated).boxes, found.boxes))
    boxes = whole.boxes / np.array(plan.factor * 2)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    near = owns(tile, centres, margin_px=SEAM_PX) & ~whole.truncated
    reported = (owns(tile, centres) | near) & is_small_enough(boxes, max_diameter_px)
    joint = Instances.concatenate(seen.shape, [seen.select(~seen.truncated), whole.select(reported)])
    return drop_covered(replace(joint, is_saturated=seen.is_saturated))


def _covering(boxes: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return which of `others` (N, 4) hold most of one of `boxes` (K, 4), and half of it at least.

    >>> _covering(np.array([[0, 0, 4, 4]], "f4"), np.array([[2, 0, 9, 4], [0, 0, 9, 9]], "f4"))
    array([1])
    """
    if not len(others):
        return np.zeros(0, np.int64)
    low = np.maximum(boxes[:, None, :2], others[None, :, :2]).astype(np.float64)  # (K, N, 2)
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    share = np.maximum(high - low, 0).prod(axis=2) / sides.prod(axis=1)[:, None]  # (K, N)
    return np.unique(share.argmax(axis=1)[share.max(axis=1) >= _COVERED])


def _halve(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, C) at half the size, each pixel the mean of four.

    >>> _halve(np.array([[[1], [2]], [[3], [4]]], np.uint8)).tolist()
    [[[3]]]
    """
    height, width, channels = pixels.shape
    fours = pixels.reshape(height // 2, 2, width // 2, 2, channels).astype(np.uint16)
    halved: NDArray[np.uint8] = ((fours.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)
    return halved
