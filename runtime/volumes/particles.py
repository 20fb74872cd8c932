"""Coordinates for other programs: a RELION STAR file and a point list that IMOD reads."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa

from darcnn.runtime.sinks.atomic import atomic_file

__all__ = ["can_write_star", "write_points", "write_star"]

_ANGSTROM_PER_NM = 10.0


def can_write_star() -> bool:
    """Tell whether the packages that write STAR files are installed; nothing is imported."""
    return all(find_spec(package) is not None for package in ("pandas", "starfile"))


def write_star(
    path: Path,
    table: pa.Table,
    *,
    name: str,
    shape: tuple[int, int, int],
    voxel_nm: tuple[float, float, float] | None,
) -> None:
    """Write the centroids as a STAR file of RELION 3.1 and later: tables `optics` and `particles`.

    Coordinates are voxels of the tomogram, of which the first has its centre at 0. Where the voxel size is
    known they are given in Angstrom from the tomogram's centre (size / 2) as well, as RELION 5 has them: so
    they hold for other binnings. The score is the figure of merit. Angles are not known: 0.
    Nothing is written where `can_write_star` says no: stacks of microscopes are searched all the same.

    Args:
        path: file to write.
        table: objects of the volume (`solid_schema`).
        name: of the tomogram.
        shape: of the tomogram, z y x.
        voxel_nm: nanometres per voxel z, y, x; None: unknown, columns that need it are left out.
    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    if not can_write_star():
        return
    import pandas as pd
    import starfile

    optics: dict[str, list[object]] = {"rlnOpticsGroup": [1], "rlnOpticsGroupName": ["opticsGroup1"]}
    n, centred = table.num_rows, {}
    indices = {axis: table[axis].to_numpy() - 0.5 for axis in "xyz"}
    if voxel_nm is not None:
        optics["rlnTomoTiltSeriesPixelSize"] = [round(voxel_nm[2] * _ANGSTROM_PER_NM, 6)]
        for axis, side, voxel in zip("zyx", shape, voxel_nm, strict=True):
            from_centre = (indices[axis] - side / 2) * voxel * _ANGSTROM_PER_NM
            centred[f"rlnCenteredCoordinate{axis.upper()}Angst"] = np.round(from_centre, 2)
    particles = {
        "rlnTomoName": [name] * n,
        "rlnTomoParticleId": table["id"].to_numpy(),
        **{f"rlnCoordinate{axis.upper()}": np.round(indices[axis], 3) for axis in "xyz"},
        **dict(sorted(centred.items())),
        **{f"rlnAngle{angle}": np.zeros(n) for angle in ("Rot", "Tilt", "Psi")},
        "rlnAutopickFigureOfMerit": np.round(table["score"].to_numpy().astype(np.float64), 4),
        "rlnOpticsGroup": np.ones(n, np.int64),
    }
    text = starfile.to_string({"optics": pd.DataFrame(optics), "particles": pd.DataFrame(particles)})
    # starfile begins with a remark that holds the time: the same run is to give the same bytes
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")]
    with atomic_file(path) as file:
        file.write("".join(lines).encode())


def write_points(path: Path, table: pa.Table) -> None:
    """Write one line `x y z` an object, as IMOD's point2model reads it.

    The centre of the first voxel is at 0.5, 0.5, 0.0 there: along z IMOD counts whole sections.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    x, y, z = (table[axis].to_numpy() for axis in "xyz")
    lines = (f"{a:.2f} {b:.2f} {c - 0.5:.2f}\n" for a, b, c in zip(x, y, z, strict=True))
    with atomic_file(path) as file:
        file.write("".join(lines).encode())
