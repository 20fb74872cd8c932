"""LIF, the files of Leica's LAS: the images of an experiment, and the tiles of a scan that was not merged."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.microscope import MicroscopeReader, StoredImage, WholePlane
from darcnn.runtime.readers.protocol import Planes

__all__ = ["LifReader"]

_PLANE_AXES = {"Y", "X", "S"}  # liffile's letters; S is red, green and blue
_OUTER_AXES = {"T", "Z", "C", "M"}  # M is the tiles of a scan
_EXPORT = "export that image as OME-TIFF"
_UM_PER_M = 1e6
_DIGITS = 9


class LifReader(MicroscopeReader):
    """One plane of one image of a LIF file.

    What is no picture is not counted: lines over time, spectra, lifetimes, rotations.
    """

    format_name = "LIF"
    mpp_source = "LIF dimensions"

    @staticmethod
    def _open_file(path: Path) -> _LifFile:
        return _LifFile(path)


class _LifFile:
    def __init__(self, path: Path) -> None:
        import liffile

        self._path = path
        self._file = liffile.LifFile(path)
        self._kind = liffile.LifImage  # others are lifetimes

    @cached_property
    def images(self) -> tuple[StoredImage | InputError, ...]:
        pictures = (stored for stored in self._file.images if isinstance(stored, self._kind))
        return tuple(image for stored in pictures for image in _describe(stored, self._path))

    def close(self) -> None:
        self._file.close()


def _describe(image: Any, path: Path) -> Iterator[StoredImage | InputError]:
    """Yield the image, or each of its tiles, or why it is not read; nothing where it is no picture."""
    axes = {str(axis) for axis in image.dims}
    if not {"Y", "X"} <= axes <= _PLANE_AXES | _OUTER_AXES:
        return
    try:
        in_frame = set(image.frames.frame_sizes)
    except ValueError:  # in several lines
        yield InputError(f"has channels of several types in {image.path}", where=path, fix=_EXPORT)
        return
    if not {"Y", "X"} <= in_frame <= _PLANE_AXES:
        yield InputError(f"was scanned across y in {image.path}", where=path, fix=_EXPORT)
        return
    sizes: dict[str, int] = dict(image.sizes)
    n_samples = sizes.get("S", 1)
    n_channels = sizes.get("C", 1) * n_samples
    is_rgb = n_samples == 3 and n_channels == 3
    tints = _tints(image)
    x_um, y_um, z_um = (_step(image, axis, _UM_PER_M) for axis in "XYZ")
    planes = Planes(
        sizes.get("Z", 1), sizes.get("T", 1), section_um=z_um, frame_interval_s=_step(image, "T", 1.0)
    )
    n_tiles = sizes.get("M", 1)
    for tile in range(n_tiles):
        yield StoredImage(
            width_px=sizes["X"],
            height_px=sizes["Y"],
            planes=planes,
            dtype=np.dtype(image.dtype),
            channel_names=tuple(tints) if len(tints) == n_channels else (None,) * n_channels,
            is_rgb=is_rgb,
            step_um=(x_um, y_um),
            open_plane=partial(_open_plane, image, tile),
            name=image.path if n_tiles == 1 else f"{image.path}, tile {tile}",
        )


def _tints(image: Any) -> list[str | None]:
    """Return the names of the channels' colours, in the order of their values."""
    channels = image.xml_element.findall("./Data/Image/ImageDescription/Channels/ChannelDescription")
    return [one.get("LUTName") for one in sorted(channels, key=lambda one: int(one.get("BytesInc", "0")))]


def _open_plane(image: Any, tile: int, z: int, t: int) -> WholePlane:
    chosen = {axis: at for axis, at in (("Z", z), ("T", t), ("M", tile)) if axis in image.sizes}
    channels = range(image.sizes["C"]) if "C" in image.sizes else (None,)

    def load() -> NDArray[Any]:
        frames = [
            image.frame(**chosen) if channel is None else image.frame(**chosen, C=channel)
            for channel in channels
        ]
        return np.concatenate([np.atleast_3d(frame) for frame in frames], axis=2)  # (H, W, C)

    return WholePlane(load)


def _step(image: Any, axis: str, unit: float) -> float | None:
    """Return the distance of two neighbours along an axis, None where the file does not say.

    The length of an axis in LIF is that from the middle of the first to the middle of the last.
    """
    at = image.coords.get(axis)
    if at is None or len(at) < 2:
        return None
    step = abs(float(at[-1] - at[0])) / (len(at) - 1) * unit
    return round(step, _DIGITS) or None
