"""Planes of MRC volumes and stacks, memory-mapped: .mrc, .rec, .map and .st of electron microscopes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    PlaneReader,
    choose_plane,
    make_channel_names,
    make_slide_name,
    pixel_type,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.mrc_header import UNREADABLE, MrcHeader, read_mrc_header
from darcnn.runtime.readers.protocol import Pixels, Planes, SlideInfo

__all__ = ["MrcReader"]


class MrcReader(PlaneReader):
    """One plane of an MRC file, one level, one channel; only the regions asked for leave the disk.

    A plane is a section as it lies in the file: x is its fastest axis, y the next, row 0 the first that
    is stored (programs that put the origin at the lower left show it upside down). All sections count
    along z, those of a stack of volumes one volume after another; the header's axis mapping (MAPC, MAPR,
    MAPS) is not applied. Mode 6 is uint16; modes 0 (int8; unsigned where IMOD says so), 1, 2 and 12
    become float32.

    The pixel size is that of the header's cell, in Angstrom. 0 and 1.0 are what programs write that know
    none, and are not believed.

    Raises:
        InputError: no MRC file, truncated, complex numbers (modes 3 and 4) or an unknown mode; several
            planes and none asked for, or one that is not there; mrcfile is not installed.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self, path: Path, *, z: int | None = None, t: int | None = None, mpp: float | None = None
    ) -> None:
        settle_mpp(None, None, override=mpp)  # a wrong option is told before the file is opened
        header = read_mrc_header(path)
        plane = choose_plane("z", z, header.shape[0], where=path)
        choose_plane("t", t, 1, where=path)
        size, source = settle_mpp(header.mpp, "MRC cell", override=mpp)
        kind = pixel_type(header.dtype)
        if kind is None:
            raise InputError(f"has pixels of type {header.dtype}", where=path, fix="export real numbers")
        super().__init__(
            SlideInfo(
                path=path,
                name=make_slide_name(path),
                levels=(Level(0, header.shape[2], header.shape[1], 1.0),),
                channel_names=make_channel_names((), 1, is_rgb=False),
                dtype=kind,
                is_rgb=False,
                mpp=size,
                mpp_source=source,
            )
        )
        self._plane = _map(path, header)[plane]

    @classmethod
    def count_planes(cls, path: Path) -> Planes:
        """Return how many sections the file holds; only its header is read."""
        return Planes(n_z=read_mrc_header(path).shape[0])

    def _read(self, region: Region, level: Level) -> Pixels:
        return to_pixels(self._plane[region.y0 : region.y1, region.x0 : region.x1, None])  # (H, W, 1)

    def _release(self) -> None:
        self._plane = np.empty((0, 0))  # that was the last reference: the file is unmapped


def _map(path: Path, header: MrcHeader) -> NDArray[Any]:
    """Return the values (Z, Y, X), which stay on the disk until they are read."""
    try:
        return np.memmap(path, header.dtype, "r", header.offset, header.shape)
    except UNREADABLE as err:
        raise InputError(f"cannot be mapped ({err})", where=path, fix="copy it to a local disk") from err
