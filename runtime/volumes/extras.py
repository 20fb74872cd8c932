"""Formats that a result on a volume gets when they are asked for, made of its table and its labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from darcnn.runtime.errors import UsageError
from darcnn.runtime.readers.mrc_header import axes_of_map
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.run_options import check_formats
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.sinks.ctc import write_ctc
from darcnn.runtime.sinks.labels_tiff import write_label_stack
from darcnn.runtime.sinks.parquet import count_objects, open_table
from darcnn.runtime.sinks.result_folder import (
    CSV_FILE,
    CTC_FOLDER,
    LABELS_FOLDER,
    LABELS_MRC_FILE,
    LABELS_TIFF,
    TABLE_FILE,
    TRACKS_CSV_FILE,
    TRACKS_FILE,
    hold_folder,
)
from darcnn.runtime.sinks.table_csv import write_csv
from darcnn.runtime.volumes.open import is_mrc
from darcnn.runtime.volumes.options import EXTRA_VOLUME_FORMATS
from darcnn.runtime.volumes.volume import NM_PER_UM

__all__ = ["add_formats", "check_volume_formats", "write_formats"]

_FILES = {"csv": CSV_FILE, "ctc": CTC_FOLDER, "labels-mrc": LABELS_MRC_FILE, "labels-tiff": LABELS_TIFF}
_MAX_UINT16 = 65535
_ANGSTROM_PER_NM = 10.0
_GEOMETRY = (
    *("cella", "cellb", "origin", "mapc", "mapr", "maps"),
    *("mx", "my", "mz", "nxstart", "nystart", "nzstart", "ispg"),
)


def check_volume_formats(also: Sequence[str]) -> None:
    """Refuse formats that there are none of, or whose package is not installed, before anything is found.

    Raises:
        UsageError: one of `also` cannot be written.
    """
    check_formats(also, EXTRA_VOLUME_FORMATS)
    if "labels-mrc" in also and find_spec("mrcfile") is None:
        fix = "run pip install 'darcnn[volumes]'"
        raise UsageError("labels-mrc needs the package mrcfile", where="--also", fix=fix)


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
        if (folder / TRACKS_FILE).exists():
            write_csv(folder / TRACKS_CSV_FILE, folder / TRACKS_FILE)
    if "ctc" in also and described.get("is_series"):
        write_ctc(folder / CTC_FOLDER, folder / LABELS_FOLDER, _parents(folder / TABLE_FILE))
    if "labels-mrc" in also:
        _write_label_mrc(folder, path, described)
    if "labels-tiff" in also:
        axes = "TYX" if described.get("is_series") else "ZYX"
        write_label_stack(
            folder / LABELS_TIFF,
            folder / LABELS_FOLDER,
            axes=axes,
            step_um=_step_um(described),
            name=described["name"],
        )


def add_formats(folder: Path, path: Location, described: Mapping[str, Any], also: Sequence[str]) -> None:
    """Write into a complete result the formats of `also` that it lacks; no object is found again.

    Raises:
        OutputError: the folder is in use, or cannot be written.
    """
    missing = [
        extra
        for extra in also
        if not all((folder / name).exists() for name in _files(folder, described, extra))
    ]
    if missing:
        with hold_folder(folder), translated(folder):
            write_formats(folder, path, described, missing)


def _step_um(described: Mapping[str, Any]) -> dict[str, float]:
    """Return micrometres from label to label by axis, as far as they are known."""
    if described.get("pixel_um_yx") is not None:
        return dict(zip("YX", described["pixel_um_yx"], strict=True))
    if described["voxel_nm_zyx"] is None:
        return {}
    return dict(zip("ZYX", (side / NM_PER_UM for side in described["voxel_nm_zyx"]), strict=True))


def _parents(table: Path) -> dict[int, int]:
    """Return the `id` of each object that came of a division to that of its mother."""
    with open_table(table) as file:
        if "parent" not in file.schema_arrow.names:  # results from before divisions were told
            return {}
        rows = file.read(columns=["id", "parent"])
    ids, parents = (rows[name].to_pylist() for name in rows.column_names)
    return {number: parent for number, parent in zip(ids, parents, strict=True) if parent is not None}


def _files(folder: Path, described: Mapping[str, Any], extra: str) -> Iterator[str]:
    """Yield the names of the files of one format; only series have tracks."""
    if extra != "ctc" or described.get("is_series"):
        yield _FILES[extra]
    if extra == "csv" and (folder / TRACKS_FILE).exists():
        yield TRACKS_CSV_FILE


def _set_cell(header: Any, step_nm: Sequence[float], counts: Sequence[int]) -> None:
    """Let an MRC header say how large a voxel is along columns, rows and sections.

    `counts` are those of the array; what the header says that a cell holds stays where it says anything.
    """
    for side_nm, n, axis in zip(step_nm, counts, axes_of_map(header), strict=True):
        if int(header[f"m{axis}"]) <= 0:
            header[f"m{axis}"] = n
        header["cella"][axis] = side_nm * _ANGSTROM_PER_NM * int(header[f"m{axis}"])


def _write_label_mrc(folder: Path, volume: Location, described: Mapping[str, Any]) -> None:
    """Write the labels as MRC.

    Mode 6 (uint16) holds 65,535 objects; more are written as float32 (mode 2), which counts to 16.7 million.
    """
    import mrcfile

    path, n_objects = folder / LABELS_MRC_FILE, count_objects(folder / TABLE_FILE)
    array = zarr.open_array(folder / LABELS_FOLDER / "0", mode="r")
    depth = array.chunks[0]  # few planes where they are large
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        mode = 6 if n_objects <= _MAX_UINT16 else 2
        with mrcfile.new_mmap(temporary, shape=array.shape, mrc_mode=mode, overwrite=True) as file:
            if isinstance(volume, Path) and is_mrc(volume):
                with mrcfile.open(volume, header_only=True, permissive=True) as model:
                    for name in _GEOMETRY:
                        file.header[name] = model.header[name]
            if described["voxel_nm_zyx"] is not None and described["voxel_source"] != "MRC cell":
                _set_cell(file.header, described["voxel_nm_zyx"][::-1], array.shape[::-1])
            for start in range(0, array.shape[0], depth):
                file.data[start : start + depth] = np.asarray(array[start : start + depth])
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
