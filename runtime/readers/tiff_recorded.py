"""How much of a stack was written: an acquisition that was stopped has fewer planes than it announces."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import tifffile

from darcnn.runtime.readers.protocol import Planes
from darcnn.runtime.readers.tiff_metadata import Axes, files_of_image, locate_channels

__all__ = ["count_recorded"]

_FEWEST = 2  # planes that are a stack


def count_recorded(
    tiff: tifffile.TiffFile, series: tifffile.TiffPageSeries, axes: Axes, path: Path
) -> Planes:
    """Return how many planes of a stack can be read: all, or those before the first that was never written.

    Of a series of stacks, time points count that are whole. Where a file that the metadata names is not
    there, its planes are missing for another reason, and all count.

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
    if not all((path.parent / name).exists() for name in names):
        return everything
    is_there = [page is not None for page in series.pages]

    def is_whole(z: int, t: int) -> bool:
        return all(is_there[place.page] for place in locate_channels(axes, z=z, t=t))

    if n_t > 1:
        n_whole = len(list(takewhile(lambda t: all(is_whole(z, t) for z in range(n_z)), range(n_t))))
        found = Planes(n_z, n_whole, n_lacking=n_t - n_whole)
    else:
        n_whole = len(list(takewhile(lambda z: is_whole(z, 0), range(n_z))))
        found = Planes(n_whole, n_t, n_lacking=n_z - n_whole)
    return found if n_whole >= _FEWEST else everything
