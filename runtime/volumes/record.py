"""What `run.json` says of a volume, and what a user is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from darcnn.runtime.volumes.find import View
from darcnn.runtime.volumes.volume import Volume

__all__ = ["describe_views", "describe_volume", "volume_warnings"]


def describe_volume(volume: Volume, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.json says of the input; `asked` holds the file's fingerprint."""
    info = volume.info
    return {
        "name": info.name,
        "file": asked["slide"],
        "shape_zyx": list(info.shape),
        "dtype": str(info.dtype),
        "voxel_nm_zyx": None if info.voxel_nm is None else list(info.voxel_nm),
        "voxel_source": info.voxel_source,
    }


def describe_views(views: Sequence[View], diameter_px: float | None) -> dict[str, Any]:
    """Return how the model looked at it.

    `diameter_px` is that of a typical object in voxels, None where the voxel size told the scale.
    """
    first = views[0]
    return {
        "axes": [view.stack.axis for view in views],
        "planes_joined": first.stack.n_joined,
        "smoothing_px": first.stack.sigma_px,
        "scale": first.plan.scale,
        "diameter_px": diameter_px,
        "window": [first.window.low, first.window.high],
    }


def volume_warnings(n_objects: int, volume: Volume) -> tuple[str, ...]:
    """Return one line for each thing that a user should look at."""
    warnings = []
    if not n_objects:
        warnings.append("no objects found")
    if volume.info.voxel_nm is None:
        warnings.append("voxel size unknown: nanometre columns are empty")
    return tuple(warnings)
