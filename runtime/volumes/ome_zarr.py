"""Volumes in OME-Zarr (0.4 and 0.5): level 0 is unpacked once, one row of chunks after another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import choose_plane, make_slide_name, pixel_type
from darcnn.runtime.volumes.volume import Stored, Volume, VolumeInfo

__all__ = ["is_zarr_volume", "unpack_zarr"]

_NM = {"nanometer": 1.0, "angstrom": 0.1, "micrometer": 1000.0, "picometer": 1e-3, "millimeter": 1e6}
_KNOWN = ("t", "c", "z", "y", "x")
_BYTES = 64 << 20  # unpacked at once, about


@dataclass(frozen=True, slots=True)
class _Image:
    """The first level of an OME-Zarr image."""

    array: Any
    axes: tuple[str, ...]
    scale_nm: tuple[float | None, ...]  # by axis; None where the unit is no length

    def size(self, axis: str) -> int:
        """Return the length along `axis`, 1 where there is none."""
        return int(self.array.shape[self.axes.index(axis)]) if axis in self.axes else 1


def is_zarr_volume(path: Path) -> bool:
    """Tell whether the OME-Zarr image in the folder `path` has several planes along z.

    Raises:
        InputError: it is no OME-Zarr image.
    """
    return _open(path).size("z") > 1


def unpack_zarr(path: Path, scratch: Path, *, t: int | None, channel: int | str | None) -> Volume:
    """Return the volume in the folder `path`, unpacked into `scratch`.

    Raises:
        InputError: no OME-Zarr image, damaged, or a choice of `t` or `channel` is needed.
        OSError: there is no room to unpack it.
    """
    image = _open(path)
    dtype = pixel_type(image.array.dtype)
    if dtype is None:
        raise InputError(f"has pixels of type {image.array.dtype}", where=path, fix="export real numbers")
    place: dict[str, int] = {"t": choose_plane("t", t, image.size("t"), where=path)}
    place["c"] = _channel(image, channel, path)
    z, y, x = (image.size(axis) for axis in "zyx")
    chunk = image.array.chunks[image.axes.index("z")] if "z" in image.axes else 1
    step = max(1, _BYTES // max(1, y * x * dtype.itemsize) // chunk) * chunk
    target = scratch / f".{make_slide_name(path)}.unpacked"
    try:
        with target.open("wb") as file:
            for start in range(0, z, step):
                file.write(_read(image, place, start, min(z, start + step), path).astype(dtype).tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    sizes = [image.scale_nm[image.axes.index(axis)] if axis in image.axes else None for axis in "zyx"]
    voxel = None
    if sizes[1] is not None and sizes[2] is not None:
        voxel = (sizes[0] or sizes[2], sizes[1], sizes[2])
    source = None if voxel is None else "OME-Zarr scale"
    return Volume(
        VolumeInfo(path, make_slide_name(path), (z, y, x), dtype, voxel, source),
        Stored(target, dtype),
        scratch=target,
    )


def _open(path: Path) -> _Image:
    try:
        group = zarr.open_group(path, mode="r")
        attributes: dict[str, Any] = dict(group.attrs)
        content = attributes.get("ome", attributes)["multiscales"][0]
        axes = tuple(str(axis["name"]).lower() for axis in content["axes"])
        dataset = content["datasets"][0]
        array = group[dataset["path"]]
        scales = [one["scale"] for one in dataset["coordinateTransformations"] if one["type"] == "scale"]
        units = [_NM.get(str(axis.get("unit", ""))) for axis in content["axes"]]
        scale = scales[0] if scales else [None] * len(axes)
        found = tuple(
            None if unit is None or one is None else float(one) * unit
            for unit, one in zip(units, scale, strict=True)
        )
    except (OSError, LookupError, TypeError, ValueError) as err:
        raise InputError(
            f"is no OME-Zarr image ({err})", where=path, fix="export it as OME-Zarr 0.4 or 0.5"
        ) from err
    if not isinstance(array, zarr.Array) or array.ndim != len(axes) or set(axes) - set(_KNOWN):
        raise InputError(
            f"has the axes {' '.join(axes)}", where=path, fix="export it with t, c, z, y, x or fewer"
        )
    return _Image(array, axes, found)


def _channel(image: _Image, channel: int | str | None, path: Path) -> int:
    n = image.size("c")
    if channel is None and n > 1:
        raise InputError(f"holds {n} channels", where=path, fix=f"choose one with --channel 0 to {n - 1}")
    if isinstance(channel, str) or not 0 <= (channel or 0) < n:
        raise InputError(f"has no channel {channel}", where=path, fix=f"give a number from 0 to {n - 1}")
    return channel or 0


def _read(image: _Image, place: dict[str, int], start: int, stop: int, path: Path) -> NDArray[Any]:
    """Return planes (n, H, W) in the order z y x, whatever the order in the file."""
    which: list[Any] = []
    for axis in image.axes:
        which.append(place[axis] if axis in place else slice(start, stop) if axis == "z" else slice(None))
    try:
        values = np.asarray(image.array[tuple(which)])
    except (OSError, ValueError, RuntimeError) as err:
        raise InputError(f"cannot be read ({err})", where=path, fix="copy it again") from err
    left = [axis for axis in image.axes if axis not in place]
    values = np.moveaxis(values, [left.index(axis) for axis in "zyx" if axis in left], range(len(left)))
    return values if values.ndim == 3 else values[None]
