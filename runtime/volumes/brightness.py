"""How bright the objects of a volume are, over the very voxels that the labels give them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.volumes.channels import read_channels
from darcnn.runtime.volumes.labels import Numbered, draw_planes
from darcnn.runtime.volumes.volume import Volume

__all__ = ["measure_brightness"]


def measure_brightness(numbered: Numbered, volume: Volume) -> NDArray[np.float64]:
    """Return the mean of the volume over each object, and of each channel of a file with several.

    The planes of the volume are read once more, one after another.

    Args:
        numbered: the objects, numbered from 1 without a gap.
        volume: open; stays open.
    Returns:
        (N, 1 + C), C the number of `VolumeInfo.several_channels`; NaN where no value is finite.
    Raises:
        InputError: the file cannot be read any more.
    """
    info, n = volume.info, len(numbered.rows)
    shape = (n + 1, 1 + len(info.several_channels))
    if not n:
        return np.zeros((0, shape[1]))
    sums, counts = np.zeros(shape), np.zeros(shape)
    planes = zip(draw_planes(numbered, info.shape), read_channels(info), strict=True)
    for index, (labels, channels) in enumerate(planes):
        inside = labels > 0
        if not inside.any():
            continue
        owner = labels[inside]  # (P,)
        searched = volume.read("z", index)[inside]
        for column, values in enumerate((searched, *np.moveaxis(channels, 2, 0)[:, inside])):
            finite = np.isfinite(values)
            seen = owner[finite]
            sums[:, column] += np.bincount(seen, values[finite].astype(np.float64), minlength=n + 1)
            counts[:, column] += np.bincount(seen, minlength=n + 1)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)
    return means[1:]
