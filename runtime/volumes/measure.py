"""What is known of each object of a volume by its shape: place, size, roundness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.volumes.solid import Solid

__all__ = ["measure_solids", "solid_schema"]

_ROWS = 4096  # solids that are measured at once
_VOXELS = 1 << 20  # of a solid's box that are looked at at once, about
# A voxel is a cube, not a point: its own second moment is 1/12 along each axis.
_VOXEL_MOMENT = 1.0 / 12.0
_BOX_COLUMNS = ("bbox_z0", "bbox_y0", "bbox_x0", "bbox_z1", "bbox_y1", "bbox_x1")


def solid_schema() -> pa.Schema:
    """Return the columns of the table of objects of a volume, in their order."""
    return pa.schema(
        [
            ("id", pa.int64()),
            ("score", pa.float32()),
            ("z", pa.float64()),
            ("y", pa.float64()),
            ("x", pa.float64()),
            *((name, pa.int32()) for name in _BOX_COLUMNS),
            ("volume_voxels", pa.int64()),
            ("volume_nm3", pa.float64()),
            ("diameter_nm", pa.float32()),
            ("major_axis_nm", pa.float32()),
            ("middle_axis_nm", pa.float32()),
            ("minor_axis_nm", pa.float32()),
            ("sphericity", pa.float32()),
            ("mean_intensity", pa.float64()),
            ("n_planes", pa.int32()),
            ("truncated", pa.bool_()),
        ]
    )


def measure_solids(
    solids: Iterable[Solid], voxel_nm: tuple[float, float, float] | None
) -> Iterator[pa.Table]:
    """Yield tables of `solid_schema`, one row a solid in their order; `id` and `mean_intensity` are null.

    `z y x` is the centroid in voxels, of which the first covers 0 to 1. The axes are those of the ellipsoid
    with the same second moments. `sphericity` is Krumbein's (1941) intercept sphericity, the cube root of
    middle x minor / major^2: 1 for a ball, whatever its surface is like at the size of a voxel.
    `diameter_nm` is that of the ball of the same volume.

    Args:
        solids: the objects.
        voxel_nm: nanometres per voxel along z, y, x; None makes the nm columns null, and voxels cubes.
    """
    rows: list[dict[str, object]] = []
    for solid in solids:
        rows.append(_measure(solid, voxel_nm))
        if len(rows) == _ROWS:
            yield pa.Table.from_pylist(rows, schema=solid_schema())
            rows = []
    if rows:
        yield pa.Table.from_pylist(rows, schema=solid_schema())


def _measure(solid: Solid, voxel_nm: tuple[float, float, float] | None) -> dict[str, object]:
    n, centre, spread = _moments(solid.mask)
    centroid = centre + solid.origin + 0.5
    size = np.array(voxel_nm or (1.0, 1.0, 1.0))
    axes = _axes(spread, size)  # minor, middle, major
    row: dict[str, object] = {
        "id": None,
        "score": solid.score,
        **dict(zip("zyx", centroid.tolist(), strict=True)),
        **dict(zip(_BOX_COLUMNS, (*solid.origin, *solid.stop), strict=True)),
        "volume_voxels": n,
        "sphericity": float((axes[0] * axes[1] / axes[2] ** 2) ** (1.0 / 3.0)),
        "n_planes": solid.n_planes,
        "truncated": solid.truncated,
    }
    if voxel_nm is not None:
        volume = n * float(size.prod())
        row["volume_nm3"] = volume
        row["diameter_nm"] = (6.0 * volume / math.pi) ** (1.0 / 3.0)
        for name, length in zip(("minor", "middle", "major"), axes.tolist(), strict=True):
            row[f"{name}_axis_nm"] = length
    return row


def _moments(mask: NDArray[np.bool_]) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Return the number of voxels in (D, H, W), their mean place (3,) and covariance (3, 3), in voxels.

    A few planes at a time: the places of all voxels of a large object would take 24 times its memory.
    """
    middle = np.array(mask.shape) // 2  # numbers stay small
    n, total, products = 0, np.zeros(3), np.zeros((3, 3))
    depth = max(1, _VOXELS // math.prod(mask.shape[1:]))
    for start in range(0, len(mask), depth):
        points = np.argwhere(mask[start : start + depth]) + (np.array([start, 0, 0]) - middle)  # (N, 3) z y x
        n += len(points)
        total += points.sum(axis=0)
        products += points.T @ points
    mean = total / n
    return n, mean + middle, products / n - np.outer(mean, mean)


def _axes(spread: NDArray[np.float64], size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the lengths (3,) of the axes of the ellipsoid with the covariance `spread`, ascending.

    Along its own axis of length a an ellipsoid has the second moment a^2 / 20.
    """
    moments = spread * np.outer(size, size) + np.diag(size**2 * _VOXEL_MOMENT)
    lengths: NDArray[np.float64] = np.sqrt(20.0 * np.linalg.eigvalsh(moments))
    return lengths
