"""An open volume: numbers in a file that planes of any direction are read from."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.closing import Closing
from darcnn.runtime.errors import InputError, OutputError, ShapeError
from darcnn.runtime.geometry import Grid
from darcnn.runtime.readers.protocol import Location, SlideInfo
from darcnn.runtime.volumes.layout import Layout

__all__ = [
    "AXES",
    "NM_PER_UM",
    "Axis",
    "Stored",
    "Volume",
    "VolumeInfo",
    "across",
    "check_room",
    "in_nanometres",
]

Axis = Literal["z", "y", "x"]
NM_PER_UM = 1000.0
_CUBE = 0.01
_MAX_PLANE_BYTES = 2**32  # a plane is read as a whole
AXES: tuple[Axis, ...] = ("z", "y", "x")  # the order of an array's axes


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """Facts about a volume; everything along z, y, x.

    `voxel_nm` is None where the file does not say; `voxel_source` tells where it came from.
    """

    path: Location
    name: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]  # of what `Volume.read` returns
    voxel_nm: tuple[float, float, float] | None = None
    voxel_source: str | None = None
    is_rgb: bool = False  # its values are means of red, green and blue
    is_series: bool = False  # z is time
    layout: Layout = field(default_factory=Layout)  # what its planes are in a file that holds them one by one
    pixel_um: tuple[float, float] | None = None  # of a series: micrometres per pixel along y, x
    frame_interval_s: float | None = None  # from one time point to the next
    channel_names: tuple[str, ...] = ()  # where the file knows channels; `Volume.read` returns one
    is_depth_known: bool = True  # else planes are taken to lie as far apart as pixels
    image_name: str | None = None  # that one of several images has in its file
    grid: Grid | None = None  # where the voxels lie, if the file tells it as OME-Zarr does

    @property
    def is_cubic(self) -> bool | None:
        """Whether the sides of a voxel are the same, but for 1 %; None: its size is not known."""
        return None if self.voxel_nm is None else max(self.voxel_nm) / min(self.voxel_nm) - 1 <= _CUBE

    @property
    def several_channels(self) -> tuple[str, ...]:
        """The names of the channels where there are several, else nothing."""
        return self.channel_names if len(self.channel_names) > 1 else ()

    @property
    def label_grid(self) -> Grid:
        """Where the labels lie: where the file has its voxels, in its units, so that viewers overlay them."""
        if self.grid is not None:
            return self.grid
        if not self.is_series:
            return Grid.of_steps(self.voxel_nm, "nanometer", n_axes=3)
        interval = None if self.frame_interval_s is None else (self.frame_interval_s,)
        time = Grid.of_steps(interval, "second", n_axes=1)
        plane = Grid.of_steps(self.pixel_um, "micrometer", n_axes=2)
        return Grid(time.steps + plane.steps, time.units + plane.units, time.origin + plane.origin)

    @classmethod
    def of_planes(
        cls,
        info: SlideInfo,
        *,
        path: Location,
        layout: Layout,
        section_um: float | None,
        frame_interval_s: float | None,
        is_rgb: bool,
        grid: Grid | None = None,
    ) -> VolumeInfo:
        """Return the facts about planes that a reader reads one by one.

        Args:
            info: facts about one plane; all are alike.
            path: of the file.
            layout: which planes they are.
            section_um: micrometres from plane to plane; None: the file does not say.
            frame_interval_s: seconds from time point to time point; None: the file does not say.
            is_rgb: `Volume.read` returns means of red, green and blue.
            grid: where the voxels lie, if the file tells it as OME-Zarr does.
        """
        is_series = layout.is_series
        voxel = None if is_series else in_nanometres(info.mpp, section_um)
        return cls(
            path,
            info.name,
            (layout.n_planes, info.height_px0, info.width_px0),
            info.dtype,
            voxel,
            None if voxel is None else info.mpp_source,
            is_rgb=is_rgb,
            is_series=is_series,
            layout=layout,
            pixel_um=info.mpp[::-1] if is_series and info.mpp is not None else None,
            frame_interval_s=frame_interval_s,
            channel_names=() if info.is_rgb else info.channel_names,
            is_depth_known=section_um is not None,
            image_name=info.image_name,
            grid=grid,
        )

    def plane_shape(self, axis: Axis) -> tuple[int, int]:
        """Return (rows, columns) of a plane across `axis`: the other two axes in their order."""
        rows, columns = (self.shape[AXES.index(one)] for one in across(axis))
        return rows, columns

    def pixel_nm(self, axis: Axis) -> float | None:
        """Return the side of a pixel of a plane across `axis`, the geometric mean; None: unknown."""
        if self.pixel_um is not None and axis == "z":
            return NM_PER_UM * math.sqrt(math.prod(self.pixel_um))
        if self.voxel_nm is None:
            return None
        return math.sqrt(math.prod(self.voxel_nm[AXES.index(one)] for one in across(axis)))


def in_nanometres(
    mpp: tuple[float, float] | None, section_um: float | None
) -> tuple[float, float, float] | None:
    """Return nanometres per voxel z, y, x of micrometres x, y and from plane to plane.

    Planes whose distance is unknown lie as far apart as pixels.

    >>> in_nanometres((0.5, 0.5), None), in_nanometres(None, 1.0)
    ((500.0, 500.0, 500.0), None)
    """
    if mpp is None:
        return None
    x, y = mpp
    z = x if section_um is None else section_um
    return z * NM_PER_UM, y * NM_PER_UM, x * NM_PER_UM


def check_room(path: Location, scratch: Path, shape: tuple[int, int, int], dtype: np.dtype[Any]) -> None:
    """Refuse a volume that cannot be unpacked into `scratch` before anything is read of it.

    Raises:
        InputError: its planes are too large for the memory.
        OutputError: there is less room on the disk than it takes.
    """
    plane = shape[1] * shape[2] * dtype.itemsize
    if plane > _MAX_PLANE_BYTES:
        raise InputError(
            f"has planes of {shape[2]} x {shape[1]} values", where=path, fix="cut it, or reduce it in x and y"
        )
    free = shutil.disk_usage(scratch).free
    if shape[0] * plane > free:
        raise OutputError(
            f"has {free / 1e9:.1f} GB free, {path} takes {shape[0] * plane / 1e9:.4g} GB when unpacked",
            where=scratch,
            fix="make room, or name an --out on a larger disk",
        )


def across(axis: Axis) -> tuple[Axis, Axis]:
    """Return the axes of the rows and the columns of a plane across `axis`.

    >>> across("z"), across("x")
    (('y', 'x'), ('z', 'y'))
    """
    rows, columns = (one for one in AXES if one != axis)
    return rows, columns


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a volume's numbers lie: one run of bytes in a file, z slowest and x fastest."""

    path: Path
    dtype: np.dtype[Any]
    offset: int = 0
    slope: float = 1.0  # value = slope * number + intercept
    intercept: float = 0.0


class Volume(Closing):
    """Planes of a volume, read from the disk as they are asked for; a context manager.

    The file is mapped for the length of one read only, so that what has been read does not count as memory.
    `read` may be called from several threads at once.
    """

    def __init__(self, info: VolumeInfo, stored: Stored, *, scratch: Path | None = None) -> None:
        """Open a volume; `scratch` is a file made for it that goes when it is closed."""
        self.info = info
        self._stored = stored
        self._scratch = scratch

    def read(self, axis: Axis, index: int) -> NDArray[Any]:
        """Return plane number `index` across `axis`, (rows, columns), a new array.

        Raises:
            InputError: the file cannot be read.
            ShapeError: there is no such plane.
        """
        which = AXES.index(axis)
        if not 0 <= index < self.info.shape[which]:
            raise ShapeError(f"plane {index} of {self.info.shape[which]} along {axis}")
        stored = self._stored
        place: list[Any] = [slice(None)] * 3
        place[which] = index
        try:
            mapped = np.memmap(stored.path, stored.dtype, "r", stored.offset, self.info.shape)
            values: NDArray[Any] = np.array(mapped[tuple(place)], order="C")
        except (OSError, ValueError) as err:
            raise InputError(f"cannot be read ({err})", where=self.info.path, fix="check the disk") from err
        if (stored.slope, stored.intercept) == (1.0, 0.0):
            return values.astype(values.dtype.newbyteorder("="), copy=False)
        return (values.astype(np.float32) * np.float32(stored.slope) + np.float32(stored.intercept)).astype(
            np.float32
        )

    def for_others(self) -> Volume:
        """Return the volume for another process: under its absolute path, and closing it removes nothing."""
        return Volume(self.info, replace(self._stored, path=self._stored.path.resolve()))

    def close(self) -> None:
        """Give the file back, and the disk space that it took; closing twice is allowed."""
        if self._scratch is not None:
            self._scratch.unlink(missing_ok=True)
            self._scratch = None
