"""Pictures of a volume with the outlines on them: three planes and the best objects; a scroll along z."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from colorsys import hsv_to_rgb
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from darcnn.runtime.intensity import Window, apply_window
from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.volumes.labels import Numbered
from darcnn.runtime.volumes.stack import Stack
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = [
    "GAP_PX",
    "LINE_PX",
    "colours_of",
    "legend",
    "plane_with_outlines",
    "shrunk",
    "write_overview",
    "write_scroll",
]

_SIDE_PX = 1024  # a plane is at most so large, and a small one is enlarged: outlines hide less of it
_SCROLL_PX = 384
_FRAMES = 48
_FRAME_MS = 90
_CROPS = 24
_CROP_PX = 96
_CROP_DIAMETERS = 3.0  # side of a crop round an object, in its own largest extent, at least ...
_MIN_CROP = 24  # ... so many voxels
_OUTLINE = (190, 255, 40)
_GOLDEN = (5**0.5 - 1) / 2
GAP_PX = 8
LINE_PX = 36
_FONT_PX = 16


def write_overview(
    path: Path, stacks: Sequence[Stack], window: Window, numbered: Numbered, *, model_name: str
) -> None:
    """Write the middle planes along z, y and x with outlines, and the objects that score best, as PNG.

    Planes across y and x are stretched along z as the voxels are.

    Args:
        path: PNG to write.
        stacks: of the volume, along z, y and x.
        window: raw values that become black and white.
        numbered: the objects.
        model_name: for the legend.
    Raises:
        InputError: the volume cannot be read.
        OSError: the file cannot be written; nothing is left behind.
    """
    longest = max(stacks[0].volume.info.shape)
    factor, scale = max(1, _SIDE_PX // longest), min(1.0, _SIDE_PX / longest)  # the same for all three
    planes = [plane_with_outlines(stack, len(stack) // 2, window, numbered, factor) for stack in stacks]
    z, y, x = (_scaled(plane, scale) for plane in planes)
    y, x = (_stretched(plane, stacks[0].plane_px) for plane in (y, x))
    crops = _best_crops(stacks[0], window, numbered)
    width = max(z.width + GAP_PX + x.height, len(crops[:12]) * (_CROP_PX + GAP_PX), 480)
    rows = math.ceil(len(crops) / max(1, (width + GAP_PX) // (_CROP_PX + GAP_PX)))
    top = max(z.height + GAP_PX + y.height, x.width)
    page = Image.new("RGB", (width, top + rows * (_CROP_PX + GAP_PX) + LINE_PX), "white")
    page.paste(z, (0, 0))
    page.paste(y, (0, z.height + GAP_PX))  # x to the right as above it
    page.paste(x.transpose(Image.Transpose.TRANSPOSE), (z.width + GAP_PX, 0))  # y downwards as beside it
    for number, crop in enumerate(crops):
        row, column = divmod(number, (width + GAP_PX) // (_CROP_PX + GAP_PX))
        page.paste(crop, (column * (_CROP_PX + GAP_PX), top + GAP_PX + row * (_CROP_PX + GAP_PX)))
    shape = " x ".join(str(size) for size in stacks[0].volume.info.shape[::-1])
    legend(page, model_name, numbered, f"{shape} voxels (x y z)")
    with atomic_file(path) as file:
        page.save(file, format="PNG")


def legend(page: Image.Image, model_name: str, numbered: Numbered, size: str) -> None:
    """Write at the foot of a page, in its last `LINE_PX`, what was found on a volume of some size."""
    n = len(numbered.rows)
    words = f"{model_name}   {n:,} object{'' if n == 1 else 's'}   {size}"
    font = ImageFont.load_default(size=_FONT_PX)
    place = (GAP_PX, page.height - LINE_PX // 2)
    ImageDraw.Draw(page).text(place, words, fill="black", font=font, anchor="lm")


def _scaled(plane: Image.Image, scale: float) -> Image.Image:
    """Return the picture, `scale` times (at most 1) as large."""
    size = max(1, round(plane.width * scale)), max(1, round(plane.height * scale))
    return plane if scale == 1 else plane.resize(size, Image.Resampling.BOX)


def _stretched(plane: Image.Image, factor: float) -> Image.Image:
    """Return the picture with its rows `factor` times as far apart, at most `_SIDE_PX` high."""
    height = max(1, min(_SIDE_PX, round(plane.height * factor)))
    return plane if height == plane.height else plane.resize((plane.width, height))


def write_scroll(path: Path, stack: Stack, window: Window, numbered: Numbered) -> None:
    """Write up to 48 planes with outlines, one after another, as an animated GIF.

    In a series each object has a colour of its own, by which it is known again.

    Raises:
        InputError: the volume cannot be read.
        OSError: the file cannot be written; nothing is left behind.
    """
    colours = colours_of(numbered) if stack.volume.info.is_series else None
    frames = [
        shrunk(plane_with_outlines(stack, index, window, numbered, 1, colours), _SCROLL_PX).quantize(
            32 if colours is None else 256
        )
        for index in spread_evenly(range(len(stack)), _FRAMES)
    ]
    with atomic_file(path) as file:
        frames[0].save(
            file, format="GIF", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0
        )


def colours_of(numbered: Numbered) -> NDArray[np.uint8]:
    """Return a colour for each number, (N + 1, 3): hues a golden section apart, so that neighbours differ."""
    hues = np.arange(len(numbered.rows) + 1) * _GOLDEN % 1.0
    return np.array([[round(255 * part) for part in hsv_to_rgb(hue, 0.75, 1.0)] for hue in hues], np.uint8)


def plane_with_outlines(
    stack: Stack,
    index: int,
    window: Window,
    numbered: Numbered,
    factor: int,
    colours: NDArray[np.uint8] | None = None,
) -> Image.Image:
    """Return plane `index`, `factor` times as large; outlines in the objects' `colours`, if they have any."""
    grey = apply_window(stack.plane(index), window)
    labels = np.zeros(grey.shape, np.uint32)
    for crop, row, column, number in _sections(stack.axis, index, numbered):
        labels[row : row + crop.shape[0], column : column + crop.shape[1]][crop] = number
    return _outlined(grey, labels, factor, colours)


def _sections(
    axis: Axis, index: int, numbered: Numbered
) -> Iterator[tuple[NDArray[np.bool_], int, int, int]]:
    """Yield mask, first row, first column and number of the objects on a plane, the best last."""
    which = AXES.index(axis)
    boxes = numbered.solids.boxes[numbered.rows]
    hits = np.flatnonzero((boxes[:, which] <= index) & (boxes[:, 3 + which] > index))
    for k in hits[np.argsort(numbered.solids.scores[numbered.rows[hits]], kind="stable")]:
        origin, rank = boxes[k, :3].tolist(), int(numbered.rows[k])
        at = index - origin[which]
        if which == 0:
            crop = numbered.solids.planes(rank, at, at + 1)[0]
        else:
            crop = np.take(numbered.solids[rank].mask, at, axis=which)
        row, column = (start for axis_, start in enumerate(origin) if axis_ != which)
        yield crop, row, column, int(numbered.ids[k])


def _outlined(
    grey: NDArray[np.uint8],
    labels: NDArray[np.uint32],
    factor: int,
    colours: NDArray[np.uint8] | None = None,
) -> Image.Image:
    """Return the plane, enlarged, with a line of one pixel inside each object's border."""
    large = np.kron(labels, np.ones((factor, factor), np.uint32)) if factor > 1 else labels
    padded = np.pad(large, 1)
    is_border = np.zeros(large.shape, np.bool_)
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        is_border |= padded[dy : dy + large.shape[0], dx : dx + large.shape[1]] != large
    is_border &= large > 0
    picture = (
        Image.fromarray(grey)
        .resize((large.shape[1], large.shape[0]), Image.Resampling.BICUBIC)
        .convert("RGB")
    )
    lines = _OUTLINE if colours is None else Image.fromarray(colours[large])
    picture.paste(lines, mask=Image.fromarray(is_border))
    return picture


def shrunk(picture: Image.Image, side_px: int) -> Image.Image:
    """Return the picture, at most so large."""
    picture.thumbnail((side_px, side_px), Image.Resampling.BOX)
    return picture


def _best_crops(stack: Stack, window: Window, numbered: Numbered) -> list[Image.Image]:
    """Return crops of the plane through the middle of each of the objects that score best."""
    best = np.argsort(-numbered.solids.scores[numbered.rows], kind="stable")[:_CROPS]
    crops = []
    for k in best:
        box = numbered.solids.boxes[numbered.rows[k]]
        low, high = box[:3], box[3:]
        middle = (low + high) // 2
        side = max(_MIN_CROP, round(_CROP_DIAMETERS * max(high[1:] - low[1:])))
        height, width = stack.shape
        y0 = int(np.clip(middle[1] - side // 2, 0, max(0, height - side)))
        x0 = int(np.clip(middle[2] - side // 2, 0, max(0, width - side)))
        grey = apply_window(stack.plane(int(middle[0])), window)[y0 : y0 + side, x0 : x0 + side]
        solid = numbered.solids[int(numbered.rows[k])]
        labels = np.zeros(grey.shape, np.uint32)
        inside = labels[low[1] - y0 : high[1] - y0, low[2] - x0 : high[2] - x0]
        inside[solid.mask[int(middle[0]) - solid.origin[0]]] = 1
        crop = _outlined(grey, labels, max(1, _CROP_PX // side))
        crops.append(crop.resize((_CROP_PX, _CROP_PX), Image.Resampling.BICUBIC))
    return crops
