"""What `run.json` says of a volume, and what a user is warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darcnn.runtime.diameter import is_size_measured
from darcnn.runtime.fit import warn_of_noise, warn_of_none, warn_of_size
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.readers.base import suffix_of
from darcnn.runtime.volumes.agree import Agreement
from darcnn.runtime.volumes.find import View
from darcnn.runtime.volumes.open import VOLUME_SUFFIXES
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.particles import can_write_star
from darcnn.runtime.volumes.volume import Volume

__all__ = ["VolumeCounts", "describe_views", "describe_volume", "size_warnings"]

_TINY_NM = 2.0


def describe_volume(volume: Volume, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what run.json says of the input; `asked` holds the file's fingerprint."""
    info = volume.info
    return {
        "name": info.name,
        "image_name": info.image_name,
        "file": asked["slide"],
        "shape_zyx": list(info.shape),
        "dtype": str(info.dtype),
        "voxel_nm_zyx": None if info.voxel_nm is None else list(info.voxel_nm),
        "voxel_source": info.voxel_source,
        "voxel_depth_is_known": info.voxel_nm is not None and info.is_depth_known,
        "is_series": info.is_series,
        "pixel_um_yx": None if info.pixel_um is None else list(info.pixel_um),
        "frame_interval_s": info.frame_interval_s if info.is_series else None,
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


@dataclass(frozen=True, slots=True)
class VolumeCounts:
    """What is counted on the way, and what of it a user is warned of."""

    n_found: int  # objects, before a filter
    n_objects: int  # that are reported
    agreement: Agreement  # before a filter
    n_planes: int  # of all axes
    n_full: int = 0  # planes with tiles that hold as many objects as the model can report
    n_divisions: int | None = None  # of objects of a series

    def describe(self) -> dict[str, Any]:
        """Return what run.json says of it."""
        by_axis = self.agreement.by_axis
        several = {"by_axis": dict(by_axis)} if len(by_axis) > 1 else {}
        return {
            "objects": self.n_objects,
            "filtered": self.n_found - self.n_objects,
            "planes": self.n_planes,
            "planes_saturated": self.n_full,
            **({} if self.n_divisions is None else {"divisions": self.n_divisions}),
            **several,
        }

    def warnings(self, volume: Volume) -> tuple[str, ...]:
        """Return one line for each thing that a user should look at."""
        warnings = []
        layout = volume.info.layout
        if layout.n_lacking:
            what = "time points" if volume.info.is_series else "planes"
            n_planned = layout.n_planes + layout.n_lacking
            warnings.append(
                f"of {n_planned} {what} that the file announces, the last {layout.n_lacking} are missing"
            )
        if not (volume.info.is_series or can_write_star()):
            warnings.append("particles.star is left out: pip install 'darcnn[volumes]', then --overwrite")
        if not self.n_objects:
            warnings.append(warn_of_none(self.n_found))
        if self.agreement.is_little:
            warnings.append(self._warn_of_noise())
        if self.n_full:
            warnings.append(
                f"planes with tiles that hold as many objects as the model can report: {self.n_full}; "
                "some objects may be missing there"
            )
        info = volume.info
        if info.is_series and info.pixel_um is None:
            warnings.append("pixel size unknown: micrometre columns are empty")
        elif not info.is_series and info.voxel_nm is None:
            words = "voxel size unknown: nanometre columns are empty, and planes are taken to lie as far "
            words += "apart as pixels, which decides what is joined: --voxel-size Z,Y,X tells it"
            is_microscope = not isinstance(info.path, Path) or suffix_of(info.path) not in VOLUME_SUFFIXES
            hint = f"; {info.shape[0]} planes were taken for a volume: --series if they are time points, "
            hint += "--z takes one if they are channels"
            warnings.append(words + (hint if is_microscope else ""))
        elif not info.is_series and not info.is_depth_known:
            warnings.append(
                "the file does not tell how far apart its planes are: as far as pixels, it was assumed; "
                "--voxel-size Z,Y,X tells it"
            )
        return tuple(warnings)

    def _warn_of_noise(self) -> str:
        by_axis = self.agreement.by_axis
        words = (
            f"two axes agree on {self.agreement.n_agreed} objects where one alone finds "
            f"{max(by_axis.values())}: the volume has much noise, or the model does not fit it"
        )
        if not self.agreement.is_of_one:
            return words
        return f"{words}; these are the objects of planes across {next(iter(by_axis))} alone"


def size_warnings(
    model: ModelInput, volume: Volume, chosen: VolumeOptions, diameter_px: float | None
) -> list[str]:
    """Return what a user should know of the size given of the voxels, or measured of the objects."""
    if chosen.voxel_nm is not None and min(chosen.voxel_nm) < _TINY_NM and model.slab is None:
        return ["voxels smaller than any light microscope sees: --voxel-size without a unit is in nanometres"]
    has_pixel_size = volume.info.pixel_nm(chosen.first_axis) is not None
    if not is_size_measured(model, chosen.diameter_px, pixels=chosen.pixels, has_pixel_size=has_pixel_size):
        return []
    of_noise = None if diameter_px is None else warn_of_noise(diameter_px)
    return list(filter(None, (warn_of_size(model, diameter_px, has_pixel_size=has_pixel_size), of_noise)))
