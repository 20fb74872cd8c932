"""Volumes in OME-Zarr, folders and URLs: level 0 is unpacked once, a row of chunks at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.planning import find_channel
from darcnn.runtime.readers.base import choose_plane, make_slide_name, plausible_mpp, to_pixels
from darcnn.runtime.readers.ome_zarr import Multiscale, OmeZarrReader, open_multiscale, unreadable_zarr
from darcnn.runtime.readers.protocol import Location, SlideInfo
from darcnn.runtime.volumes.volume import Stored, Volume, VolumeInfo, check_room

__all__ = ["read_zarr_channels", "unpack_zarr"]

_BYTES = 64 << 20  # unpacked at once, about
_MOST_MISSING = 100  # chunks by files that are there: empty chunks are left out, but hardly all of them


def unpack_zarr(path: Location, scratch: Path, *, t: int | None, channel: int | str | None) -> Volume:
    """Return the volume of an OME-Zarr image, unpacked into `scratch`.

    Raises:
        InputError: no OME-Zarr image, damaged, not to be reached, or a choice of `t` or `channel` is needed.
        OutputError, OSError: there is no room to unpack it.
    """
    image = open_multiscale(path)
    planes = image.planes()
    is_series = planes.is_series(t)
    moment = 0 if is_series else choose_plane("t", t, planes.n_t, where=path)
    with OmeZarrReader(path, z=0, t=moment) as reader:
        info = reader.info
    along, n_planes = ("t", planes.n_t) if is_series else ("z", planes.n_z)
    place = {"z": 0, "t": moment, "c": _choose_channel(info, channel)}
    del place[along]
    z = image.steps_um().get("z")
    section = plausible_mpp(z, z)
    facts = VolumeInfo.of_planes(
        info,
        path=path,
        n_planes=n_planes,
        is_series=is_series,
        section_um=None if section is None else section[0],
        frame_interval_s=image.frame_interval_s() if is_series else None,
        is_rgb=False,  # one of its channels is read, also of colours
    )
    check_room(path, scratch, facts.shape, facts.dtype)
    _check_chunks(image.arrays[0], path)
    target = scratch / f".{make_slide_name(path)}.unpacked"
    try:
        with target.open("wb") as file:
            for span in _spans(image, along, plane_bytes=math.prod(facts.shape[1:]) * facts.dtype.itemsize):
                values = _read(image, place, span, path)
                file.write(to_pixels(values).tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return Volume(facts, Stored(target, facts.dtype), scratch=target)


def read_zarr_channels(path: Location, *, t: int | None, is_series: bool) -> Iterator[NDArray[Any]]:
    """Yield all channels of each plane of an OME-Zarr image, (H, W, C); of a series of each time point.

    Raises:
        InputError: it cannot be read any more.
    """
    image = open_multiscale(path)
    sizes = dict(zip(image.axes, image.arrays[0].shape, strict=True))
    along, fixed = ("t", {"z": 0}) if is_series else ("z", {"t": t or 0})
    plane_bytes = sizes["y"] * sizes["x"] * sizes.get("c", 1) * image.arrays[0].dtype.itemsize
    for planes in _spans(image, along, plane_bytes=plane_bytes):
        channels = [_read(image, {**fixed, "c": c}, planes, path) for c in range(sizes.get("c", 1))]
        yield from np.stack(channels, axis=-1)


def _spans(image: Multiscale, along: str, *, plane_bytes: int) -> Iterator[slice]:
    """Yield which planes to read at once: whole chunks, of bounded size where these allow it."""
    n_planes, chunk = 1, 1
    if along in image.axes:
        axis = image.axes.index(along)
        n_planes, chunk = image.arrays[0].shape[axis], image.arrays[0].chunks[axis]
    step = max(1, _BYTES // plane_bytes // chunk) * chunk
    for start in range(0, n_planes, step):
        yield slice(start, min(n_planes, start + step))


def _check_chunks(array: zarr.Array[Any], path: Location) -> None:
    """Refuse a folder that holds next to nothing of what its metadata say: reading it would not end."""
    if not isinstance(array.store, zarr.storage.LocalStore):
        return
    n_chunks = math.prod(
        -(-size // step) for size, step in zip(array.shape, array.shards or array.chunks, strict=True)
    )
    n_files = sum(1 for entry in (array.store.root / array.path).rglob("*") if entry.is_file())
    if n_chunks > _MOST_MISSING * n_files:
        raise InputError(
            f"has {n_files} files for {n_chunks} chunks", where=path, fix="copy the whole folder again"
        )


def _choose_channel(info: SlideInfo, channel: int | str | None) -> int:
    number, n = find_channel(info, channel), len(info.channel_names)
    if number is None and n > 1:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(info.channel_names))
        raise InputError(
            f"holds {n} channels", where=info.path or info.name, fix=f"choose one with --channel: {names}"
        )
    if not 0 <= (number or 0) < n:
        raise InputError(
            f"has no channel {number}", where=info.path or info.name, fix=f"give a number from 0 to {n - 1}"
        )
    return number or 0


def _read(image: Multiscale, place: dict[str, int], planes: slice, path: Location) -> NDArray[Any]:
    """Return planes (n, H, W) in the order z y x, whatever the order in the file."""
    which: list[Any] = [
        place[axis] if axis in place else planes if axis in "zt" else slice(None) for axis in image.axes
    ]
    try:
        values = np.asarray(image.arrays[0][tuple(which)])
    except unreadable_zarr() as err:
        raise InputError(f"cannot be read ({err})", where=path, fix="copy it again") from err
    left = [axis for axis in image.axes if axis not in place]
    values = values.transpose([left.index(axis) for axis in "ztyx" if axis in left])
    return values if values.ndim == 3 else values[None]
