"""All channels of the planes of a volume, of which the volume itself holds one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.ome_zarr import is_ome_zarr
from darcnn.runtime.readers.open import read_planes
from darcnn.runtime.volumes.ome_zarr import read_zarr_channels
from darcnn.runtime.volumes.volume import VolumeInfo

__all__ = ["read_channels"]


def read_channels(info: VolumeInfo) -> Iterator[NDArray[Any]]:
    """Yield the channels of each plane, (H, W, C), as the file has them; none where it has only one.

    Raises:
        InputError: the file cannot be read any more.
    """
    n_planes, height, width = info.shape
    if not info.several_channels:
        yield from (np.zeros((height, width, 0)) for _ in range(n_planes))
    elif not isinstance(info.path, Path) or is_ome_zarr(info.path):
        yield from read_zarr_channels(info.path, info.layout)
    else:
        readers = read_planes(info.path, info.layout.places())
        whole = Region(0, 0, width, height)
        yield from info.layout.project(reader.read(whole, level=0) for reader in readers)
