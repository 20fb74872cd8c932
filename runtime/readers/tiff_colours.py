"""What the values of a TIFF mean: colours or channels, alpha, palettes, white that is zero, few bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.tiff_pages import PageSource
from darcnn.runtime.readers.tiff_segments import JPEG

__all__ = ["Levels", "Stored", "give_meaning"]

Levels = tuple[tuple[tuple[PageSource, int], ...], ...]  # level, channel: page and slice of its volume
_Tint = Callable[[NDArray[Any]], NDArray[Any]]

_PHOTOMETRIC = tifffile.PHOTOMETRIC
_ALPHA = (1, 2)  # ExtraSamples: alpha, associated or not
_N_COLOURS = 3


@dataclass(frozen=True, slots=True)
class Stored:
    """A plane as it lies in the file: for each level, the page and slice of each channel."""

    levels: Levels
    n_channels: int  # how many of the stored values are delivered; alpha comes behind them
    is_rgb: bool
    tint: _Tint | None = None  # stored values to what they mean
    doubt: str | None = None  # what might have been meant otherwise


def give_meaning(
    series: tifffile.TiffPageSeries, path: Path, levels: Levels, n_values: int, page: int
) -> Stored:
    """Return the plane, `page` its first page, with the meaning that the photometric tag gives its values.

    - RGB loses its alpha. With further samples, or samples that are no alpha, it is channels.
    - RGB whose colours lie in planes of their own, as tifffile stores any array (3 or 4, height, width), is
      colours in 8 bits and channels otherwise, unless the axes tell (S is colours, C is channels).
    - A palette becomes RGB, but in ImageJ files, where it only tints. White-is-zero is inverted.

    Raises:
        InputError: colours of another kind (CMYK, CIELAB).
        ValueError: a palette that does not fit.
    """
    keyframe = series.keyframe
    photometric, samples = keyframe.photometric, keyframe.samplesperpixel
    has_one_page = samples == n_values
    if photometric == _PHOTOMETRIC.PALETTE and n_values == 1 and series.kind != "imagej":
        return Stored(levels, 3, is_rgb=True, tint=_make_palette(_page_of(series, page)))
    is_decoded_ycbcr = photometric == _PHOTOMETRIC.YCBCR and keyframe.compression in JPEG
    if photometric == _PHOTOMETRIC.RGB or is_decoded_ycbcr:
        if has_one_page and _has_alpha_at_most(keyframe):
            return _colours_or_planes(series, levels, n_values)
        return Stored(levels, n_values, is_rgb=False)
    is_grey_with_alpha = has_one_page and samples == 2 and _is_alpha(keyframe.extrasamples[:1])
    n_channels = 1 if is_grey_with_alpha else n_values
    if photometric in (_PHOTOMETRIC.PALETTE, _PHOTOMETRIC.MASK):
        return Stored(levels, n_channels, is_rgb=False)
    if photometric == _PHOTOMETRIC.MINISBLACK:
        return Stored(levels, n_channels, is_rgb=False, tint=_make_tint(keyframe, is_inverted=False))
    if photometric == _PHOTOMETRIC.MINISWHITE:
        is_told = "PhotometricInterpretation" in keyframe.tags  # tifffile takes a missing one for this
        # only types without a sign have a white to count down from
        is_inverted = series.dtype.kind in "ub" and is_told
        tint = _make_tint(keyframe, is_inverted=is_inverted)
        return Stored(levels, n_channels, is_rgb=False, tint=tint)
    kind = getattr(photometric, "name", photometric)
    raise InputError(
        f"has colours of an unsupported kind ({kind})", where=path, fix="export it as RGB or grey"
    )


def _colours_or_planes(series: tifffile.TiffPageSeries, levels: Levels, n_values: int) -> Stored:
    """Return what is stored as colours as such, unless it is an array of planes that are none."""
    is_rgb, is_told = True, True
    if series.kind == "shaped" and series.keyframe.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        is_told = '"axes"' in series.keyframe.description
        is_rgb = "C" not in series.axes if is_told else series.dtype == np.uint8
    if is_rgb:
        return Stored(levels, _N_COLOURS, is_rgb=True)
    doubt = f"its {n_values} planes of {series.dtype.name} were taken for separate channels; "
    doubt += "if they are colours, store them as (height, width, 3)"
    return Stored(levels, n_values, is_rgb=False, doubt=None if is_told else doubt)


def _is_alpha(extras: tuple[int, ...]) -> bool:
    return len(extras) == 1 and extras[0] in _ALPHA


def _has_alpha_at_most(keyframe: tifffile.TiffPage) -> bool:
    """Tell whether nothing but alpha lies behind three samples; in 8 bits programs often do not name it."""
    n_extra, extras = keyframe.samplesperpixel - _N_COLOURS, keyframe.extrasamples
    is_alpha = not extras or _is_alpha(extras) or keyframe.dtype == np.uint8
    return n_extra == 0 or (n_extra == 1 and is_alpha)


def _make_tint(keyframe: tifffile.TiffPage, *, is_inverted: bool) -> _Tint | None:
    """Return what stretches grey of few bits to 0 and 255, and counts down from the white of its bits.

    None where values mean what they are.
    """
    bits, dtype = keyframe.bitspersample, keyframe.dtype
    if dtype == np.uint8 and bits < 8 * dtype.itemsize:
        white = (1 << bits) - 1
        steps = np.minimum(np.arange(256), white) / white  # a file may fill gaps with what no bits hold
        table = np.rint(255 * (1 - steps if is_inverted else steps)).astype(np.uint8)
        return lambda values: table[values]
    if not is_inverted:
        return None
    if dtype is None or dtype.kind != "u" or bits >= 8 * dtype.itemsize:
        return np.invert
    top = dtype.type((1 << bits) - 1)
    return lambda values: top - values


def _page_of(series: tifffile.TiffPageSeries, number: int) -> tifffile.TiffPage:
    """Return a page with its own tags; each page of a stack may have a palette of its own."""
    page = series.pages[number]
    if page is None:
        raise ValueError(f"page {number} is missing")
    return page.aspage()


def _make_palette(keyframe: tifffile.TiffPage) -> _Tint:
    """Return the function from (H, W, 1) indices to (H, W, 3) uint8 colours."""
    if keyframe.colormap is None:
        raise ValueError("a palette image without a palette")
    table = (np.asarray(keyframe.colormap).T >> 8).astype(np.uint8)  # (n, 3); TIFF has colours of 16 bits
    if table.shape != (1 << keyframe.bitspersample, 3):
        raise ValueError(f"a palette of shape {table.shape} for {keyframe.bitspersample} bits")
    return lambda indices: table[indices[:, :, 0].astype(np.intp)]  # a bit would be a mask
