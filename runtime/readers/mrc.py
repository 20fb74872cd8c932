"""Planes of MRC volumes and stacks, memory-mapped: .mrc, .rec, .map and .st of electron microscopes."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
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
    needs_package,
    pixel_type,
    plausible_mpp,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.protocol import Pixels, Planes, SlideInfo

__all__ = ["MrcReader"]

_UM_PER_ANGSTROM = 1e-4
_UNSET_ANGSTROM = 1.0  # what programs write where they know no pixel size
_FOURIER_MODES = (3, 4)  # complex numbers: a transform, not an image
_IMOD_STAMP = 1146047817  # IMOD's mark: the flags behind it say whether bytes have a sign
_IMOD_STAMP_AT, _IMOD_FLAGS_AT = 152, 156  # bytes from the start of the header
_IMOD_SIGNED = 1
_EXTENSION_AT, _MAP_AT, _STAMP_AT = 92, 208, 212  # size of the extended header, "MAP", byte order
# What mrcfile raises on files that are no MRC or end early; the others come from sizes that cannot be.
_UNREADABLE = (ValueError, OSError, ArithmeticError, TypeError, MemoryError, struct.error)


@dataclass(frozen=True, slots=True)
class _Header:
    """What the header says: type and place of the values, their number along z y x, the pixel size."""

    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, int, int]
    mpp: tuple[float, float] | None


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
        header = _read_header(path)
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
        return Planes(n_z=_read_header(path).shape[0])

    def _read(self, region: Region, level: Level) -> Pixels:
        return to_pixels(self._plane[region.y0 : region.y1, region.x0 : region.x1, None])  # (H, W, 1)

    def _release(self) -> None:
        self._plane = np.empty((0, 0))  # that was the last reference: the file is unmapped


def _read_header(path: Path) -> _Header:
    """Return the checked header; a file that ends before its last value is refused here."""
    try:
        from mrcfile import utils
        from mrcfile.mrcfile import MrcFile
    except ModuleNotFoundError as err:
        raise needs_package("mrcfile", path) from err
    try:
        n_bytes = path.stat().st_size
        _check_extension(path, utils, n_bytes)
        # mrcfile's own mapping warns, through a filter of the whole process, of a file with a tail
        with MrcFile(path, header_only=True) as file:
            header = file.header
        _check_mode(int(header.mode), path)
        dtype = utils.data_dtype_from_header(header)
    except _UNREADABLE as err:
        raise InputError(
            f"cannot be read as MRC ({err})", where=path, fix="copy it again, or export it as MRC2014"
        ) from err
    shape = (int(header.nz), int(header.ny), int(header.nx))
    if min(shape) < 1:
        size = " x ".join(str(n) for n in reversed(shape))
        raise InputError(f"holds {size} values", where=path, fix="export it again")
    offset = header.nbytes + int(header.nsymbt)
    if offset + math.prod(shape) * dtype.itemsize > n_bytes:
        raise InputError("is truncated", where=path, fix="copy the file again or export it anew")
    if dtype == np.int8 and _is_unsigned(header.tobytes(), header.mode.dtype.byteorder):
        dtype = np.dtype(np.uint8)
    n_x, n_y = int(header.mx), int(header.my)
    is_measured = min(n_x, n_y) > 0
    mpp = _mpp(float(header.cella.x) / n_x, float(header.cella.y) / n_y) if is_measured else None
    return _Header(dtype, offset, shape, mpp)


def _check_extension(path: Path, utils: Any, n_bytes: int) -> None:
    """Refuse an extended header larger than the file: mrcfile would find the memory for it first."""
    with path.open("rb") as stream:
        head = stream.read(_STAMP_AT + 4)
    if len(head) == _STAMP_AT + 4 and head[_MAP_AT:].startswith(b"MAP"):  # else mrcfile says what is wrong
        byte_order = utils.byte_order_from_machine_stamp(head[_STAMP_AT:])
        (extension,) = struct.unpack_from(f"{byte_order}i", head, _EXTENSION_AT)
        if not 0 <= extension <= n_bytes:
            raise ValueError(f"extended header of {extension} bytes")


def _check_mode(mode: int, path: Path) -> None:
    if mode in _FOURIER_MODES:
        raise InputError(
            f"holds complex numbers (mode {mode}), a transform rather than an image",
            where=path,
            fix="export the real image in mode 2",
        )


def _mpp(x: float, y: float) -> tuple[float, float] | None:
    """Return micrometres per pixel of a cell in Angstrom, None where the header only has a default.

    >>> _mpp(10.0, 10.0), _mpp(1.0, 1.0), _mpp(0.0, 0.0)
    ((0.001, 0.001), None, None)
    """
    if math.isclose(x, _UNSET_ANGSTROM, rel_tol=1e-6) and math.isclose(y, _UNSET_ANGSTROM, rel_tol=1e-6):
        return None
    return plausible_mpp(x * _UM_PER_ANGSTROM, y * _UM_PER_ANGSTROM)


def _is_unsigned(header: bytes, byte_order: str) -> bool:
    """Tell whether IMOD wrote bytes without a sign, as its older versions did, against the standard."""
    (stamp,) = struct.unpack_from(f"{byte_order}i", header, _IMOD_STAMP_AT)
    (flags,) = struct.unpack_from(f"{byte_order}i", header, _IMOD_FLAGS_AT)
    return stamp == _IMOD_STAMP and not flags & _IMOD_SIGNED


def _map(path: Path, header: _Header) -> NDArray[Any]:
    """Return the values (Z, Y, X), which stay on the disk until they are read."""
    try:
        return np.memmap(path, header.dtype, "r", header.offset, header.shape)
    except _UNREADABLE as err:
        raise InputError(f"cannot be mapped ({err})", where=path, fix="copy it to a local disk") from err
