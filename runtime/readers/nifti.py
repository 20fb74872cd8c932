"""Planes of NIfTI volumes, as scanners of whole bodies and brains give them: .nii and .nii.gz."""

from __future__ import annotations

import math
import struct
import zlib
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
    plausible_um,
    settle_mpp,
    suffix_of,
    to_pixels,
)
from darcnn.runtime.readers.protocol import Pixels, Planes, SlideInfo

__all__ = ["NiftiReader", "open_nifti"]

_UM = {"mm": 1e3, "micron": 1.0, "meter": 1e6}  # micrometres in the header's units; "unknown" is missing
_MOST_PACKED = 1032  # bytes in one of a gzip file, at most
# What nibabel raises on files that are damaged, end early or are packed wrongly.
_UNREADABLE = (ValueError, OSError, EOFError, ArithmeticError, TypeError, LookupError, MemoryError)
_DAMAGED = (*_UNREADABLE, struct.error, zlib.error)


class NiftiReader(PlaneReader):
    """One plane of a NIfTI file, one level, one channel, read as a whole when it is opened.

    The axes are those of the file: the first is x (columns), the second y (rows), the third z, the
    fourth t. No canonical orientation is applied: what the affine says of left and right, front and back
    is not looked at, so a plane may appear mirrored or turned beside a viewer of brains. Values are
    scaled as the header says (slope and intercept), which makes them float32.

    The pixel size is that of the header's zooms where their unit is known (mm, as a rule).

    Raises:
        InputError: no NIfTI volume, damaged or truncated, colours or complex numbers; several planes
            along z or t and none asked for, or one that is not there; nibabel is not installed.
        UsageError: `mpp` is no pixel size.
    """

    def __init__(
        self, path: Path, *, z: int | None = None, t: int | None = None, mpp: float | None = None
    ) -> None:
        settle_mpp(None, None, override=mpp)  # a wrong option is told before the file is opened
        image = _open(path)
        planes = _planes_of(image, path)
        plane_z = choose_plane("z", z, planes.n_z, where=path)
        plane_t = choose_plane("t", t, planes.n_t, where=path)
        pixels = _read_plane(image, path, plane_z, plane_t)
        size, source = settle_mpp(_mpp(image), "NIfTI pixdim", override=mpp)
        height, width, _ = pixels.shape
        super().__init__(
            SlideInfo(
                path=path,
                name=make_slide_name(path),
                levels=(Level(0, width, height, 1.0),),
                channel_names=make_channel_names((), 1, is_rgb=False),
                dtype=pixels.dtype,
                is_rgb=False,
                mpp=size,
                mpp_source=source,
            )
        )
        self._pixels = pixels

    @classmethod
    def count_planes(cls, path: Path) -> Planes:
        """Return how many planes the file holds; only its header is read."""
        return _planes_of(_open(path), path)

    def _read(self, region: Region, level: Level) -> Pixels:
        return self._pixels[region.y0 : region.y1, region.x0 : region.x1].copy()

    def _release(self) -> None:
        self._pixels = np.empty((0, 0, 0))


def open_nifti(path: Path) -> tuple[Any, Planes, tuple[float, float] | None, float | None]:
    """Return nibabel's image, its planes, micrometres per pixel (x, y) and from plane to plane (or None).

    Raises:
        InputError: as for `NiftiReader`.
    """
    image = _open(path)
    planes = _planes_of(image, path)
    if pixel_type(np.dtype(image.dataobj.dtype)) is None:
        raise InputError(f"has pixels of type {image.dataobj.dtype}", where=path, fix="export real numbers")
    zooms = image.header.get_zooms()
    unit_um = _unit_um(image)
    section = None
    if unit_um is not None and len(zooms) > 2:
        section = plausible_um(float(zooms[2]) * unit_um)
    return image, planes, _mpp(image), section


def _open(path: Path) -> Any:
    """Return nibabel's image: its header is read, its values are not."""
    try:
        import nibabel
        from nibabel.filebasedimages import ImageFileError
        from nibabel.spatialimages import HeaderDataError
        from nibabel.wrapstruct import WrapStructError
    except ModuleNotFoundError as err:
        raise needs_package("nibabel", path) from err
    try:
        image = nibabel.load(path)
    except (ImageFileError, HeaderDataError, WrapStructError, *_DAMAGED) as err:
        raise _damaged(path, err) from err
    if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is one of these; CIFTI, surfaces are not
        raise InputError("holds no volume", where=path, fix="export it as NIfTI-1 or NIfTI-2")
    stored: Any = image.dataobj
    n_bytes = math.prod(int(n) for n in stored.shape) * stored.dtype.itemsize
    # how much a packed file holds is known once it is unpacked: it is refused where a plane is missing, but
    # before there is memory for planes of which it cannot hold one
    at_most = path.stat().st_size * (1 if suffix_of(path) == ".nii" else _MOST_PACKED)
    if stored.offset + n_bytes > at_most:
        raise InputError("is truncated", where=path, fix="copy the file again or export it anew")
    return image


def _planes_of(image: Any, path: Path) -> Planes:
    """Return the number of planes along the third and the fourth axis; further axes hold one value."""
    shape = tuple(int(n) for n in image.shape)
    if len(shape) < 2 or min(shape) < 1 or any(n != 1 for n in shape[4:]):
        raise InputError(
            f"has the shape {' x '.join(map(str, shape))}",
            where=path,
            fix="export a volume of x, y, z (and t)",
        )
    n_z, n_t = (*shape[2:4], 1, 1)[:2]
    return Planes(n_z, n_t)


def _read_plane(image: Any, path: Path, z: int, t: int) -> Pixels:
    """Return (H, W, 1): a packed file is unpacked up to there, which is why it is done once only."""
    place = (z, t)[: max(0, len(image.shape) - 2)] + (0,) * (len(image.shape) - 4)
    try:
        values: NDArray[Any] = np.asarray(image.dataobj[(slice(None), slice(None), *place)])  # (W, H)
    except _DAMAGED as err:
        raise _damaged(path, err) from err
    if pixel_type(values.dtype) is None:
        raise InputError(f"has pixels of type {values.dtype}", where=path, fix="export real numbers")
    return to_pixels(values.T[:, :, None])  # (H, W, 1)


def _mpp(image: Any) -> tuple[float, float] | None:
    """Return micrometres per pixel (x, y), None where the header's unit of length is unknown."""
    x, y = (float(zoom) for zoom in image.header.get_zooms()[:2])
    unit_um = _unit_um(image)
    return None if unit_um is None else plausible_mpp(x * unit_um, y * unit_um)


def _unit_um(image: Any) -> float | None:
    try:
        return _UM.get(image.header.get_xyzt_units()[0])
    except KeyError:  # a unit that does not exist
        return None


def _damaged(path: Path, err: Exception) -> InputError:
    reason = str(err) or type(err).__name__
    return InputError(
        f"cannot be read as NIfTI ({reason})", where=path, fix="copy it again, or export it anew"
    )
