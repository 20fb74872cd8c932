"""The label image as an OME-Zarr 0.5 pyramid, drawn shard by shard from the outlines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from darcnn.runtime.ahead import map_ahead
from darcnn.runtime.geometry import Grid, Region
from darcnn.runtime.polygons import draw_polygons
from darcnn.runtime.sinks.atomic import atomic_folder
from darcnn.runtime.sinks.parquet import read_objects

__all__ = ["label_attributes", "write_label_pyramid"]

_VERSION = "0.5"
_CHUNK_PX = 512  # what a viewer fetches
_SHARD_PX = 2048  # what is one file, and what is in memory at once; a multiple of the chunk
_SMALLEST_PX = 512  # the pyramid ends at this size
_CELLS = 1 << 20  # about so many pixels of objects are drawn at once
_COLUMNS = ("id", "geometry", "score", "bbox_y0", "bbox_y1")


def write_label_pyramid(
    path: Path,
    objects: Path,
    *,
    shape: tuple[int, int],
    grid: Grid,
    name: str,
    shard_px: int = _SHARD_PX,
) -> None:
    """Write the table `objects` (objects.parquet) as a label pyramid: a pixel's value is its object's `id`.

    Where objects overlap, the higher score is on top, and of equal scores the lower id. Each level takes
    every second pixel of the one before (labels cannot be averaged), down to 512 px. Memory does not grow
    with the slide.

    Args:
        path: folder to write; must not exist.
        objects: table of objects, level-0 pixels.
        shape: (H, W) of level 0.
        grid: where the pixels of level 0 lie, y x.
        name: of the multiscale image.
        shard_px: side of a shard, a multiple of 512.
    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with atomic_folder(path) as folder:
        shapes = [shape]
        while max(shapes[-1]) > _SMALLEST_PX:
            shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        group = zarr.create_group(
            store=zarr.storage.LocalStore(folder),
            zarr_format=3,
            attributes={"ome": label_attributes(len(shapes), "yx", grid, name=name)},
        )
        arrays = [_create(group, str(level), size, shard_px) for level, size in enumerate(shapes)]
        _draw(arrays[0], objects)
        for finer, coarser in pairwise(arrays):
            for shard in _shards(coarser):
                labels = np.asarray(finer[2 * shard.y0 : 2 * shard.y1 : 2, 2 * shard.x0 : 2 * shard.x1 : 2])
                _put(coarser, shard, labels)


def _create(group: zarr.Group, name: str, shape: tuple[int, int], shard_px: int) -> zarr.Array[Any]:
    # a small image gets a small shard, so that one is never mostly padding
    shards = tuple(min(shard_px, -(-max(size, 1) // _CHUNK_PX) * _CHUNK_PX) for size in shape)
    return group.create_array(
        name,
        shape=shape,
        dtype="uint32",
        chunks=(_CHUNK_PX, _CHUNK_PX),
        shards=shards,
        compressors=ZstdCodec(level=3),
        fill_value=0,
        dimension_names=("y", "x"),
    )


def label_attributes(n_levels: int, axes: str, grid: Grid, *, name: str) -> dict[str, Any]:
    """Return the "ome" attributes of a label pyramid; each level takes every second pixel of the one before.

    Args:
        n_levels: of the pyramid.
        axes: a letter each, in the order of the array; along t every level has all time points.
        grid: where the pixels of the first level lie along these axes.
        name: of the multiscale image.
    """
    # Pixel i of a level is pixel i * 2^level of level 0 itself, so no level is shifted against another.
    shift = [{"type": "translation", "translation": list(grid.origin)}] if any(grid.origin) else []
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [
                        step * (1.0 if axis == "t" else 2.0**level)
                        for axis, step in zip(axes, grid.steps, strict=True)
                    ],
                },
                *shift,
            ],
        }
        for level in range(n_levels)
    ]
    return {
        "version": _VERSION,
        "multiscales": [
            {
                "name": name,
                "type": "nearest",
                "axes": [
                    {
                        "name": axis,
                        "type": "time" if axis == "t" else "space",
                        **({} if unit is None else {"unit": unit}),
                    }
                    for axis, unit in zip(axes, grid.units, strict=True)
                ],
                "datasets": datasets,
            }
        ],
        "image-label": {"version": _VERSION},
    }


def _shards(array: zarr.Array[Any]) -> Iterator[Region]:
    height, width = array.shape
    rows, columns = array.shards or array.chunks
    for y in range(0, height, rows):
        for x in range(0, width, columns):
            yield Region(x, y, x + columns, y + rows).clip(width, height)


def _put(array: zarr.Array[Any], shard: Region, labels: NDArray[np.uint32]) -> None:
    if labels.any():  # empty shards need no file: 0 is the fill value
        array[shard.y0 : shard.y1, shard.x0 : shard.x1] = labels


@dataclass(frozen=True, slots=True)
class _Outlines:
    """The objects of one row of shards, in the order in which they are drawn."""

    ids: NDArray[np.int64]  # (N,)
    polygons: NDArray[np.object_]  # (N,)
    extents: NDArray[np.float64]  # (N, 4) x0 y0 x1 y1, level-0 px


def _draw(array: zarr.Array[Any], objects: Path) -> None:
    for (shard, _, _), labels in map_ahead(
        lambda one: _draw_shard(*one), _hit(array, objects), name="labels"
    ):
        _put(array, shard, labels)


def _hit(array: zarr.Array[Any], objects: Path) -> Iterator[tuple[Region, _Outlines, NDArray[np.int64]]]:
    """Yield the shards that hold any of the objects, with those near them and the rows of those in them."""
    outlines, loaded = None, -1
    for shard in _shards(array):
        if shard.y0 != loaded or outlines is None:  # the shards come row by row
            outlines, loaded = _load(objects, shard.y0, shard.y1), shard.y0
        x0, y0, x1, y1 = outlines.extents.T
        hits = np.flatnonzero((x0 < shard.x1) & (x1 > shard.x0) & (y0 < shard.y1) & (y1 > shard.y0))
        if hits.size:
            yield shard, outlines, hits


def _load(objects: Path, y0: int, y1: int) -> _Outlines:
    ids, scores, geometries = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [np.zeros(0, np.object_)]
    for part in read_objects(objects, _COLUMNS, rows_px0=(y0, y1)):
        near = (part["bbox_y0"].to_numpy() < y1) & (part["bbox_y1"].to_numpy() > y0)
        ids.append(part["id"].to_numpy()[near])
        scores.append(part["score"].to_numpy()[near])
        geometries.append(part["geometry"].to_numpy()[near])
    numbers, score = np.concatenate(ids), np.concatenate(scores)
    order = np.lexsort((-numbers, score))  # the best is drawn last, of equals the lowest id
    polygons = shapely.from_wkb(np.concatenate(geometries)[order])
    return _Outlines(numbers[order], polygons, shapely.bounds(polygons).reshape(-1, 4))


def _draw_shard(shard: Region, outlines: _Outlines, rows: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return the labels of a shard with the objects `rows` drawn on it, later ones on top."""
    labels = np.zeros((shard.height, shard.width), np.uint32)
    corners = np.array([shard.x0, shard.y0, shard.x1, shard.y1])
    low = np.maximum(np.floor(outlines.extents[rows, :2]).astype(np.int64), corners[:2])
    high = np.minimum(np.ceil(outlines.extents[rows, 2:]).astype(np.int64), corners[2:])
    regions = np.concatenate([low, high], axis=1)
    rings = shapely.get_exterior_ring(outlines.polygons[rows])
    points, owner = shapely.get_coordinates(rings, return_index=True)
    group = np.cumsum((high - low).prod(axis=1)) // _CELLS  # (N,) ascending
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    for first, last in pairwise([*firsts.tolist(), len(rows)]):
        begin, end = np.searchsorted(owner, [first, last])
        drawn, y, x = draw_polygons(points[begin:end], owner[begin:end] - first, regions[first:last])
        labels[y - shard.y0, x - shard.x0] = outlines.ids[rows[first:last][drawn]]
    return labels
