"""ND2, the files of Nikon's NIS-Elements: positions of a stage are the images of a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import needs_package
from darcnn.runtime.readers.microscope import EXTRA, MicroscopeReader, StoredImage, WholePlane
from darcnn.runtime.readers.protocol import Planes

__all__ = ["Nd2Reader"]

_AXES = {"T", "P", "Z", "C", "S", "Y", "X"}  # nd2's letters; P is positions, S red, green and blue
_S_PER_MS = 1e-3


class Nd2Reader(MicroscopeReader):
    """One plane of one position of an ND2 file; frames without compression stay on the disk until read.

    A file that stopped before its end holds the whole time points (or planes of a stack) that were written.
    """

    format_name = "ND2"
    mpp_source = "ND2 voxel size"

    @staticmethod
    def _open_file(path: Path) -> _Nd2File:
        return _Nd2File(path)


class _Nd2File:
    def __init__(self, path: Path) -> None:
        try:
            import nd2
        except ModuleNotFoundError as err:
            raise needs_package("nd2", path, extra=EXTRA) from err
        self._file = nd2.ND2File(path)
        try:
            self.images = self._describe(path)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _describe(self, path: Path) -> tuple[StoredImage, ...]:
        file = self._file
        sizes: Mapping[str, int] = file.sizes
        foreign = {axis: n for axis, n in sizes.items() if axis not in _AXES and n > 1}
        if foreign:
            listed = ", ".join(f"{axis} of {n}" for axis, n in foreign.items())
            raise InputError(f"has axes of unknown kind ({listed})", where=path, fix="export it as OME-TIFF")
        n_z, n_t = (sizes.get(axis, 1) for axis in "ZT")
        is_rgb = sizes.get("S", 1) == 3 and sizes.get("C", 1) == 1
        names = tuple(channel.channel.name for channel in file.metadata.channels or ())
        n_channels = sizes.get("C", 1) * sizes.get("S", 1)
        voxel = file.voxel_size()
        z_um = float(voxel.z) if n_z > 1 and voxel.z > 0 else None
        planes = Planes(n_z, n_t, section_um=z_um, frame_interval_s=self._interval_s())
        frames = self._frames()
        positions = self._position_names(sizes.get("P", 1))
        return tuple(
            StoredImage(
                width_px=sizes["X"],
                height_px=sizes["Y"],
                planes=planes,
                dtype=file.dtype,
                channel_names=names if len(names) == n_channels else (None,) * n_channels,
                is_rgb=is_rgb,
                step_um=(float(voxel.x), float(voxel.y)),
                open_plane=partial(self._open_plane, frames, position),
                name=name,
            )
            for position, name in enumerate(positions)
        )

    def _frames(self) -> dict[tuple[int, int, int], int]:
        """Return the number of the frame of each position, z and t."""
        places = self._file.loop_indices or ({},)
        return {
            (place.get("P", 0), place.get("Z", 0), place.get("T", 0)): number
            for number, place in enumerate(places)
        }

    def _open_plane(
        self, frames: Mapping[tuple[int, int, int], int], position: int, z: int, t: int
    ) -> WholePlane:
        return WholePlane(partial(self._load, frames[position, z, t]))

    def _load(self, frame: int) -> NDArray[Any]:
        """Return the (H, W, C) values of a frame: a view into the file where it is not compressed."""
        sizes = self._file.sizes
        n_channels, n_samples = sizes.get("C", 1), sizes.get("S", 1)
        values = np.asarray(self._file.read_frame(frame))
        values = values.reshape(n_channels, sizes["Y"], sizes["X"], n_samples)
        height, width = sizes["Y"], sizes["X"]
        return values.transpose(1, 2, 0, 3).reshape(height, width, n_channels * n_samples)

    def _interval_s(self) -> float | None:
        """Return the seconds from one time point to the next, as measured, else as planned."""
        for loop in self._file.experiment:
            if loop.type == "TimeLoop":
                measured = loop.parameters.periodDiff.avg if loop.parameters.periodDiff else 0.0
                milliseconds = measured or loop.parameters.periodMs
                return float(milliseconds) * _S_PER_MS if milliseconds else None
        return None

    def _position_names(self, count: int) -> list[str | None]:
        for loop in self._file.experiment:
            if loop.type == "XYPosLoop" and len(loop.parameters.points) == count:
                return [point.name or None for point in loop.parameters.points]
        return [None] * count
