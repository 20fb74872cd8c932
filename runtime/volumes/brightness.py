"""How bright the objects of a volume are in each of its channels: its planes are read once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.ome_zarr import is_ome_zarr
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.volumes.labels import Numbered, draw_slabs
from darcnn.runtime.volumes.ome_zarr import read_channels
from darcnn.runtime.volumes.volume import VolumeInfo

__all__ = ["measure_channels"]


def measure_channels(numbered: Numbered, info: VolumeInfo, *, t: int | None) -> NDArray[np.float64]:
    """Return the mean of each channel over the voxels of each object, (N, C); NaN where no value is finite.

    Args:
        numbered: the objects, numbered from 1 without a gap.
        info: of the volume, whose file has several channels.
        t: the moment that it was opened at.
    Raises:
        InputError: the file cannot be read any more.
    """
    n, n_channels = len(numbered.rows), len(info.channel_names)
    sums, counts = np.zeros((n + 1, n_channels)), np.zeros((n + 1, n_channels))
    labels_of_planes = (labels for slab in draw_slabs(numbered, info.shape, depth=1) for labels in slab)
    for labels, pixels in zip(labels_of_planes, _planes(info, t), strict=True):
        inside = labels > 0
        owner, values = labels[inside], pixels[inside].astype(np.float64)  # (P,), (P, C)
        for channel in range(n_channels):
            finite = np.isfinite(values[:, channel])
            seen = owner[finite]
            sums[:, channel] += np.bincount(seen, values[finite, channel], minlength=n + 1)
            counts[:, channel] += np.bincount(seen, minlength=n + 1)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)[1:]


def _planes(info: VolumeInfo, t: int | None) -> Iterator[NDArray[Any]]:
    """Yield all channels of each plane, (H, W, C)."""
    if not isinstance(info.path, Path) or is_ome_zarr(info.path):
        yield from read_channels(info.path, t=t, is_series=info.is_series)
        return
    _, height, width = info.shape
    for index in range(info.shape[0]):
        z, moment = (None, index) if info.is_series else (index, t)
        with open_source(info.path, z=z, t=moment) as reader:
            yield reader.read(Region(0, 0, width, height), level=0)
