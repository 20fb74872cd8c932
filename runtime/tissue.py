"""Where the tissue of a slide lies, from a thumbnail: one rule for stains on glass, one for dark backgrounds.

The rules would rather take glass for tissue than lose tissue: where they see no background that they know,
the whole slide counts as tissue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.thumbnail import read_strips, resize_band

__all__ = ["TissueMask", "find_tissue"]

Rule = Literal["stain on glass", "bright on dark", "colours on dark", "no background seen"]

_CELLS_PER_DIAMETER = 2  # a cell of the mask is half a typical object: a lone one still shows
_MAX_CELLS = 2048  # along a side; 12 um in a slide of 25 mm
_ENOUGH_CELLS = 1 << 20  # tell what colour the glass has
_ROWS_AT_ONCE = 64  # their densities take ten times their mask
_FEW_CELLS = 400  # a picture of ten objects by ten: too little to tell what its background is
_MIN_BACKGROUND = 0.01  # less of the slide than that is no background
_GROWN_CELLS = 6  # tissue is taken to reach three objects further than it is seen

# Glass: bright and hardly coloured, in grey levels of 255.
_GLASS_LEVEL, _GLASS_CHROMA = 200, 25
_PAPER = 255.0  # of all colours: white that no glass has
_MIN_GLASS = 0.1  # of the slide, else its glass may be as white
_EVEN, _HARDLY_COLOURED = 8.0, 13.0  # what glass is, and pale tissue is not
# Tissue on glass, as optical density (0 = glass): coloured, or dark whatever its colour.
_STAIN_DENSITY, _DARK_DENSITY = 0.02, 0.08
# Specks: pieces with less than 100 objects' worth of stain in a field 34 objects wide ...
_BLOCK_CELLS, _SPECK_REACH_BLOCKS, _SPECK_CELLS = 4, 8, 400
_MAX_SPECKS = 0.01  # ... if there is little of that: in a smear of single cells nothing is a speck

_BINS = 256
_NOISE_FACTOR = 8.0  # above the dark background by so many times its noise; 81 cells of it span 5
_FIELD_CELLS = 4  # the background may be darker here than elsewhere: the darkest of so many cells around
_MAX_STEP = 0.03  # of the slide's range of brightness: 8 of the 256 levels that a model sees
_DARKEST = 5.0  # per cent of what was scanned; cells at the border of the scan are darker
_MIN_OFFSET = 0.5  # of what is typical: background with an offset is no darker than that
_MAX_TYPICAL = 0.25  # half of the slide is darker than that, else it is not bright on dark
# Channels laid over one another: colours differ by that share of the brighter one (DAPI and GFP 0.5, one
# channel in one hue 0); a colour with less than that share of the widest range shows nothing.
_MERGED, _MIN_SHOWN = 0.4, 0.2


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Which cells of a slide hold tissue; a cell is some level-0 pixels wide and high."""

    cells: NDArray[np.bool_]  # (h, w)
    seen: NDArray[np.bool_]  # (h, w), before it was grown: what counts as area
    width_px0: int  # of the slide
    height_px0: int
    rule: Rule

    @property
    def area_px0(self) -> float:
        """Area of the tissue, level-0 pixels."""
        return float(self.seen.mean() * self.width_px0 * self.height_px0)

    def contains(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which points (N,), level-0 pixels on the slide, lie on tissue."""
        height, width = self.cells.shape
        column = np.clip((x * width / self.width_px0).astype(np.int64), 0, width - 1)
        row = np.clip((y * height / self.height_px0).astype(np.int64), 0, height - 1)
        found: NDArray[np.bool_] = self.cells[row, column]
        return found

    def touches(self, region: Region) -> bool:
        """Tell whether `region`, level-0 pixels, holds any tissue."""
        return bool(self.cells[self._under(region)].any())

    def including(self, regions: Iterable[Region]) -> TissueMask:
        """Return the mask with `regions`, level-0 pixels, taken for tissue; the area stays what was seen."""
        cells = self.cells.copy()
        for region in regions:
            cells[self._under(region)] = True
        return replace(self, cells=cells)

    def _under(self, region: Region) -> tuple[slice, slice]:
        """Return the rows and columns of the cells that `region` touches."""
        height, width = self.cells.shape
        x0, x1 = region.x0 * width // self.width_px0, -(-region.x1 * width // self.width_px0)
        y0, y1 = region.y0 * height // self.height_px0, -(-region.y1 * height // self.height_px0)
        return slice(max(y0, 0), max(y1, 0)), slice(max(x0, 0), max(x1, 0))


def find_tissue(
    reader: Reader, *, diameter_px0: float, channels: tuple[int, ...] | None = None
) -> TissueMask:
    """Return where the tissue of an open slide lies.

    - Colour images with bright glass: tissue is what is coloured or dark, in optical density against the
      glass. Specks (little stain far from any other) are no tissue, unless the slide consists of such.
    - Dark images: tissue is what is brighter than the background by more than its noise; the rule tells
      whether their colours show different things.
    - All else counts as tissue, and so does a picture of few objects.

    What lies outside of the scan (black, or of colours white or black) is neither tissue nor background.

    Args:
        reader: the open slide; stays open.
        diameter_px0: of a typical object, level-0 pixels.
        channels: those that the model sees of separate ones; None for colours, or all.
    Raises:
        InputError: the slide cannot be read.
    """
    info = reader.info
    step = max(diameter_px0 / _CELLS_PER_DIAMETER, max(info.width_px0, info.height_px0) / _MAX_CELLS, 1.0)
    size = (max(1, round(info.width_px0 / step)), max(1, round(info.height_px0 / step)))
    everything = np.ones(size[::-1], np.bool_)
    whole = TissueMask(everything, everything, info.width_px0, info.height_px0, "no background seen")
    if everything.size < _FEW_CELLS:
        return whole
    chosen = channels or tuple(range(len(info.channel_names)))
    thumbnail = np.zeros((size[1], size[0], len(chosen)), np.float32)
    for strip in read_strips(reader, size):
        for band, channel in enumerate(chosen):
            pixels = resize_band(strip.pixels[:, :, channel], strip, size[0])
            thumbnail[strip.top : strip.bottom, :, band] = pixels
    seen: NDArray[np.bool_] | None = None
    rule: Rule = "bright on dark"
    if info.is_rgb and channels is None:
        seen, rule = _on_glass(_to_levels(thumbnail, info.dtype)), "stain on glass"
    if seen is None:
        seen, rule = _on_dark(thumbnail), "bright on dark"
        if seen is not None and info.is_rgb and channels is None and _is_merge(thumbnail):
            rule = "colours on dark"
    if seen is None or seen.mean() > 1.0 - _MIN_BACKGROUND:
        return whole
    return TissueMask(_grown(seen, _GROWN_CELLS), seen, info.width_px0, info.height_px0, rule)


def _to_levels(colours: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[np.float32]:
    """Return colours (h, w, 3), of a slide of `dtype`, in grey levels of 255; of floats 1 is white."""
    if dtype == np.uint8:
        return colours
    white = np.float32(np.iinfo(dtype).max if dtype.kind == "u" else 1)
    return colours * np.float32(255) / white  # in this order white is 255 exactly


def _on_glass(colours: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Return which of (h, w, 3) pixels, grey levels of 255, hold stain, None if there is no glass."""
    white = _white_of(colours)
    if white is None:
        return None
    stain, black = (np.empty(colours.shape[:2], np.bool_) for _ in range(2))
    for top in range(0, len(colours), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        stain[rows] = _is_stained(colours[rows], white)
        black[rows] = _most(colours[rows]) == 0
    if black.mean() >= _MIN_BACKGROUND:
        stain &= ~_grown(black, 1)  # at its border cells are half black
    specks = stain & ~_hangs_together(stain)
    return stain & ~specks if specks.sum() < _MAX_SPECKS * stain.sum() else stain


def _white_of(colours: NDArray[np.float32]) -> NDArray[np.floating] | None:
    """Return the colour (3,) of the glass among (h, w, 3) pixels, None if there is none."""
    step = math.ceil(math.sqrt(colours[..., 0].size / _ENOUGH_CELLS))
    colours = colours[::step, ::step]
    darkest, brightest = _least(colours), _most(colours)
    glass = (darkest >= _GLASS_LEVEL) & (brightest - darkest <= _GLASS_CHROMA)
    if glass.mean() < _MIN_BACKGROUND:
        return None
    white: NDArray[np.floating] = np.median(colours[glass], axis=0)
    paper = darkest >= _PAPER  # nothing was scanned there, unless the glass itself is as white
    own = glass & ~paper
    if paper.mean() >= _MIN_BACKGROUND and own.mean() >= _MIN_GLASS:
        dark, typical, light = np.percentile(colours[own], (10, 50, 90), axis=0)
        if (light - dark).max() <= _EVEN and typical.max() - typical.min() <= _HARDLY_COLOURED:
            white = typical  # else it may be pale tissue on glass that is white itself
    return white


def _is_stained(colours: NDArray[np.float32], white: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Tell which of (h, w, 3) pixels are coloured, or dark, beside glass of the colour `white`."""
    density = -np.log10(np.maximum(colours, 1.0) / white)  # (h, w, 3)
    strongest = _most(density)
    stain: NDArray[np.bool_] = (strongest - _least(density) > _STAIN_DENSITY) & (strongest > _STAIN_DENSITY)
    stain |= strongest > _DARK_DENSITY
    return stain


def _least(colours: NDArray[Any]) -> NDArray[Any]:
    """Return the least of the bands of (h, w, C); NumPy is slow along a short axis."""
    return reduce(np.minimum, np.moveaxis(colours, 2, 0))


def _most(colours: NDArray[Any]) -> NDArray[Any]:
    """Return the largest of the bands of (h, w, C)."""
    return reduce(np.maximum, np.moveaxis(colours, 2, 0))


def _hangs_together(stain: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where (h, w) stain is plentiful, or hangs together by gaps of few cells with where it is."""
    height, width = stain.shape
    padded = np.pad(stain, ((0, -height % _BLOCK_CELLS), (0, -width % _BLOCK_CELLS)))
    rows, columns = (extent // _BLOCK_CELLS for extent in padded.shape)
    counts = padded.reshape(rows, _BLOCK_CELLS, columns, _BLOCK_CELLS).sum(axis=(1, 3))
    block = counts > 0
    reached = block & (_sum_around(counts, _SPECK_REACH_BLOCKS) >= _SPECK_CELLS)
    while True:  # what is plentiful spreads to the stain beside it
        spread = block & _grown(reached, 1)
        if np.array_equal(spread, reached):
            break
        reached = spread
    return np.repeat(np.repeat(reached, _BLOCK_CELLS, 0), _BLOCK_CELLS, 1)[:height, :width]


def _on_dark(values: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    """Return which of (h, w, C) pixels outshine the background in any channel, None if it is not dark."""
    bright = np.zeros(values.shape[:2], np.bool_)
    for band in np.moveaxis(values, 2, 0):
        scanned = _was_scanned(band)
        low, typical, high = np.percentile(band[scanned], (1, 50, 99.9))
        if typical - low > _MAX_TYPICAL * (high - low):
            return None
        level, noise = _background(band[scanned & (band <= typical)])
        step = min(_NOISE_FACTOR * noise, _MAX_STEP * (high - low))
        lowest = _lowest_around(np.where(scanned, band, np.inf), _FIELD_CELLS)
        bright |= scanned & ((band > level + step) | (band > lowest + step))
    return bright


def _is_merge(colours: NDArray[np.float32]) -> bool:
    """Tell whether (h, w, 3) colours on dark show different things, each scaled by its own range."""
    low, high = np.percentile(colours, (1, 99.9), axis=(0, 1))
    shown = high - low > _MIN_SHOWN * (high - low).max()
    if shown.sum() < 2:
        return False
    scaled = ((colours - low)[..., shown] / (high - low)[shown]).clip(0.0, 1.0)
    brighter = _most(scaled)
    return bool((brighter - _least(scaled)).mean() > _MERGED * brighter.mean())


def _was_scanned(band: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which of (h, w) cells were scanned; others are exactly 0, or lie on their border.

    That is known only where what was scanned has a dark background of its own, far above 0, as a camera with
    an offset makes it. Else 0 is the background, and all was scanned.
    """
    everything = np.ones(band.shape, np.bool_)
    scanned = band > 0
    if 1.0 - scanned.mean() < _MIN_BACKGROUND or not scanned.any():
        return everything
    dark, typical, high = np.percentile(band[scanned], (_DARKEST, 50, 99.9))
    has_own = dark < high and typical - dark <= _MAX_TYPICAL * (high - dark)
    return band >= dark if has_own and dark >= _MIN_OFFSET * typical else everything


def _background(dark: NDArray[np.float32]) -> tuple[float, float]:
    """Return the most frequent of the values (N,) of the darker half, and its noise, from those below it."""
    counts, edges = np.histogram(dark, bins=_BINS)
    fullest = int(counts.argmax())
    level = float(np.median(dark[(dark >= edges[fullest]) & (dark <= edges[fullest + 1])]))
    return level, 1.4826 * float(np.median(level - dark[dark <= level]))


def _lowest_around(values: NDArray[np.float32], reach: int) -> NDArray[np.float32]:
    """Return the lowest of the values up to `reach` away along both axes, (h, w)."""
    lowest = values
    for axis in (0, 1):
        padded = np.pad(lowest, [(reach, reach) if at == axis else (0, 0) for at in (0, 1)], mode="edge")
        for start in range(2 * reach + 1):  # one after another: stacked they would take nine times the memory
            part = np.take(padded, np.arange(start, start + values.shape[axis]), axis=axis)
            lowest = part if not start else np.minimum(lowest, part)
    return lowest


def _grown(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """Return (h, w) where the mask holds anything up to `reach` away along both axes.

    >>> _grown(np.array([[True, False, False, False]]), 2)
    array([[ True,  True,  True, False]])
    """
    grown = mask.copy()
    for axis in (0, 1):
        grown = grown.swapaxes(0, axis)
        before = grown.copy()
        for shift in range(1, min(reach, len(grown) - 1) + 1):
            grown[shift:] |= before[:-shift]
            grown[:-shift] |= before[shift:]
        grown = grown.swapaxes(0, axis)
    return grown


def _sum_around(values: NDArray[np.integer], reach: int) -> NDArray[np.int64]:
    """Return the sum of the values up to `reach` away along both axes, (h, w).

    >>> _sum_around(np.array([[1, 0, 0, 1]]), 1)
    array([[1, 1, 1, 1]])
    """
    counts = values.astype(np.int64)
    for axis in (0, 1):
        sums = np.cumsum(np.insert(counts, 0, 0, axis=axis), axis=axis)
        at = np.arange(counts.shape[axis])
        high, low = np.minimum(at + reach + 1, len(at)), np.maximum(at - reach, 0)
        counts = np.take(sums, high, axis=axis) - np.take(sums, low, axis=axis)
    return counts
