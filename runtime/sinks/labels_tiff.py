"""The label pyramid as OME-TIFF, for programs that do not read OME-Zarr."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray

from darcnn.runtime.sinks.atomic import atomic_file

__all__ = ["label_planes", "write_label_stack", "write_labels_tiff"]

_TILE_PX = 512
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "darcnn:labels")


def write_labels_tiff(path: Path, labels: Path, *, mpp: tuple[float, float] | None, name: str) -> None:
    """Write the label pyramid `labels` (labels.ome.zarr) as a tiled pyramidal OME-TIFF (BigTIFF), uint32.

    Memory does not grow with the slide. Equal labels give equal bytes.

    Args:
        path: file to write.
        labels: from `darcnn.runtime.sinks.ome_zarr`.
        mpp: micrometres per level-0 pixel (x, y), or None.
        name: of the image.
    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    group = zarr.open_group(labels, mode="r")
    levels: list[Any] = [group[key] for key in sorted(group.array_keys(), key=int)]
    metadata = _ome("YX", name, {} if mpp is None else dict(zip("XY", mpp, strict=True)))
    with (
        atomic_file(path) as file,
        tifffile.TiffWriter(file, bigtiff=True, ome=True) as writer,
    ):
        for number, level in enumerate(levels):
            writer.write(
                _tiles(level),
                shape=level.shape,
                dtype=np.uint32,
                tile=(_TILE_PX, _TILE_PX),
                compression="zlib",
                photometric="minisblack",
                subifds=len(levels) - 1 if number == 0 else None,
                subfiletype=0 if number == 0 else 1,  # 1: a reduced image
                metadata=metadata if number == 0 else None,
            )


def write_label_stack(
    path: Path, labels: Path, *, axes: str, step_um: Mapping[str, float], name: str
) -> None:
    """Write the labels of a volume or series as an OME-TIFF (BigTIFF) of one page a plane, uint32.

    One slab of planes is in memory at once. Equal labels give equal bytes.

    Args:
        path: file to write.
        labels: from `darcnn.runtime.volumes.labels`.
        axes: "ZYX", or "TYX" of a series.
        step_um: micrometres from label to label along these axes, as far as they are known.
        name: of the volume.
    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    array = zarr.open_array(labels / "0", mode="r")
    with (
        atomic_file(path) as file,
        tifffile.TiffWriter(file, bigtiff=True, ome=True) as writer,
    ):
        writer.write(
            label_planes(array),
            shape=array.shape,
            dtype=np.uint32,
            compression="zlib",
            photometric="minisblack",
            metadata=_ome(axes, name, step_um),
        )


def _ome(axes: str, name: str, step_um: Mapping[str, float]) -> dict[str, Any]:
    """Return what OME-XML says of the labels; the same name gives the same UUID."""
    metadata: dict[str, Any] = {"axes": axes, "Name": name, "UUID": uuid.uuid5(_NAMESPACE, name).urn}
    for axis, step in step_um.items():
        metadata |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": "\u00b5m"}
    return metadata


def label_planes(array: Any) -> Iterator[NDArray[np.uint32]]:
    """Yield the planes of a label array along its first axis; one slab of them is in memory at once."""
    depth = array.chunks[0]
    for start in range(0, array.shape[0], depth):
        yield from np.asarray(array[start : start + depth])


def _tiles(level: Any) -> Iterator[NDArray[np.uint32]]:
    """Yield the tiles of a level row by row, those at its edges filled up with 0."""
    height, width = level.shape
    for y in range(0, height, _TILE_PX):
        for x in range(0, width, _TILE_PX):
            tile = np.zeros((_TILE_PX, _TILE_PX), np.uint32)
            part = np.asarray(level[y : y + _TILE_PX, x : x + _TILE_PX])
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile
