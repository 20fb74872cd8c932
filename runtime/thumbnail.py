"""A slide made small, strip by strip: what overview and tissue mask are made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darcnn.runtime.geometry import Level, Region, choose_level
from darcnn.runtime.readers.protocol import Pixels, Reader

__all__ = ["Strip", "read_strips", "resize_band"]

_STRIP_BYTES = 16 << 20  # about so much of the slide is read at once; Pillow makes copies of it


@dataclass(frozen=True, slots=True)
class Strip:
    """Raw pixels of some rows of a thumbnail, not yet made small."""

    top: int  # rows [top, bottom) of the thumbnail
    bottom: int
    pixels: Pixels  # (h, w, C) of the level that just suffices
    box: tuple[float, float, float, float]  # x0 y0 x1 y1 of these rows inside `pixels`


def read_strips(reader: Reader, size: tuple[int, int]) -> Iterator[Strip]:
    """Yield what a thumbnail of `size` (width, height) is made of, from top to bottom.

    Read from the coarsest level that is not coarser than the thumbnail; memory does not grow with the slide.

    Raises:
        InputError: the slide cannot be read.
    """
    info = reader.info
    level = choose_level(info.levels, max(info.width_px0 / size[0], info.height_px0 / size[1]))
    factor = level.height_px / size[1]
    rows = _rows_of_a_strip(reader, level, size)
    for top in range(0, size[1], rows):
        bottom = min(top + rows, size[1])
        y0, y1 = math.floor(top * factor), min(math.ceil(bottom * factor), level.height_px)
        box = (0.0, top * factor - y0, float(level.width_px), min(bottom * factor, y1) - y0)
        yield Strip(top, bottom, reader.read(Region(0, y0, level.width_px, y1), level=level.index), box)


def resize_band(band: NDArray[Any], strip: Strip, width: int) -> NDArray[np.float32]:
    """Return (bottom - top, width) means of `band`, (h, w) pixels of the strip; not finite counts as 0."""
    values = np.nan_to_num(band.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    size = (width, strip.bottom - strip.top)
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX, box=strip.box))


def _rows_of_a_strip(reader: Reader, level: Level, size: tuple[int, int]) -> int:
    row_bytes = level.width_px * len(reader.info.channel_names) * reader.info.dtype.itemsize
    return max(1, int(_STRIP_BYTES / row_bytes * size[1] / level.height_px))
