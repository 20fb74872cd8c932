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
from darcnn.runtime.readers.base import make_slide_name, plausible_um, to_pixels
from darcnn.runtime.readers.ome_zarr import Multiscale, OmeZarrReader, open_multiscale, unreadable_zarr
from darcnn.runtime.readers.protocol import Location, SlideInfo
from darcnn.runtime.volumes.layout import Layout
from darcnn.runtime.volumes.volume import Stored, Volume, VolumeInfo, check_room

__all__ = ["read_zarr_channels", "unpack_zarr"]

_BYTES = 64 << 20  # unpacked at once, about
_MOST_MISSING = 100  # chunks by files that are there: empty chunks are left out, but hardly all of them


def unpack_zarr(
    path: Location, scratch: Path, *, t: int | None, channel: int | str | None, projects: bool = False
) -> Volume:
    """Return the volume of an OME-Zarr image, unpacked into `scratch`.

    Raises:
        UsageError: there are no stacks to project.
        InputError: no OME-Zarr image, damaged, not to be reached, or a choice of `t` or `channel` is needed.
        OutputError, OSError: there is no room to unpack it.
    """
    image = open_multiscale(path)
    layout = Layout.of(image.planes(), path, t=t, projects=projects)
    with OmeZarrReader(path, z=0, t=layout.t or 0) as reader:
        info = reader.info
    number = _choose_channel(info, channel)
    facts = VolumeInfo.of_planes(
        info,
        path=path,
        layout=layout,
        section_um=plausible_um(image.steps_um().get("z")),
        frame_interval_s=image.frame_interval_s() if image.planes().n_t > 1 else None,  # one has none
        is_rgb=False,  # one of its channels is read, also of colours
        grid=image.grid((layout.along, "y", "x")),
    )
    check_room(path, scratch, facts.shape, facts.dtype)
    _check_chunks(image.arrays[0], path)
    target = scratch / f".{make_slide_name(path)}.unpacked"
    try:
        with target.open("wb") as file:
            plane_bytes = math.prod(facts.shape[1:]) * facts.dtype.itemsize
            for span in _spans(image, layout, plane_bytes=plane_bytes):
                for plane in _read(image, layout, span, number, path):
                    file.write(to_pixels(plane).tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return Volume(facts, Stored(target, facts.dtype), scratch=target)


def read_zarr_channels(path: Location, layout: Layout) -> Iterator[NDArray[Any]]:
    """Yield all channels of each plane of a volume in OME-Zarr, (H, W, C).

    Raises:
        InputError: it cannot be read any more.
    """
    image = open_multiscale(path)
    sizes = dict(zip(image.axes, image.arrays[0].shape, strict=True))
    plane_bytes = sizes["y"] * sizes["x"] * sizes.get("c", 1) * image.arrays[0].dtype.itemsize
    for span in _spans(image, layout, plane_bytes=plane_bytes):
        channels = [_read(image, layout, span, c, path) for c in range(sizes.get("c", 1))]
        yield from np.stack(channels, axis=-1)


def _spans(image: Multiscale, layout: Layout, *, plane_bytes: int) -> Iterator[slice]:
    """Yield which planes to read at once: whole chunks, of bounded size where these allow it."""
    is_axis = layout.along in image.axes
    chunk = image.arrays[0].chunks[image.axes.index(layout.along)] if is_axis else 1
    deep = image.arrays[0].chunks[image.axes.index("z")] if layout.n_projected > 1 else 1  # at once
    step = max(1, _BYTES // (plane_bytes * deep) // chunk) * chunk
    for start in range(0, layout.n_planes, step):
        yield slice(start, min(layout.n_planes, start + step))


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


def _read(image: Multiscale, layout: Layout, span: slice, channel: int, path: Location) -> NDArray[Any]:
    """Return planes `span` of one channel, (n, H, W), whatever the order of the axes in the file."""
    where: dict[str, Any] = {"z": 0, "t": layout.t or 0, "c": channel, layout.along: span}
    if layout.n_projected == 1:
        return _read_at(image, where, path)
    depth = image.arrays[0].chunks[image.axes.index("z")]
    brightest: NDArray[Any] | None = None
    for start in range(0, layout.n_projected, depth):  # a chunk of planes is in memory
        values = _read_at(image, where | {"z": slice(start, start + depth)}, path)
        values = np.fmax.reduce(values, axis=0)
        brightest = values if brightest is None else np.fmax(brightest, values)
    assert brightest is not None
    return brightest


def _read_at(image: Multiscale, where: dict[str, Any], path: Location) -> NDArray[Any]:
    """Return the values of level 0 at these places of some axes, in the order z t y x of what is left."""
    try:
        values = np.asarray(image.arrays[0][tuple(where.get(axis, slice(None)) for axis in image.axes)])
    except unreadable_zarr(path) as err:
        raise InputError(f"cannot be read ({err})", where=path, fix="copy it again") from err
    left = [axis for axis in image.axes if isinstance(where.get(axis, slice(None)), slice)]
    values = values.transpose([left.index(axis) for axis in "ztyx" if axis in left])
    return values if values.ndim > 2 else values[None]
