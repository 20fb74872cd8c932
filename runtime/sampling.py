"""Tiles at network resolution: read a level, apply the intensity rule, resample, reflect at the edges."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.intensity import (
    IntensityRule,
    Window,
    apply_window,
    measure_window,
    sees_separate_channels,
    select_channels,
)
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.protocol import Location, Reader
from darcnn.runtime.tiling import Tile

__all__ = [
    "SampledTile",
    "TileSampler",
    "check_white",
    "join_samples",
    "measure_slide",
    "needs_sample",
    "read_ahead",
    "resize_box",
    "sample_slide",
    "spread_evenly",
]

T = TypeVar("T")

MIN_SAMPLE_PX = 1 << 18  # 0.25 Mpx say enough of the brightness of a slide
MAX_SAMPLE_PX = 1 << 24  # 16 Mpx at most are held to measure it
SAMPLE_GRID = 8  # 8 x 8 regions stand for a level that is larger
MAX_COARSER = 4.0  # a level up to 4 times coarser than the model's pixels still shows its objects
READERS = 2  # threads that read tiles while the engine computes; decoders work outside Python's lock
BATCHES_AHEAD = 2
MAX_BLOCK_PX = 4096  # the side of what is read at once, pixels of the level
_WHITE_AT_MOST = 2.0  # of pixels from 0 to 1: sharpening goes a little beyond the ends,
_CAMERA_BITS = (8, 10, 12, 14)
_FEW_BITS = max(_CAMERA_BITS)  # glass uses more of 16 bits, unless the camera has fewer
_WHITEST = 99.9  # per cent, and a hot pixel says nothing


@dataclass(frozen=True, slots=True)
class SampledTile:
    """A tile, ready for the engine, with all that its objects need to be placed at level 0."""

    plan: SlidePlan
    shape: tuple[int, int]  # (H, W) of level 0
    tile: Tile  # of the plan
    pixels: NDArray[np.uint8]  # (S, S, C)
    sampler: TileSampler | None = None  # reads what lies around the tile; None: it cannot be read
    zoom: int = 1  # network pixels per pixel of `pixels`


class TileSampler:
    """Reads the tiles of one plan from one reader; `read` may be called from several threads."""

    def __init__(self, reader: Reader, plan: SlidePlan, window: Window, *, channels: int) -> None:
        self._reader = reader
        self._plan = plan
        self._window = window
        self._channels = channels
        # pixels of the level per network pixel
        self._factor_x = plan.level.width_px / plan.width
        self._factor_y = plan.level.height_px / plan.height

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """Return (S, S, C) for the tile's read region; beyond the slide's edges its pixels are reflected.

        The same network pixel has the same value in every tile, to one grey level; not where OpenSlide reads
        a level whose downsample is no whole number (`SlideReader`).
        """
        x, y, needed = self._needed(tile)
        pixels = self._sample(needed)
        if x[-1] - x[0] == len(x) - 1 and y[-1] - y[0] == len(y) - 1:  # nothing is reflected
            return pixels
        return pixels[np.ix_(y - needed.y0, x - needed.x0)]

    def source(self, tile: Tile) -> Region:
        """Return the region of the plan's level that `read` looks at, and nothing beyond it."""
        _, _, needed = self._needed(tile)
        return self._source(needed)

    def _needed(self, tile: Tile) -> tuple[NDArray[np.int64], NDArray[np.int64], Region]:
        """Return the network pixel of each column and row of the tile, and the region that holds them."""
        x = _reflect(tile.read.x0, tile.read.x1, self._plan.width)
        y = _reflect(tile.read.y0, tile.read.y1, self._plan.height)
        return x, y, Region(int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1)

    def _sample(self, region: Region) -> NDArray[np.uint8]:
        """Return the network pixels of `region`, inside the slide, in blocks of bounded size."""
        result = np.empty((region.height, region.width, self._channels), np.uint8)
        step_x = max(1, int(MAX_BLOCK_PX / self._factor_x))
        step_y = max(1, int(MAX_BLOCK_PX / self._factor_y))
        for y0 in range(region.y0, region.y1, step_y):
            for x0 in range(region.x0, region.x1, step_x):
                block = Region(x0, y0, min(x0 + step_x, region.x1), min(y0 + step_y, region.y1))
                result[
                    block.y0 - region.y0 : block.y1 - region.y0, block.x0 - region.x0 : block.x1 - region.x0
                ] = self._sample_block(block)
        return result

    def _source(self, block: Region) -> Region:
        """Return what of the level weighs in on the network pixels of `block`, borders and beyond."""
        factor_x, factor_y = self._factor_x, self._factor_y
        if factor_x == 1.0 and factor_y == 1.0:
            return block
        margin_x, margin_y = (math.ceil(max(1.0, factor)) + 1 for factor in (factor_x, factor_y))
        return Region(
            math.floor(block.x0 * factor_x) - margin_x,
            math.floor(block.y0 * factor_y) - margin_y,
            math.ceil(block.x1 * factor_x) + margin_x,
            math.ceil(block.y1 * factor_y) + margin_y,
        ).clip(self._plan.level.width_px, self._plan.level.height_px)

    def _sample_block(self, block: Region) -> NDArray[np.uint8]:
        factor_x, factor_y = self._factor_x, self._factor_y
        source = self._source(block)
        if factor_x == 1.0 and factor_y == 1.0:
            return self._read_level(source)
        left, right = block.x0 * factor_x, block.x1 * factor_x
        top, bottom = block.y0 * factor_y, block.y1 * factor_y
        pixels = self._read_level(source)
        box = (  # the last bit of a product may overshoot the last pixel
            left - source.x0,
            top - source.y0,
            min(right - source.x0, source.width),
            min(bottom - source.y0, source.height),
        )
        return resize_box(pixels, box, (block.width, block.height))

    def _read_level(self, region: Region) -> NDArray[np.uint8]:
        pixels = self._reader.read(region, level=self._plan.level.index)
        is_rgb = self._reader.info.is_rgb
        chosen = select_channels(pixels, is_rgb=is_rgb, channels=self._channels, channel=self._plan.channel)
        return apply_window(chosen, self._window)


def resize_box(
    pixels: NDArray[np.uint8], box: tuple[float, float, float, float], size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Return `box`, x0 y0 x1 y1, of (H, W, C) at `size`, (width, height), bilinear: (height, width, C)."""
    n_channels = pixels.shape[2]
    # three are one picture, in less time than its bands; of four Pillow would weigh three by the fourth
    parts = [pixels] if n_channels == 3 else [pixels[:, :, band] for band in range(n_channels)]
    return np.dstack(
        [np.asarray(Image.fromarray(part).resize(size, Image.Resampling.BILINEAR, box=box)) for part in parts]
    )


def read_ahead(
    sampler: TileSampler, tiles: Iterable[Tile], *, batch: int, skips_damaged: bool = False
) -> Iterator[tuple[list[Tile], list[NDArray[np.uint8]]]]:
    """Yield `tiles` in batches with their pixels; threads read the next two batches meanwhile.

    With `skips_damaged`, tiles whose pixels are damaged are left out, and so are batches of such only.

    Raises:
        DamagedPixelsError: a tile is damaged.
        InputError: the slide cannot be read any more.
    """
    waiting = iter(tiles)
    ahead: deque[tuple[list[Tile], list[Future[NDArray[np.uint8]]]]] = deque()
    with ThreadPoolExecutor(READERS, "darcnn-read") as pool:
        try:
            while True:
                while len(ahead) <= BATCHES_AHEAD and (group := list(islice(waiting, batch))):
                    ahead.append((group, [pool.submit(sampler.read, tile) for tile in group]))
                if not ahead:
                    return
                group, reads = ahead.popleft()
                whole: list[tuple[Tile, NDArray[np.uint8]]] = []
                for tile, read in zip(group, reads, strict=True):
                    try:
                        whole.append((tile, read.result()))
                    except DamagedPixelsError:
                        if not skips_damaged:
                            raise
                if whole:
                    yield [tile for tile, _ in whole], [pixels for _, pixels in whole]
        finally:
            pool.shutdown(cancel_futures=True)


def measure_slide(reader: Reader, plan: SlidePlan, rule: IntensityRule, *, channels: int) -> Window:
    """Return the window of `rule` for the slide, the same for every tile; read only if the rule needs it.

    Raises:
        InputError: numbers with fractions that 0 and 1 do not bound, or of 16 bits that use 14 at most, where
            the rule takes the ends of the type for black and white.
    """
    info = reader.info
    sample = np.empty((0, channels), info.dtype)
    if needs_sample(rule, info.dtype):
        sample = sample_slide(reader, scale=plan.scale, channels=channels, channel=plan.channel)
        check_white(sample, rule, info.dtype, info.path, name=info.name)
    by_channel = sees_separate_channels(
        available=len(info.channel_names), is_rgb=info.is_rgb, channels=channels, channel=plan.channel
    )
    return measure_window(rule, sample, by_channel=by_channel)


def needs_sample(rule: IntensityRule, dtype: np.dtype[Any]) -> bool:
    """Tell whether values of `dtype` must be looked at before `rule` can be followed or trusted."""
    return rule.needs_statistics or _may_lack_white(rule, dtype)


def _may_lack_white(rule: IntensityRule, dtype: np.dtype[Any]) -> bool:
    return rule.kind == "full_range" and (dtype.kind == "f" or dtype == np.uint16)


def check_white(
    sample: NDArray[Any], rule: IntensityRule, dtype: np.dtype[Any], path: Location | None, *, name: str
) -> None:
    """Refuse values of which white is not where their type has it, at 1 or at 65535, if `rule` takes it so.

    Args:
        sample: of the values.
        rule: of the model; one that measures them refuses none.
        dtype: as they are stored.
        path: of the file; None: they are an array.
        name: of the array.
    Raises:
        InputError: numbers with fractions reach beyond 1, or of 16 bits 14 at most are used.
    """
    if not _may_lack_white(rule, dtype):
        return
    finite = sample[np.isfinite(sample)]
    highest = float(np.percentile(finite, _WHITEST)) if finite.size else 0.0
    where = path or name
    if dtype.kind == "f" and highest > _WHITE_AT_MOST:
        raise InputError(
            f"its values reach {highest:.4g}, where of such numbers 0 is black and 1 is white",
            where=where,
            fix="divide them, or store them as uint8 or uint16",
        )
    if dtype == np.uint16 and 0 < highest < 2**_FEW_BITS:
        bits = next(n for n in _CAMERA_BITS if highest < 2**n)
        white = 2**bits - 1
        said = f"window=Window(0, {white})" if path is None else f"darcnn-run --window 0,{white}"
        raise InputError(
            f"its values reach {highest:.0f}, where of 16 bits 65535 is white",
            where=where,
            fix=f"give {said} if the camera has {bits} bits, or store them in all 16",
        )


def sample_slide(reader: Reader, *, scale: float, channels: int, channel: int | None = None) -> NDArray[Any]:
    """Return raw values (N, `channels`) that stand for the brightness of the whole slide.

    They come from the coarsest level that has 0.25 Mpx and is at most 4 times coarser than the model's
    pixels; from the whole level if it has up to 16 Mpx, else from 64 regions spread evenly.

    Args:
        reader: the open slide; stays open.
        scale: network pixels per level-0 pixel.
        channels: of the model.
        channel: the chosen one, None for colours, the only one or several.
    Raises:
        ShapeError: the channels do not serve (`select_channels`).
    """
    info = reader.info
    serving = [
        level
        for level in info.levels
        if level.width_px * level.height_px >= MIN_SAMPLE_PX and level.downsample * scale <= MAX_COARSER
    ]
    level = max(serving, key=lambda level: level.downsample, default=info.levels[0])
    samples: list[NDArray[Any]] = []
    for region in _sample_regions(level):
        pixels = reader.read(region, level=level.index)
        chosen = select_channels(pixels, is_rgb=info.is_rgb, channels=channels, channel=channel)
        samples.append(chosen.reshape(-1, channels))
    return np.concatenate(samples)


def join_samples(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the samples of several planes of one file, each (N, C), as one of at most 16 M values or so."""
    step = math.ceil(sum(len(part) for part in parts) / MAX_SAMPLE_PX)
    return np.concatenate([part[::step] for part in parts])


def spread_evenly(items: Sequence[T], limit: int) -> list[T]:
    """Return at most `limit` of `items` at even steps; the ends are spared.

    >>> spread_evenly("abc", 16), spread_evenly(range(64), 4)
    (['a', 'b', 'c'], [8, 24, 40, 56])
    """
    n = min(limit, len(items))
    return [items[(2 * k + 1) * len(items) // (2 * n)] for k in range(n)]


def _sample_regions(level: Level) -> list[Region]:
    """Return the whole level, or 64 regions of it, each in the middle of its field of an 8 x 8 grid."""
    if level.width_px * level.height_px <= MAX_SAMPLE_PX:
        return [Region(0, 0, level.width_px, level.height_px)]
    share = MAX_SAMPLE_PX / (level.width_px * level.height_px)  # of the pixels of a field
    spans = []
    for extent in (level.width_px, level.height_px):
        bounds = [extent * k // SAMPLE_GRID for k in range(SAMPLE_GRID + 1)]
        axis = []
        for low, high in pairwise(bounds):
            length = max(1, int((high - low) * math.sqrt(share)))
            start = low + (high - low - length) // 2
            axis.append((start, start + length))
        spans.append(axis)
    return [Region(x0, y0, x1, y1) for y0, y1 in spans[1] for x0, x1 in spans[0]]


def _reflect(start: int, stop: int, n: int) -> NDArray[np.int64]:
    """Return the pixel of `0..n-1` that stands at each of `start..stop-1`; the last pixel is not doubled.

    >>> _reflect(-3, 7, 4)
    array([3, 2, 1, 0, 1, 2, 3, 2, 1, 0])
    """
    at = np.arange(start, stop)
    if n == 1:
        return np.zeros_like(at)
    at = at % (2 * (n - 1))
    return np.minimum(at, 2 * (n - 1) - at)
