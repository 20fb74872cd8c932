"""The header of MRC files: where the values lie and how large a voxel is, checked against the file."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import needs_package, plausible_mpp

__all__ = ["UNREADABLE", "MrcHeader", "axes_of_map", "read_mrc_header"]

_UM_PER_ANGSTROM = 1e-4
_UNSET_ANGSTROM = 1.0  # what programs write where they know no pixel size
_VOLUME_STACK = 401  # space group of a stack of volumes: 401 plus that of each
_FOURIER_MODES = (3, 4)  # complex numbers: a transform, not an image
_IMOD_STAMP = 1146047817  # IMOD's mark: the flags behind it say whether bytes have a sign
_IMOD_STAMP_AT, _IMOD_FLAGS_AT = 152, 156  # bytes from the start of the header
_IMOD_SIGNED = 1
_EXTENSION_AT, _MAP_AT, _STAMP_AT = 92, 208, 212  # size of the extended header, "MAP", byte order
_AXIS_NAMES = "xyz"  # of the cell; the map fields count them from 1
_MAP_FIELDS = ("mapc", "mapr", "maps")  # which axis columns, rows and sections go along
# What mrcfile raises on files that are no MRC or end early; the others come from sizes that cannot be.
UNREADABLE = (ValueError, OSError, ArithmeticError, TypeError, MemoryError, struct.error)


@dataclass(frozen=True, slots=True)
class MrcHeader:
    """What the header says: type and place of the values, their number along z y x, their size."""

    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, int, int]
    mpp: tuple[float, float] | None  # x, y
    section_um: float | None  # from one section to the next
    n_volumes: int = 1  # that lie one behind the other, in equal shares of the sections


def read_mrc_header(path: Path, *, where: Path | None = None) -> MrcHeader:
    """Return the checked header; a file that ends before its last value is refused here.

    Args:
        path: the file.
        where: what it was unpacked from, for errors; None: it is what the user named.
    Raises:
        InputError: no MRC file, truncated, complex numbers or an unknown mode; mrcfile is not installed.
    """
    try:
        from mrcfile import utils
        from mrcfile.mrcfile import MrcFile
    except ModuleNotFoundError as err:
        raise needs_package("mrcfile", where or path) from err
    where = where or path
    try:
        n_bytes = path.stat().st_size
        _check_extension(path, utils, n_bytes)
        # mrcfile's own mapping warns, through a filter of the whole process, of a file with a tail
        with MrcFile(path, header_only=True) as file:
            header = file.header
        _check_mode(int(header.mode), where)
        dtype = utils.data_dtype_from_header(header)
    except UNREADABLE as err:
        raise InputError(
            f"cannot be read as MRC ({err})", where=where, fix="copy it again, or export it as MRC2014"
        ) from err
    shape = (int(header.nz), int(header.ny), int(header.nx))
    if min(shape) < 1:
        size = " x ".join(str(n) for n in reversed(shape))
        raise InputError(f"holds {size} values", where=where, fix="export it again")
    offset = header.nbytes + int(header.nsymbt)
    if offset + math.prod(shape) * dtype.itemsize > n_bytes:
        raise InputError("is truncated", where=where, fix="copy the file again or export it anew")
    if dtype == np.int8 and _is_unsigned(header.tobytes(), header.mode.dtype.byteorder):
        dtype = np.dtype(np.uint8)
    x, y, z = _steps(header)
    mpp = None if x is None or y is None else _mpp(x, y)
    section = None if z is None else _mpp(z, z)
    n_z = int(header.mz)
    is_stack = int(header.ispg) >= _VOLUME_STACK and 0 < n_z < shape[0] and shape[0] % n_z == 0
    n_volumes = shape[0] // n_z if is_stack else 1
    return MrcHeader(dtype, offset, shape, mpp, section[0] if section else None, n_volumes)


def _steps(header: Any) -> list[float | None]:
    """Return Angstrom from column to column, row to row and section to section; None: not told."""
    axes = axes_of_map(header)
    counts = {axis: int(header[f"m{axis}"]) for axis in axes}
    return [float(header.cella[axis]) / counts[axis] if counts[axis] > 0 else None for axis in axes]


def axes_of_map(header: Any) -> list[str]:
    """Return which axis of the cell, "x", "y" or "z", columns, rows and sections go along."""
    order = [int(header[name]) for name in _MAP_FIELDS]
    if sorted(order) != [1, 2, 3]:  # programs that leave them 0 mean this
        order = [1, 2, 3]
    return [_AXIS_NAMES[number - 1] for number in order]


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
