"""Where the pixels of a TIFF page lie in its file, and how they are packed: tifffile's facts, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from operator import index as index_of
from pathlib import Path
from typing import Any

import tifffile

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.tiff_pages import PageSource, SegmentGrid, damaged

__all__ = ["JPEG", "locate_page"]

JPEG = (6, 7, 33007, 34892)  # tifffile turns YCbCr into RGB in these compressions only


def locate_page(series: tifffile.TiffPageSeries, index: int, path: Path) -> PageSource:
    """Return page number `index` of a series of the file `path`.

    Raises:
        InputError: the page is damaged, ends beyond the file, or lies in a file that is not there.
    """
    keyframe = series.keyframe
    samples, depth, height, width, contiguous = keyframe.shaped
    tiled = keyframe.is_tiled
    tile = (
        (keyframe.tiledepth, keyframe.tilelength, keyframe.tilewidth)
        if tiled
        else (1, keyframe.rowsperstrip, width)
    )
    grid = SegmentGrid(samples, depth, height, width, contiguous, *tile)
    if min(astuple(grid)) < 1:
        raise damaged(path, "has tiles or strips without pixels")
    dtype = series.dtype.newbyteorder(keyframe.parent.byteorder)
    page: tifffile.TiffPage | tifffile.TiffFrame | None = keyframe
    raw_offset: int | None = None
    if series.dataoffset is not None and not series.is_multifile:
        # all pages in one run of bytes, of which the file may list the first only
        raw_offset = index_of(series.dataoffset) + index * grid.n_values * dtype.itemsize
    else:
        page = series[index]
        raw_offset = None if page is None else _raw_offset(page)
    if page is None:
        raise InputError(
            "lacks a plane: it was never written, or lies in another file",
            where=path,
            fix="put the files of the OME-TIFF side by side under their first names, or choose another",
        )
    source = PageSource(
        path=Path(page.parent.filehandle.path),
        grid=grid,
        dtype=dtype,
        raw_offset=raw_offset,
        offsets=_whole(page.dataoffsets, grid.n_segments),
        byte_counts=_whole(page.databytecounts, grid.n_segments),
        decode=keyframe.decode,
        decode_options=_decode_options(keyframe, page),
        fill=keyframe.nodata,
    )
    _check_complete(source)
    return source


def _raw_offset(page: tifffile.TiffPage | tifffile.TiffFrame) -> int | None:
    """Return where an uncompressed page begins if its strips follow one another, else None."""
    starts, counts = page.dataoffsets, page.databytecounts
    if not page.is_final or not starts or not starts[0]:
        return None
    # tifffile tells this of the first page of a series only
    gaps = (start + n != after for start, n, after in zip(starts, counts, starts[1:], strict=False))
    return None if any(gaps) else index_of(starts[0])


def _decode_options(
    keyframe: tifffile.TiffPage, page: tifffile.TiffPage | tifffile.TiffFrame
) -> dict[str, Any]:
    if keyframe.compression in JPEG:
        return {"jpegtables": page.jpegtables, "jpegheader": keyframe.jpegheader}
    return {}


def _whole(values: Sequence[Any], n: int) -> tuple[int, ...]:
    """Return the first `n` of a tag's values; a damaged tag may hold what is no integer: a TypeError."""
    return tuple(index_of(value) for value in values[:n])


def _check_complete(source: PageSource) -> None:
    n_listed = min(len(source.offsets), len(source.byte_counts))
    if min((*source.offsets, *source.byte_counts, source.raw_offset or 0)) < 0:
        raise damaged(source.path, "has strips or tiles outside of the file")
    if source.raw_offset is None and n_listed < source.grid.n_segments:
        raise damaged(source.path, "does not list all of its strips or tiles")
    if source.end > source.path.stat().st_size:
        raise damaged(source.path, "is truncated")
