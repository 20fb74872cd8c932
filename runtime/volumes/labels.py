"""The labels of a volume: an OME-Zarr 0.5 pyramid, drawn slab by slab."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from darcnn.runtime.geometry import Grid
from darcnn.runtime.sinks.atomic import atomic_folder
from darcnn.runtime.sinks.ome_zarr import label_attributes
from darcnn.runtime.volumes.solid import SolidFile

__all__ = ["Numbered", "draw_planes", "write_label_volume"]

_CHUNK = (16, 256, 256)  # what a viewer fetches, z y x
_SHARD_PX = 2048  # side of what is one file
_SMALLEST_PX = 256  # the pyramid ends at this size
_SLAB_BYTES = 64 << 20  # labels in memory at once, about


@dataclass(frozen=True, slots=True, eq=False)
class Numbered:
    """Solids that are reported: solid `rows[k]` of `solids` has the number `ids[k]`."""

    solids: SolidFile
    rows: NDArray[np.int64]
    ids: NDArray[np.int64]


def _draw_slabs(numbered: Numbered, shape: tuple[int, int, int], depth: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the labels of `depth` planes at a time along z, (d, H, W), 0 where there is nothing.

    Where objects overlap, the higher score is on top, and of equal scores the lower number.
    """
    boxes, scores = numbered.solids.boxes[numbered.rows], numbered.solids.scores[numbered.rows]
    order = np.lexsort((-numbered.ids, scores))  # the best is drawn last, of equals the lowest number
    for start in range(0, shape[0], depth):
        stop = min(start + depth, shape[0])
        labels = np.zeros((stop - start, *shape[1:]), np.uint32)
        for k in order[(boxes[order, 0] < stop) & (boxes[order, 3] > start)]:
            z0, y0, x0, z1, y1, x1 = boxes[k].tolist()
            low, high = max(z0, start), min(z1, stop)
            mask = numbered.solids.planes(int(numbered.rows[k]), low - z0, high - z0)
            labels[low - start : high - start, y0:y1, x0:x1][mask] = numbered.ids[k]
        yield labels


def draw_planes(numbered: Numbered, shape: tuple[int, int, int]) -> Iterator[NDArray[np.uint32]]:
    """Yield the labels of each plane along z, (H, W), as `write_label_volume` writes them."""
    for labels in _draw_slabs(numbered, shape, _slab_depth(shape)):
        yield from labels


def write_label_volume(
    path: Path,
    numbered: Numbered,
    *,
    shape: tuple[int, int, int],
    grid: Grid,
    name: str,
    is_series: bool = False,
) -> None:
    """Write the labels as a 3D label pyramid, uint32: a voxel's value is its object's number.

    Each level takes every second voxel of the one before (labels cannot be averaged), down to 256 px; of a
    series it has all time points. Memory does not grow with the number of planes.

    Args:
        path: folder to write; must not exist.
        numbered: the objects.
        shape: (Z, Y, X).
        grid: where the voxels lie.
        name: of the multiscale image.
        is_series: the first axis is time.
    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    n_levels = 1
    while max(shape[1:]) >> (n_levels - 1) > _SMALLEST_PX:
        n_levels += 1
    depth, axes = _slab_depth(shape), "tyx" if is_series else "zyx"
    with atomic_folder(path) as folder:
        group = zarr.create_group(
            store=zarr.storage.LocalStore(folder),
            zarr_format=3,
            attributes={"ome": label_attributes(n_levels, axes, grid, name=name)},
        )
        # every how manieth voxel along each axis a level has
        steps = [(1 if is_series else 1 << level, 1 << level, 1 << level) for level in range(n_levels)]
        arrays = [
            _create(group, str(level), [-(-n // k) for n, k in zip(shape, step, strict=True)], depth, axes)
            for level, step in enumerate(steps)
        ]
        start = 0
        for labels in _draw_slabs(numbered, shape, depth):
            if labels.any():  # what is not written is 0
                for array, step in zip(arrays, steps, strict=True):
                    _put(array, labels, start, step)
            start += len(labels)


def _slab_depth(shape: tuple[int, int, int]) -> int:
    """Return how many planes are drawn at once, and lie in one chunk: few where they are large."""
    return min(_CHUNK[0], max(1, _SLAB_BYTES // (4 * shape[1] * shape[2])))


def _create(group: zarr.Group, name: str, size: Sequence[int], depth: int, axes: str) -> zarr.Array[Any]:
    chunks = (depth, *_CHUNK[1:])
    # a small volume gets a small shard, so that one is never mostly padding
    sides = (min(_SHARD_PX, -(-n // chunk) * chunk) for n, chunk in zip(size[1:], chunks[1:], strict=True))
    return group.create_array(
        name,
        shape=tuple(size),
        dtype="uint32",
        chunks=chunks,
        shards=(depth, *sides),
        compressors=ZstdCodec(level=3),
        fill_value=0,
        dimension_names=tuple(axes),
    )


def _put(array: zarr.Array[Any], labels: NDArray[np.uint32], start: int, step: tuple[int, int, int]) -> None:
    """Write every `step`-th voxel of `labels`, whose first plane is plane `start` of level 0."""
    deep, down, across = step
    first = -start % deep  # the first of these planes that the level has
    part = labels[first::deep, ::down, ::across]
    if len(part):
        at = (start + first) // deep
        array[at : at + len(part)] = part
