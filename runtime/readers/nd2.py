"""ND2, the files of Nikon's NIS-Elements: positions of a stage are the images of a file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.microscope import MicroscopeReader, StoredImage, WholePlane
from darcnn.runtime.readers.protocol import Planes

__all__ = ["Nd2Reader"]

_AXES = {"T", "P", "Z", "C", "S", "Y", "X"}  # nd2's letters; P is positions, S the samples of a colour
_COLOURS = (3, 4)  # samples of a colour picture; the fourth is alpha
_S_PER_MS = 1e-3
_Frames = Mapping[tuple[int, int, int], int]  # position, z, t: number of the frame


class Nd2Reader(MicroscopeReader):
    """One plane of one position of an ND2 file; frames without compression stay on the disk until read.

    Of an acquisition that was stopped, time points count that are whole, or planes of a single stack.
    """

    format_name = "ND2"
    mpp_source = "ND2 voxel size"

    @staticmethod
    def _open_file(path: Path) -> _Nd2File:
        return _Nd2File(path)


class _Nd2File:
    def __init__(self, path: Path) -> None:
        import nd2

        self._path = path
        self._file = nd2.ND2File(path)

    def close(self) -> None:
        self._file.close()

    @cached_property
    def images(self) -> tuple[StoredImage, ...]:
        file, path = self._file, self._path
        sizes: Mapping[str, int] = file.sizes
        foreign = {axis: n for axis, n in sizes.items() if axis not in _AXES and n > 1}
        if foreign:
            listed = ", ".join(f"{axis} of {n}" for axis, n in foreign.items())
            raise InputError(f"has axes of unknown kind ({listed})", where=path, fix="export it as OME-TIFF")
        is_rgb = (file.attributes.channelCount or 1) == 1 and file.components_per_channel in _COLOURS
        n_channels = 3 if is_rgb else file.attributes.componentCount
        names = tuple(channel.channel.name for channel in file.metadata.channels or ())
        x_um, y_um, z_um = self._voxel_um()
        frames = self._frames()
        return tuple(
            StoredImage(
                width_px=sizes["X"],
                height_px=sizes["Y"],
                planes=self._recorded(frames, position, z_um),
                dtype=file.dtype,
                channel_names=names if len(names) == n_channels else (None,) * n_channels,
                is_rgb=is_rgb,
                step_um=(x_um, y_um),
                open_plane=partial(self._open_plane, frames, position),
                name=name,
            )
            for position, name in enumerate(self._position_names(sizes.get("P", 1)))
        )

    def _frames(self) -> _Frames:
        """Return the number of each frame that was written."""
        places = self._file.loop_indices or ({},)
        n_written = self._file.attributes.sequenceCount
        if n_written is not None and n_written > len(places):
            raise InputError(
                f"holds {n_written} frames, of which its loops explain {len(places)}",
                where=self._path,
                fix="export it as OME-TIFF",
            )
        return {
            (place.get("P", 0), place.get("Z", 0), place.get("T", 0)): number
            for number, place in enumerate(places[:n_written])
        }

    def _recorded(self, frames: _Frames, position: int, z_um: float | None) -> Planes:
        """Return the planes of a position: whole time points, or of a single stack those that are there."""
        n_z, n_t = (self._file.sizes.get(axis, 1) for axis in "ZT")
        steps = [[(position, z, t) for z in range(n_z)] for t in range(n_t)]
        if n_t == 1:
            steps = [[(position, z, 0)] for z in range(n_z)]
        n_whole = sum(1 for _ in takewhile(lambda step: all(one in frames for one in step), steps))
        n_whole = n_whole or len(steps)  # nothing is whole: reading says what lacks
        kept = (n_whole, 1) if n_t == 1 else (n_z, n_whole)
        return Planes(*kept, len(steps) - n_whole, section_um=z_um, frame_interval_s=self._interval_s())

    def _open_plane(self, frames: _Frames, position: int, z: int, t: int) -> WholePlane:
        frame = frames.get((position, z, t))
        if frame is None:
            raise InputError(
                f"lacks plane {z} at time point {t}: it was never written",
                where=self._path,
                fix="choose another",
            )
        return WholePlane(partial(self._load, frame))

    def _load(self, frame: int) -> NDArray[Any]:
        """Return the (H, W, C) values of a frame: a view into the file where it is not compressed.

        Colours lie in the file with blue first (as Bio-Formats found, its pull request 4321).
        """
        facts, n_samples = self._file.attributes, self._file.components_per_channel
        n_channels = facts.channelCount or 1
        height, width = self._file.sizes["Y"], self._file.sizes["X"]
        values = np.asarray(self._file.read_frame(frame)).reshape(n_channels, height, width, n_samples)
        if n_channels == 1 and n_samples in _COLOURS:
            return values[0, :, :, 2::-1]
        return values.transpose(1, 2, 0, 3).reshape(height, width, n_channels * n_samples)

    def _voxel_um(self) -> tuple[float | None, float | None, float | None]:
        """Return micrometres along x, y, z, None where the microscope was not calibrated (nd2 says 1)."""
        channels = self._file.metadata.channels or ()
        voxel = self._file.voxel_size()
        sides = (float(voxel.x), float(voxel.y), float(voxel.z))
        told: tuple[bool, ...] | None = channels[0].volume.axesCalibrated if channels else None
        known = tuple(side != 1.0 for side in sides) if told is None else told
        x, y, z = (side if is_known else None for side, is_known in zip(sides, known, strict=True))
        return x, y, z

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
