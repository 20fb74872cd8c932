"""A picture of what a network finds on a fixed set of unlabelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.tiling import halo_for
from darcnn.training.config import Recipe
from darcnn.training.data.target import TargetImage, TargetImages
from darcnn.training.engine import make_segmenter
from darcnn.training.model.network import Darcnn

__all__ = ["ContactSheet", "draw_outlines", "lay_out"]

_COLUMNS, _ROWS = 4, 2
_SIDE_PX = 384  # of one picture on the sheet
_GAP_PX = 6
_OUTLINE = (0, 225, 70)


class ContactSheet:
    """Finds the objects of the middles of eight unlabelled images, always the same, and draws them."""

    def __init__(self, recipe: Recipe, targets: TargetImages, *, source_branch: bool = False) -> None:
        self._recipe = recipe
        self._source_branch = source_branch
        shown = spread_evenly(targets.images, _COLUMNS * _ROWS)
        self._middles = [_middle(image, recipe.tile_px) for image in shown]

    def __call__(self, network: Darcnn) -> Image.Image:
        """Return the sheet for `network`, which is in evaluation mode."""
        recipe = self._recipe
        target = recipe.target.with_intensity_done()
        halo = halo_for(target.nominal_diameter_px, network.preset.strides_px[-1])
        pictures = []
        with make_segmenter(
            network,
            target,
            min_score=recipe.export.min_score,
            tile_px=recipe.tile_px + 2 * halo,  # a middle is the core of one tile
            source_branch=self._source_branch,
        ) as segmenter:
            for image in self._middles:
                found = segmenter(image.pixels, diameter_px=target.nominal_diameter_px / image.scale)
                enlarged = _SIDE_PX / max(image.pixels.shape[:2])
                pictures.append(
                    draw_outlines(image.pixels, found.outlines, f"{len(found)}", enlarged=enlarged)
                )
        return lay_out(pictures, columns=_COLUMNS, side_px=_SIDE_PX)


def lay_out(pictures: Sequence[Image.Image], *, columns: int, side_px: int) -> Image.Image:
    """Return one page with `pictures`, at most `side_px` a side, in rows of at most `columns`."""
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    pitch = side_px + _GAP_PX
    page = Image.new("RGB", (columns * pitch - _GAP_PX, rows * pitch - _GAP_PX), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (number % columns * pitch, number // columns * pitch))
    return page


def draw_outlines(
    image: NDArray[np.uint8], outlines: Sequence[NDArray[np.float64]], caption: str, *, enlarged: float
) -> Image.Image:
    """Return `image` (H, W, C) as a colour picture, `enlarged` times, with outlines and a caption on it.

    Args:
        image: one channel is shown grey, of two the first, of more the first three.
        outlines: (K, 2) x y each, pixels of the image.
        caption: written into a corner.
        enlarged: pixels of the picture a pixel of the image.
    """
    shown = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    size = (round(image.shape[1] * enlarged), round(image.shape[0] * enlarged))
    picture = Image.fromarray(np.ascontiguousarray(shown)).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for ring in outlines:
        # the drawing's pixel i has its centre at i, the image's at i + 0.5
        draw.line((ring * enlarged - 0.5).ravel().tolist(), fill=_OUTLINE, width=1)
    font: Any = ImageFont.load_default(size=14)
    draw.text((4, 2), caption, fill="white", font=font, stroke_width=2, stroke_fill="black")
    return picture


def _middle(image: TargetImage, tile_px: int) -> TargetImage:
    """Return the middle of an image that fills a tile at network scale."""
    height, width = image.pixels.shape[:2]
    side = round(tile_px / image.scale)
    h, w = min(side, height), min(side, width)
    y, x = (height - h) // 2, (width - w) // 2
    return replace(image, pixels=image.pixels[y : y + h, x : x + w])
