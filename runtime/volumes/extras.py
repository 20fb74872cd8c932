"""Formats that a result on a volume gets when they are asked for, made of its table and its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from darcnn.runtime.errors import UsageError
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.sinks.result_folder import (
    CSV_FILE,
    LABELS_FOLDER,
    LABELS_MRC_FILE,
    TABLE_FILE,
    hold_folder,
)
from darcnn.runtime.sinks.table_csv import write_csv
from darcnn.runtime.volumes.options import EXTRA_VOLUME_FORMATS

__all__ = ["add_formats", "check_formats", "write_formats"]

_FILES = {"csv": CSV_FILE, "labels-mrc": LABELS_MRC_FILE}
_SLAB_BYTES = 64 << 20  # labels in memory at once, about
_MAX_UINT16 = 65535
_ANGSTROM_PER_NM = 10.0
_GEOMETRY = (
    *("cella", "cellb", "origin", "mapc", "mapr", "maps"),
    *("mx", "my", "mz", "nxstart", "nystart", "nzstart", "ispg"),
)


def check_formats(also: Sequence[str]) -> None:
    """Refuse what is no format of a volume.

    Raises:
        UsageError: one of them is not.
    """
    unknown = sorted(set(also) - set(EXTRA_VOLUME_FORMATS))
    if unknown:
        raise UsageError(
            f"no format {unknown[0]}", where="--also", fix=f"choose from {', '.join(EXTRA_VOLUME_FORMATS)}"
        )


def write_formats(folder: Path, path: Location, described: Mapping[str, Any], also: Sequence[str]) -> None:
    """Write the formats of `also` into a result whose table and labels are there.

    Args:
        folder: of the result.
        path: the volume: labels in MRC get the geometry (cell, origin, start) of an MRC file.
        described: what run.json says of the input.
        also: of `EXTRA_VOLUME_FORMATS`.
    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    if "csv" in also:
        write_csv(folder / CSV_FILE, folder / TABLE_FILE)
    if "labels-mrc" in also:
        _write_label_mrc(folder / LABELS_MRC_FILE, folder / LABELS_FOLDER / "0", path, described)


def add_formats(folder: Path, path: Location, described: Mapping[str, Any], also: Sequence[str]) -> None:
    """Write into a complete result the formats of `also` that it lacks; no object is found again.

    Raises:
        OutputError: the folder is in use, or cannot be written.
    """
    missing = [extra for extra in also if not (folder / _FILES[extra]).exists()]
    if missing:
        with hold_folder(folder), translated(folder):
            write_formats(folder, path, described, missing)


def _write_label_mrc(path: Path, labels: Path, volume: Location, described: Mapping[str, Any]) -> None:
    """Write the labels as MRC.

    Mode 6 (uint16) holds 65,535 objects; more are written as float32 (mode 2), which counts to 16.7 million.
    """
    import mrcfile

    array = zarr.open_array(labels, mode="r")
    step = min(array.chunks[0], max(1, _SLAB_BYTES // (4 * array.shape[1] * array.shape[2])))
    slabs = [slice(start, start + step) for start in range(0, array.shape[0], step)]
    n_objects = max(int(np.asarray(array[slab]).max(initial=0)) for slab in slabs)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        mode = 6 if n_objects <= _MAX_UINT16 else 2
        with mrcfile.new_mmap(temporary, shape=array.shape, mrc_mode=mode, overwrite=True) as file:
            if described["voxel_source"] == "MRC cell":
                with mrcfile.open(volume, header_only=True, permissive=True) as model:
                    for name in _GEOMETRY:
                        file.header[name] = model.header[name]
            elif described["voxel_nm_zyx"] is not None:
                file.voxel_size = tuple(one * _ANGSTROM_PER_NM for one in described["voxel_nm_zyx"][::-1])
            for slab in slabs:
                file.data[slab] = np.asarray(array[slab])
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
