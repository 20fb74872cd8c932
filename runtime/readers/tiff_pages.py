"""Pixels of TIFF pages: only the strips or tiles under a region are read and decoded."""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import TiffFileError

from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Region

__all__ = ["UNREADABLE", "PageFiles", "PageSource", "Segment", "SegmentGrid", "damaged"]

# Strips span the width of a slide: without a cache each would be decoded again for every tile of a row.
_CACHE_BYTES = 256 * 2**20
_KEPT = 4  # segments that stay whatever their size: one of each channel of large strips
# What tifffile raises on damaged files (found by flipping bytes): errors of imagecodecs are RuntimeErrors,
# those of tifffile ValueErrors; a damaged size may ask for absurd memory or fit no C integer; the others come
# from parsing.
UNREADABLE = (
    TiffFileError,
    ValueError,
    RuntimeError,
    OSError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    struct.error,
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A strip or tile: its place in the page's list, its plane of samples, and its first pixel."""

    index: int
    sample: int
    depth: int
    y: int
    x: int


@dataclass(frozen=True, slots=True)
class SegmentGrid:
    """How tiles or strips cover a page; strips are tiles as wide as the page. All extents in pixels."""

    n_samples: int  # planes of separate samples
    depth: int
    height: int
    width: int
    n_contiguous: int  # samples stored pixel by pixel
    tile_depth: int
    tile_height: int
    tile_width: int

    @property
    def n_values(self) -> int:
        """Number of values of the page."""
        return self.n_samples * self.depth * self.height * self.width * self.n_contiguous

    @property
    def n_segments(self) -> int:
        """Number of tiles or strips of the page."""
        across, down, deep = self._counts()
        return self.n_samples * deep * down * across

    def under(self, region: Region, depth: int) -> Iterator[Segment]:
        """Yield the segments that hold slice `depth` of `region`, in the order of the file's list.

        >>> grid = SegmentGrid(1, 1, 32, 48, 1, 1, 16, 16)
        >>> [segment.index for segment in grid.under(Region(15, 16, 17, 17), 0)]
        [3, 4]
        """
        across, down, deep = self._counts()
        slab = depth // self.tile_depth
        for sample in range(self.n_samples):
            for row in range(region.y0 // self.tile_height, -(-region.y1 // self.tile_height)):
                for column in range(region.x0 // self.tile_width, -(-region.x1 // self.tile_width)):
                    index = ((sample * deep + slab) * down + row) * across + column
                    y, x = row * self.tile_height, column * self.tile_width
                    yield Segment(index, sample, slab * self.tile_depth, y, x)

    def _counts(self) -> tuple[int, int, int]:
        across, down = -(-self.width // self.tile_width), -(-self.height // self.tile_height)
        return across, down, -(-self.depth // self.tile_depth)


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: a key of the cache
class PageSource:
    """One page: where its bytes lie and what makes pixels of them.

    `raw_offset` is where a page without compression begins, whole and in order; else None, and
    `decode` (tifffile's) turns the bytes of one segment into (pixels (D, H, W, C), position, shape).
    """

    path: Path
    grid: SegmentGrid
    dtype: np.dtype[Any]  # as stored, byte order included
    raw_offset: int | None
    offsets: tuple[int, ...]
    byte_counts: tuple[int, ...]
    decode: Callable[..., Any]
    decode_options: dict[str, Any]
    fill: float  # the value of segments that were left out of the file

    @property
    def end(self) -> int:
        """The position in the file behind the last byte of the page."""
        if self.raw_offset is not None:
            return self.raw_offset + self.grid.n_values * self.dtype.itemsize
        return max((start + n for start, n in zip(self.offsets, self.byte_counts, strict=False)), default=0)


class PageFiles:
    """The open files of a TIFF and the decoded segments that were used last; for several threads.

    Files are locked while they are read; decoding runs in parallel.
    """

    def __init__(self, paths: set[Path]) -> None:
        self._file_lock = threading.Lock()
        self._cache_lock = threading.Lock()
        self._cache: OrderedDict[tuple[PageSource, Segment], NDArray[Any]] = OrderedDict()
        self._cache_bytes = 0
        with ExitStack() as stack:
            self._files = {path: stack.enter_context(path.open("rb")) for path in paths}
            self._open_files = stack.pop_all()

    def close(self) -> None:
        """Close the files and drop the cache."""
        self._cache.clear()
        self._open_files.close()

    def read(self, page: PageSource, region: Region, depth: int) -> NDArray[Any]:
        """Return (H, W, C) pixels of slice `depth` of the page, in the stored type.

        Raises:
            DamagedPixelsError: a segment cannot be decoded.
            InputError: the file ends early, or a segment asks for more memory than there is.
        """
        grid = page.grid
        shape = (grid.n_samples, region.height, region.width, grid.n_contiguous)
        pixels: NDArray[Any] = np.full(shape, page.fill, page.dtype)
        if page.raw_offset is not None:
            self._fill_raw(pixels, page, region, depth, page.raw_offset)
        else:
            self._forget(page, region.y0 - region.height)
            for segment in grid.under(region, depth):
                values = self._decoded(page, segment)
                if values is not None:
                    _paste(pixels[segment.sample], values[depth - segment.depth], segment, region)
        pixels = np.moveaxis(pixels, 0, 2)  # (H, W, separate, contiguous)
        return pixels.reshape(region.height, region.width, grid.n_samples * grid.n_contiguous)

    def _fill_raw(
        self, pixels: NDArray[Any], page: PageSource, region: Region, depth: int, offset: int
    ) -> None:
        grid, stream = page.grid, self._files[page.path]
        pixel_bytes = grid.n_contiguous * page.dtype.itemsize
        with self._file_lock:
            for sample in range(grid.n_samples):
                first = (sample * grid.depth + depth) * grid.height + region.y0
                for row in range(region.height):
                    stream.seek(offset + ((first + row) * grid.width + region.x0) * pixel_bytes)
                    line = pixels[sample, row].view(np.uint8)
                    if stream.readinto(memoryview(line)) != line.nbytes:
                        raise damaged(page.path, "ends before its last pixel")

    def _decoded(self, page: PageSource, segment: Segment) -> NDArray[Any] | None:
        """Return (D, H, W, C) values of the segment, None where the file leaves it out."""
        key = (page, segment)
        with self._cache_lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        n_bytes, offset = page.byte_counts[segment.index], page.offsets[segment.index]
        if n_bytes == 0 or offset == 0:  # nothing lies at 0 but the head of the file
            return None
        with self._file_lock:
            stream = self._files[page.path]
            stream.seek(offset)
            encoded = stream.read(n_bytes)
        if len(encoded) != n_bytes:  # it was whole when it was opened
            raise damaged(page.path, "ends before its last pixel")
        place = f"near x {segment.x}, y {segment.y}"
        try:
            values: NDArray[Any] = page.decode(encoded, segment.index, **page.decode_options)[0]
        except MemoryError as err:  # a damaged size may ask for absurd memory, or there is none left
            raise damaged(page.path, f"takes too much memory {place}") from err
        except UNREADABLE as err:
            raise damaged(page.path, f"cannot be decoded {place} ({err})", kind=DamagedPixelsError) from err
        self._remember(key, values)
        return values

    def _remember(self, key: tuple[PageSource, Segment], values: NDArray[Any]) -> None:
        with self._cache_lock:
            if key in self._cache:  # another thread was faster
                return
            self._cache[key] = values
            self._cache_bytes += values.nbytes
            while self._cache_bytes > _CACHE_BYTES and len(self._cache) > _KEPT:
                _, oldest = self._cache.popitem(last=False)
                self._cache_bytes -= oldest.nbytes

    def _forget(self, page: PageSource, y: int) -> None:
        """Drop the page's segments that end above row `y`: slides are read from the top down."""
        with self._cache_lock:
            above = [
                key
                for key, values in self._cache.items()
                if key[0] is page and key[1].y + values.shape[1] <= y
            ]
            for key in above:
                self._cache_bytes -= self._cache.pop(key).nbytes


def damaged(path: Path, problem: str, *, kind: type[InputError] = InputError) -> InputError:
    """Return the error for a file whose bytes are not what its directory promises."""
    return kind(problem, where=path, fix="copy the file again or export it anew")


def _paste(target: NDArray[Any], values: NDArray[Any], segment: Segment, region: Region) -> None:
    """Copy what a segment's `values` (H, W, C) hold of `region` into `target`, the region's pixels."""
    y0, x0 = max(segment.y, region.y0), max(segment.x, region.x0)
    y1 = min(segment.y + values.shape[0], region.y1)
    x1 = min(segment.x + values.shape[1], region.x1)
    target[y0 - region.y0 : y1 - region.y0, x0 - region.x0 : x1 - region.x0] = values[
        y0 - segment.y : y1 - segment.y, x0 - segment.x : x1 - segment.x
    ]
