"""How much of a stack was written: an acquisition that was stopped has fewer planes than it announces."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import tifffile

from darcnn.runtime.readers.protocol import Planes
from darcnn.runtime.readers.tiff_metadata import Axes, files_of_image, has_other_name, locate_channels

__all__ = ["count_recorded"]

_FEWEST = 2  # planes that are a stack


def count_recorded(
    tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, axes: Axes, path: Path
) -> Planes:
    """Return how many planes of a stack can be read: all, or those before the first that was never written.

    Of a series of stacks, time points count that are whole, if there are two. All count (and reading one
    that is missing fails) where a file that the metadata name is not there, or where later planes were
    written: such a stack was not stopped, it has holes.

    Args:
        tiff: the open file.
        series: its first image.
        axes: of the image.
        path: of the file.
    """
    n_z, n_t = axes.count("Z"), axes.count("T")
    everything = Planes(n_z, n_t)
    if n_z * n_t == 1 or all(page is not None for page in series.pages):
        return everything
    names = files_of_image(tiff.ome_metadata, path.name)
    if has_other_name(tiff.ome_metadata, path.name) or not all(
        (path.parent / name).exists() for name in names
    ):
        return everything
    is_there = [page is not None for page in series.pages]
    pages = [
        [is_there[place.page] for z in range(n_z) for place in locate_channels(axes, z=z, t=t)]
        if n_t > 1
        else [is_there[place.page] for place in locate_channels(axes, z=t, t=0)]
        for t in range(n_t if n_t > 1 else n_z)
    ]
    n_whole = len(list(takewhile(all, pages)))
    has_holes = any(any(later) for later in pages[n_whole + 1 :])
    if n_whole < _FEWEST or has_holes:
        return everything
    lacking = len(pages) - n_whole
    return Planes(n_z, n_whole, lacking) if n_t > 1 else Planes(n_whole, n_t, lacking)
