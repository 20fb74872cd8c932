"""From files to volumes: numbers that lie on the disk as they are get mapped, others are unpacked once."""

from __future__ import annotations

import bz2
import gzip
import math
import shutil
import zlib
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError, ShapeError, UsageError
from darcnn.runtime.intensity import select_channels
from darcnn.runtime.planning import find_channel
from darcnn.runtime.readers.base import choose_plane, make_slide_name, suffix_of
from darcnn.runtime.readers.mrc_header import read_mrc_header
from darcnn.runtime.readers.nifti import open_nifti
from darcnn.runtime.readers.ome_zarr import is_ome_zarr
from darcnn.runtime.readers.open import MRC, NIFTI, PACKED, count_planes, is_packed_volume, read_planes
from darcnn.runtime.readers.protocol import Location, Planes, Reader
from darcnn.runtime.volumes.layout import Layout
from darcnn.runtime.volumes.ome_zarr import unpack_zarr
from darcnn.runtime.volumes.volume import NM_PER_UM, Stored, Volume, VolumeInfo, check_room, in_nanometres

__all__ = ["VOLUME_SUFFIXES", "count_lacking", "is_mrc", "is_series", "is_volume", "open_volume"]

VOLUME_SUFFIXES = (*MRC, *PACKED, *NIFTI)  # of formats that hold volumes and nothing else


def is_volume(path: Location, *, t: int | None = None) -> bool:
    """Tell whether a source holds several planes along z, or along t of which `t` does not choose one.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(path, Path) and is_packed_volume(path):
        return True
    planes = count_planes(path)
    return planes.n_z > 1 or planes.is_series(t)


def count_lacking(path: Path) -> int:
    """Return how many planes a file announces and does not hold (OME-TIFF).

    Raises:
        InputError: it cannot be read.
    """
    if is_mrc(path) or suffix_of(path) in NIFTI:
        return 0
    return count_planes(path).n_lacking


def is_mrc(path: Path) -> bool:
    """Tell whether a file is MRC by its ending, packed or not."""
    return is_packed_volume(path) or suffix_of(path) in MRC


def is_series(path: Location, *, t: int | None = None) -> bool:
    """Tell whether a source holds time points of one plane, of which `t` chooses none.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(path, Path) and is_packed_volume(path):
        return False
    return count_planes(path).is_series(t)


def open_volume(
    path: Location,
    scratch: Path,
    *,
    t: int | None = None,
    channel: int | str | None = None,
    voxel_nm: tuple[float, float, float] | None = None,
    series: bool = False,
    projects: bool = False,
) -> Volume:
    """Open the volume in `path`; a context manager.

    Args:
        path: MRC (.mrc, .rec, .map, .st, also packed as .gz or .bz2), NIfTI, a stack in TIFF, ND2, LIF,
            CZI or IMS, or OME-Zarr (a folder or a URL).
        scratch: a folder that may be written to; what must be unpacked lies there until the volume is closed.
        t: which time point of a series of volumes. A series of single planes is a volume along t.
        channel: which of several channels, number or name.
        voxel_nm: nanometres per voxel along z, y, x, in place of what the file says.
        series: the planes are time points, whatever the file says.
        projects: of a series of stacks, the brightest of each: a series of pictures.
    Raises:
        UsageError: there are no stacks to project.
        InputError: the file is damaged, holds no volume or several, or needs a choice of `t` or `channel`.
        OutputError, OSError: there is no room to unpack it.
    """
    volume = _open_as_told(path, scratch, t=t, channel=channel, projects=projects)
    if series and not volume.info.is_series:
        volume.info = _as_series(volume.info)
    if voxel_nm is not None:
        volume.info = _with_voxel_size(volume.info, voxel_nm)
    return volume


def _open_as_told(
    path: Location, scratch: Path, *, t: int | None, channel: int | str | None, projects: bool
) -> Volume:
    """Return the volume as the file describes it."""
    if not isinstance(path, Path) or is_ome_zarr(path):
        return unpack_zarr(path, scratch, t=t, channel=channel, projects=projects)
    if projects and (is_mrc(path) or suffix_of(path) in NIFTI):
        raise UsageError("is for light microscopy", where="--project", fix="leave it out")
    if is_mrc(path):
        choose_plane("t", t, 1, where=path)
        return _open_mrc(path, scratch, is_packed=is_packed_volume(path))
    if suffix_of(path) in NIFTI:
        return _open_nifti(path, scratch, t)
    planes = count_planes(path)
    layout = Layout.of(planes, path, t=t, projects=projects)
    return _unpack_stack(path, scratch, planes, layout, channel)


def _as_series(info: VolumeInfo) -> VolumeInfo:
    """Return the facts of planes that are time points, of which the file does not know."""
    pixel_um = None if info.voxel_nm is None else _pixel_um(info.voxel_nm)
    return replace(info, is_series=True, voxel_nm=None, pixel_um=pixel_um, grid=None)


def _with_voxel_size(info: VolumeInfo, voxel_nm: tuple[float, float, float]) -> VolumeInfo:
    """Return the facts with the size that the user gave; time points have no distance."""
    if info.is_series:
        return replace(info, pixel_um=_pixel_um(voxel_nm), voxel_source="--voxel-size", grid=None)
    return replace(info, voxel_nm=voxel_nm, voxel_source="--voxel-size", is_depth_known=True, grid=None)


def _pixel_um(voxel_nm: tuple[float, float, float]) -> tuple[float, float]:
    """Return micrometres per pixel along y, x."""
    _, y, x = (side / NM_PER_UM for side in voxel_nm)
    return y, x


def _open_mrc(path: Path, scratch: Path, *, is_packed: bool) -> Volume:
    unpacked = _unpack(path, scratch) if is_packed else None
    place = path if unpacked is None else unpacked
    try:
        header = read_mrc_header(place, where=path)
        if header.n_volumes > 1:
            raise InputError(
                f"holds {header.n_volumes} volumes, one behind the other",
                where=path,
                fix="write each to a file of its own (newstack of IMOD, say)",
            )
    except BaseException:
        if unpacked is not None:
            unpacked.unlink(missing_ok=True)
        raise
    voxel = in_nanometres(header.mpp, header.section_um)
    info = VolumeInfo(
        path,
        make_slide_name(path),
        header.shape,
        header.dtype,
        voxel,
        None if voxel is None else "MRC cell",
        is_depth_known=header.section_um is not None,
    )
    return Volume(info, Stored(place, header.dtype, header.offset), scratch=unpacked)


def _open_nifti(path: Path, scratch: Path, t: int | None) -> Volume:
    image, planes, mpp, section_um = open_nifti(path)
    moment = choose_plane("t", t, planes.n_t, where=path)
    stored: Any = image.dataobj
    columns, rows = (int(n) for n in image.shape[:2])
    shape = (planes.n_z, rows, columns)
    voxel = in_nanometres(mpp, section_um)
    slope, intercept = (float(one) for one in (stored.slope, stored.inter))
    is_scaled = (slope, intercept) != (1.0, 0.0)
    unpacked = _unpack(path, scratch) if suffix_of(path) == ".nii.gz" else None
    dtype = np.dtype(stored.dtype)
    offset = int(stored.offset) + moment * math.prod(shape) * dtype.itemsize
    place = path if unpacked is None else unpacked
    if place.stat().st_size < offset + math.prod(shape) * dtype.itemsize:
        if unpacked is not None:
            unpacked.unlink()
        raise InputError("is truncated", where=path, fix="copy the file again or export it anew")
    kind = np.dtype(np.float32) if is_scaled else dtype
    source = None if voxel is None else "NIfTI pixdim"
    is_known = section_um is not None
    info = VolumeInfo(path, make_slide_name(path), shape, kind, voxel, source, is_depth_known=is_known)
    return Volume(info, Stored(place, dtype, offset, slope, intercept), scratch=unpacked)


def _unpack(path: Path, scratch: Path) -> Path:
    """Return a new file in `scratch` with the unpacked content of `path`."""
    target = scratch / f".{make_slide_name(path)}.unpacked"
    opener = gzip.open if path.suffix.lower() == ".gz" else bz2.open
    try:
        with opener(path) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        target.unlink(missing_ok=True)
        raise InputError(f"cannot be unpacked ({err})", where=path, fix="copy it again") from err
    except OSError as err:
        target.unlink(missing_ok=True)
        if err.errno is None:  # not the system but bz2 says so: the content is broken
            raise InputError(f"cannot be unpacked ({err})", where=path, fix="copy it again") from err
        raise
    return target


def _unpack_stack(
    path: Path, scratch: Path, planes_of_file: Planes, layout: Layout, channel: int | str | None
) -> Volume:
    """Return a volume of planes that a reader reads one by one: they are decoded once, into a file."""
    target = scratch / f".{make_slide_name(path)}.unpacked"
    readers = read_planes(path, layout.places())
    try:
        with target.open("wb") as file:
            first = next(readers)
            facts = VolumeInfo.of_planes(
                first.info,  # all are alike
                path=path,
                layout=layout,
                section_um=None if layout.is_series else planes_of_file.section_um,
                frame_interval_s=planes_of_file.frame_interval_s,
                is_rgb=first.info.is_rgb,
            )
            check_room(path, scratch, facts.shape, facts.dtype)
            planes = (_read_plane(reader, channel) for reader in chain([first], readers))
            for plane in layout.project(planes):
                file.write(plane.tobytes())
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    return Volume(facts, Stored(target, facts.dtype), scratch=target)


def _read_plane(reader: Reader, channel: int | str | None) -> NDArray[Any]:
    """Return the (H, W) values of one channel, or of the mean of red, green and blue."""
    info = reader.info
    pixels = reader.read(info.whole, level=0)
    number = find_channel(info, channel)
    try:
        chosen = select_channels(pixels, is_rgb=info.is_rgb, channels=1, channel=number)
    except ShapeError as err:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(info.channel_names))
        raise InputError(
            str(err), where=info.path or info.name, fix=f"choose one with --channel: {names}"
        ) from err
    return chosen[:, :, 0]
