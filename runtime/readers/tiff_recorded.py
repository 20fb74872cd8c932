"""How much of a stack was written: an acquisition that was stopped has fewer planes than it announces."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import tifffile

from darcnn.runtime.readers.protocol import Planes
from darcnn.runtime.readers.tiff_files import files_of_images, has_other_name
from darcnn.runtime.readers.tiff_images import TiffImage
from darcnn.runtime.readers.tiff_metadata import locate_channels

__all__ = ["count_recorded"]

_FEWEST = 2  # planes that are a stack


def count_recorded(tiff: tifffile.TiffFile, image: TiffImage, path: Path) -> Planes:
    """Return how many planes of a stack can be read: all, or those before the first that was never written.

    Of a series of stacks, time points count that are whole, if there are two. All count (and reading one
    that is missing fails) where a file that the metadata names is not there, or where later planes were
    written: such a stack was not stopped, it has holes.

    Args:
        tiff: the open file.
        image: one of its images.
        path: of the file.
    """
    series, axes = image.series, image.axes
    n_z, n_t = axes.count("Z"), axes.count("T")
    everything = Planes(n_z, n_t)
    if n_z * n_t == 1 or all(page is not None for page in series.pages):
        return everything
    files = files_of_images(tiff.ome_metadata)[image.number : image.number + 1]
    has_files = all((path.parent / name).exists() for names in files for name in names)
    if not has_files or has_other_name(tiff.ome_metadata, path.name):
        return everything
    is_there = [page is not None for page in series.pages]
    steps: list[list[bool]] = []  # of each time point, or plane of a stack: which of its pages are there
    for step in range(n_t if n_t > 1 else n_z):
        planes = [(z, step) for z in range(n_z)] if n_t > 1 else [(step, 0)]
        steps.append([is_there[one.page] for z, t in planes for one in locate_channels(axes, z=z, t=t)])
    n_whole = len(list(takewhile(all, steps)))
    has_holes = any(any(later) for later in steps[n_whole + 1 :])
    if n_whole < _FEWEST or has_holes:
        return everything
    n_lacking = len(steps) - n_whole
    return Planes(n_z, n_whole, n_lacking) if n_t > 1 else Planes(n_whole, n_t, n_lacking)
