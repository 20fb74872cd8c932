"""IMS, the files of Imaris: HDF5 with a pyramid, of stacks and series from light sheets and confocals."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.microscope import MicroscopeReader, StoredImage
from darcnn.runtime.readers.protocol import Planes

__all__ = ["ImsReader"]

_UM = {"m": 1e6, "mm": 1e3, "um": 1.0, "µm": 1.0, "nm": 1e-3}
_MOST_CACHED = 1 << 30  # bytes of unpacked chunks, of all channels
_DIGITS = 9


class ImsReader(MicroscopeReader):
    """One plane of an IMS file (Imaris 5.5 and later), with the levels of its pyramid that keep all planes.

    Layout: https://imaris.oxinst.com/support/imaris-file-format.
    """

    format_name = "IMS"
    mpp_source = "IMS extent"

    @staticmethod
    def _open_file(path: Path) -> _ImsFile:
        return _ImsFile(path)


class _ImsFile:
    def __init__(self, path: Path) -> None:
        import h5py
        import hdf5plugin  # noqa: F401  # unpacks LZ4, which microscopes write

        with h5py.File(path, "r") as file:
            cache = _cache_of(file)
        self._file = h5py.File(path, "r", **cache)
        self._last: tuple[tuple[int, int], list[Any]] | None = None

    def close(self) -> None:
        self._file.close()

    @cached_property
    def images(self) -> tuple[StoredImage, ...]:
        return (self._describe(),)

    def _describe(self) -> StoredImage:
        facts = self._file["DataSetInfo/Image"].attrs
        times = self._file["DataSetInfo/TimeInfo"].attrs
        channels = self.channels(0, 0)
        size = _size_of(channels[0])
        x_um, y_um, z_um = _steps_um(facts, size)
        names = (self._file[f"DataSetInfo/Channel {number}"].attrs for number in range(len(channels)))
        return StoredImage(
            width_px=size["x"],
            height_px=size["y"],
            planes=Planes(
                size["z"],
                len(self._file["DataSet/ResolutionLevel 0"]),
                section_um=z_um,
                frame_interval_s=_interval_s(times),
            ),
            dtype=channels[0]["Data"].dtype,
            channel_names=tuple(_name_of(one) for one in names),
            is_rgb=False,  # its channels may be those of a colour picture, but the file does not say so
            step_um=(x_um, y_um),
            open_plane=partial(_Plane, self),
            downsamples=self._downsamples(size),
        )

    def channels(self, level: int, t: int) -> list[Any]:
        """Return the HDF5 groups of the channels of a time point."""
        point = self._file[f"DataSet/ResolutionLevel {level}/TimePoint {t}"]
        return [point[f"Channel {number}"] for number in range(len(point))]

    def datasets(self, level: int, t: int) -> list[Any]:
        """Return the values of the channels; the last ones stay open, since HDF5's cache goes with them."""
        last = self._last
        if last is None or last[0] != (level, t):
            last = self._last = (level, t), [group["Data"] for group in self.channels(level, t)]
        return last[1]

    def _downsamples(self, size: dict[str, int]) -> tuple[int, ...]:
        """Return by how much levels are reduced, up to the first that thins out z or is of another size."""
        found = [1]
        for level in range(1, len(self._file["DataSet"])):
            reduced, by = _size_of(self.channels(level, 0)[0]), 2 * found[-1]
            if reduced != {"x": size["x"] // by, "y": size["y"] // by, "z": size["z"]}:
                break
            found.append(by)
        return tuple(found)


@dataclass(frozen=True, slots=True)
class _Plane:
    """Reads regions of all channels of a plane: a `RegionSource`."""

    file: _ImsFile
    z: int
    t: int

    def __call__(self, region: Region, level: Level) -> NDArray[Any]:
        place = (self.z, slice(region.y0, region.y1), slice(region.x0, region.x1))
        try:
            return np.stack([data[place] for data in self.file.datasets(level.index, self.t)], axis=2)
        except OSError as err:
            if err.errno is not None:  # of the system
                raise
            raise ValueError(str(err)) from err  # HDF5 says so of a damaged chunk


def _cache_of(file: Any) -> dict[str, Any]:
    """Return how HDF5 is to keep unpacked chunks: planes share them, and each would unpack them anew."""
    channels = file["DataSet/ResolutionLevel 0/TimePoint 0"]
    data = channels["Channel 0/Data"]
    layer = data.chunks[0] * data.shape[1] * data.shape[2] * data.dtype.itemsize if data.chunks else 0
    return {
        "rdcc_nbytes": max(1 << 20, min(2 * layer, _MOST_CACHED // len(channels))),
        "rdcc_nslots": 100_003,
        "rdcc_w0": 1.0,
    }


def _text(value: Any) -> str:
    """Return an attribute: Imaris writes text as an array of single characters."""
    if isinstance(value, str):
        return value.strip("\0 ")
    return bytes(np.asarray(value).tobytes()).decode("utf-8", "replace").strip("\0 ")


def _size_of(group: Any) -> dict[str, int]:
    """Return the size of a channel; its dataset is padded to whole chunks."""
    return {axis: int(_text(group.attrs[f"ImageSize{axis.upper()}"])) for axis in "xyz"}


def _steps_um(facts: Any, size: dict[str, int]) -> tuple[float | None, float | None, float | None]:
    """Return micrometres from pixel to pixel along x, y, z, None where the file does not say.

    The extent reaches from the outer side of the first to that of the last. One of a pixel each, from 0 on,
    is what is written where nobody told the size.
    """
    try:
        unit = _UM[_text(facts["Unit"])]
        low, high = ([float(_text(facts[f"Ext{end}{axis}"])) for axis in range(3)] for end in ("Min", "Max"))
    except (KeyError, ValueError):
        return None, None, None
    steps = [abs(b - a) / size[kind] for a, b, kind in zip(low, high, "xyz", strict=True)]
    if steps == [1.0, 1.0, 1.0] and low == [0.0, 0.0, 0.0]:
        return None, None, None
    x, y, z = (round(step * unit, _DIGITS) or None for step in steps)
    return x, y, z


def _interval_s(times: Any) -> float | None:
    """Return the mean of the seconds from time point to time point, None where the file does not say."""
    try:
        moments = [
            datetime.fromisoformat(_text(times[f"TimePoint{number}"]))
            for number in range(1, int(_text(times["DatasetTimePoints"])) + 1)
        ]
    except (KeyError, ValueError):
        return None
    if len(moments) < 2:
        return None
    seconds = (moments[-1] - moments[0]).total_seconds() / (len(moments) - 1)
    return seconds if seconds > 0 else None


def _name_of(facts: Any) -> str | None:
    """Return the name of a channel, None where nobody gave it one."""
    name = _text(facts["Name"]) if "Name" in facts else ""
    return None if name.startswith("(") else name or None
