"""A picture of the slide with the outlines on it: what one looks at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from darcnn.runtime.geometry import Region
from darcnn.runtime.intensity import Window, apply_window, sees_separate_channels, select_channels
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.sinks.parquet import count_objects, read_objects
from darcnn.runtime.thumbnail import read_strips

__all__ = ["write_overview"]

_SIDE_PX = 2048  # the picture is at most so wide and high
_FINER = 3  # outlines are drawn so many times finer and averaged, which smooths them
_DOT_PX = 3.0  # an object smaller than this, in pixels of the picture, is filled: its outline would hide it
_ON_TISSUE = (0, 225, 70)  # bright green stands out from pink and violet, and is still seen on white
_ON_BLACK = (190, 255, 40)  # yellow-green stands out from grey and black
_ON_GREEN = ((255, 60, 255), (255, 230, 0), (255, 255, 255))  # for pictures in which the green is lost
_SEEN_FROM = 150.0  # grey levels (of red, green and blue together): nearer to the ground a colour is lost
_LOST = 10  # per cent of the outlines that may be
_UNREADABLE = (255, 110, 0)  # orange stripes over tiles that are damaged
_STRIPE_PX, _STRIPES_APART_PX = 3, 12
_FONT_PX = 18
_COMPRESS_LEVEL = 3  # two thirds of the time of 6, and 2 % more bytes
_MARGIN_PX = 10
_NICE_STEPS = (1, 2, 5)  # lengths that a scale bar may have, times a power of ten


def write_overview(
    path: Path,
    objects: Path,
    reader: Reader,
    *,
    window: Window,
    channel: int | None,
    channels: int,
    model_name: str,
    mpp: tuple[float, float] | None,
    unreadable: Sequence[Region] = (),
) -> None:
    """Write the slide of `reader`, at most 2048 px, with the outlines of the table `objects`, as PNG.

    One line below the picture names the model, the number of objects and the pixel size; where that is
    known there is a scale bar.

    Args:
        path: PNG to write.
        objects: table of objects, level-0 pixels.
        reader: open slide; stays open.
        window: raw values that become black and white, for each channel where the model sees several.
        channel: which channel is shown, None for colours or the only one.
        channels: that the model sees.
        model_name: for the legend.
        mpp: micrometres per level-0 pixel (x, y), or None.
        unreadable: tiles that are damaged, level-0 pixels; striped.
    Raises:
        InputError: the slide cannot be read.
        OSError: the file cannot be written; nothing is left behind.
    """
    info = reader.info
    reduction = max(info.width_px0, info.height_px0, _SIDE_PX) / _SIDE_PX  # level-0 px per px, 1 or more
    size = (
        max(1, round(info.width_px0 / reduction)),
        max(1, round(info.height_px0 / reduction)),
    )
    picture = _shrink(reader, size, window=window, channel=channel, channels=channels)
    picture.paste(_UNREADABLE, mask=_draw_stripes(unreadable, size, reduction))
    outlines = _draw_outlines(objects, size, reduction)
    colour = _choose_colour(picture, outlines) if info.is_rgb else _ON_BLACK
    if colour in _ON_GREEN:  # half covered, green and magenta make grey
        outlines = outlines.point(lambda covered: min(255, 2 * covered))
    picture.paste(colour, mask=outlines)
    n_objects = count_objects(objects)
    words = [model_name, f"{n_objects:,} object{'' if n_objects == 1 else 's'}"]
    if unreadable:
        words.append(f"{len(unreadable)} damaged tile{'' if len(unreadable) == 1 else 's'}")
    if mpp is None:
        words.append(f"{info.width_px0} x {info.height_px0} px, pixel size unknown")
    else:
        words.append(f"{math.sqrt(mpp[0] * mpp[1]):.4g} um/px")  # Pillow's own font has no micro sign
    page = _add_legend(picture, "   ".join(words), None if mpp is None else mpp[0] * reduction)
    with atomic_file(path) as file:
        page.save(file, format="PNG", compress_level=_COMPRESS_LEVEL)


def _shrink(
    reader: Reader, size: tuple[int, int], *, window: Window, channel: int | None, channels: int
) -> Image.Image:
    """Return the slide at `size` (width, height), read strip by strip from the level that just suffices."""
    info = reader.info
    sees_separate = sees_separate_channels(
        available=len(info.channel_names), is_rgb=info.is_rgb, channels=channels, channel=channel
    )
    if not sees_separate:  # a model for grey images is shown in colour what has colours
        channels = 3 if info.is_rgb and channel is None else 1
    picture = Image.new("RGB", size)
    for strip in read_strips(reader, size):
        chosen = select_channels(strip.pixels, is_rgb=info.is_rgb, channels=channels, channel=channel)
        seen = apply_window(chosen, window)  # (h, w, channels)
        # of separate channels the brightest is shown at each pixel
        is_colour = channels == 3 and info.is_rgb
        shown = Image.fromarray(seen if is_colour else seen.max(axis=2)).convert("RGB")
        rows = (size[0], strip.bottom - strip.top)
        picture.paste(shown.resize(rows, Image.Resampling.BOX, box=strip.box), (0, strip.top))
    return picture


def _draw_stripes(regions: Sequence[Region], size: tuple[int, int], reduction: float) -> Image.Image:
    """Return a mask of diagonal stripes over `regions`, level-0 pixels."""
    covered = Image.new("1", size)
    draw = ImageDraw.Draw(covered)
    for region in regions:
        x0, y0, x1, y1 = (v / reduction for v in (region.x0, region.y0, region.x1, region.y1))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=1)
    y, x = np.ogrid[: size[1], : size[0]]
    return Image.fromarray(np.asarray(covered) & ((x + y) % _STRIPES_APART_PX < _STRIPE_PX))


def _draw_outlines(objects: Path, size: tuple[int, int], reduction: float) -> Image.Image:
    """Return how much of each pixel an outline covers, 0..255."""
    canvas = Image.new("L", (size[0] * _FINER, size[1] * _FINER))
    draw = ImageDraw.Draw(canvas)
    for part in read_objects(objects, ["geometry"]):
        rings = shapely.get_exterior_ring(shapely.from_wkb(part["geometry"].to_numpy()))
        # the drawing's pixel i has its centre at i, the slide's at i + 0.5
        points, owner = shapely.get_coordinates(rings, return_index=True)
        points = points * (_FINER / reduction) - 0.5
        for ring in np.split(points, np.searchsorted(owner, np.arange(1, len(rings)))):
            _draw_one(draw, ring)
    return canvas.resize(size, Image.Resampling.BOX)


def _choose_colour(picture: Image.Image, outlines: Image.Image) -> tuple[int, int, int]:
    """Return the colour of outlines on a picture in colours: the usual one, unless it would be lost."""
    ground = np.asarray(picture)[np.asarray(outlines) > 0].astype(np.float32)  # (N, 3)

    def distance(colour: tuple[int, int, int]) -> float:
        return float(np.percentile(np.linalg.norm(ground - np.array(colour, np.float32), axis=1), _LOST))

    if not len(ground) or distance(_ON_TISSUE) >= _SEEN_FROM:
        return _ON_TISSUE
    return max(_ON_GREEN, key=distance)


def _draw_one(draw: ImageDraw.ImageDraw, ring: NDArray[np.float64]) -> None:
    low, high = ring.min(axis=0), ring.max(axis=0)
    if max(high - low) < _DOT_PX * _FINER:
        x, y = (low + high) / 2
        reach_x, reach_y = (np.maximum(high - low, _FINER) - 1) / 2  # at least one pixel of the picture
        draw.rectangle((x - reach_x, y - reach_y, x + reach_x, y + reach_y), fill=255)
    else:
        draw.line(ring.ravel().tolist(), fill=255, width=_FINER, joint="curve")


@dataclass(frozen=True, slots=True)
class _ScaleBar:
    length_px: int
    label: str


def _plan_scale_bar(um_per_px: float, width_px: int) -> _ScaleBar:
    """Return the longest round length that takes at most a fifth of `width_px`.

    >>> _plan_scale_bar(0.5, 2048)
    _ScaleBar(length_px=400, label='200 um')
    """
    longest_um = um_per_px * max(width_px, 1) / 5
    power = 10.0 ** math.floor(math.log10(longest_um))
    length_um = max(step * power for step in _NICE_STEPS if step * power <= longest_um)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"
    return _ScaleBar(max(1, round(length_um / um_per_px)), label)


def _add_legend(picture: Image.Image, words: str, um_per_px: float | None) -> Image.Image:
    """Return `picture` on a page with one line below it: `words`, and a scale bar at the right."""
    font: Any = ImageFont.load_default(size=_FONT_PX)
    bar = None if um_per_px is None else _plan_scale_bar(um_per_px, picture.width)
    needed = math.ceil(font.getlength(words)) + 2 * _MARGIN_PX
    if bar is not None:
        needed += bar.length_px + math.ceil(font.getlength(bar.label)) + 4 * _MARGIN_PX
    line_px = _FONT_PX + 2 * _MARGIN_PX
    page = Image.new("RGB", (max(picture.width, needed), picture.height + line_px), "white")
    page.paste(picture, (0, 0))
    draw = ImageDraw.Draw(page)
    middle = picture.height + line_px // 2
    draw.text((_MARGIN_PX, middle), words, fill="black", font=font, anchor="lm")
    if bar is not None:
        right = page.width - _MARGIN_PX
        draw.text((right, middle), bar.label, fill="black", font=font, anchor="rm")
        right -= math.ceil(font.getlength(bar.label)) + _MARGIN_PX
        draw.rectangle((right - bar.length_px, middle - 2, right, middle + 2), fill="black")
    return page
