"""What Zeiss' LSM and MetaMorph's STK say of their planes, in tags of their own that tifffile reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from darcnn.runtime.readers.base import plausible_mpp, plausible_um
from darcnn.runtime.readers.tiff_metadata import UM, PixelSize

__all__ = ["MicroscopeTags", "read_microscope_tags"]

_UM_PER_M = 1e6
_S_PER_MS = 1e-3
_DIGITS = 9  # 2e-07 metres are 0.2 micrometres


@dataclass(frozen=True, slots=True)
class MicroscopeTags:
    """Sizes, distances and names; None where the file does not say."""

    pixel_size: PixelSize | None
    section_um: float | None
    frame_interval_s: float | None
    channel_names: tuple[str | None, ...] = ()


def read_microscope_tags(tiff: tifffile.TiffFile) -> MicroscopeTags | None:
    """Return what an open LSM or STK says, None of any other TIFF."""
    if tiff.lsm_metadata is not None:
        return _of_lsm(tiff.lsm_metadata)
    if tiff.stk_metadata is not None:
        return _of_stk(tiff.stk_metadata)
    return None


def _of_lsm(facts: Mapping[str, Any]) -> MicroscopeTags:
    x, y, z = (_micrometres(facts.get(f"VoxelSize{axis}"), _UM_PER_M) for axis in "XYZ")
    names = facts.get("ChannelColors", {}).get("ColorNames", ())
    planned_s = float(facts.get("TimeIntervall", 0.0))  # Zeiss' spelling
    interval = _mean_step(facts.get("TimeStamps")) or planned_s
    return MicroscopeTags(
        _pixel_size(x, y, "LSM voxel size"),
        plausible_um(z),
        interval if interval > 0 else None,
        tuple(name or None for name in names),
    )


def _of_stk(facts: Mapping[str, Any]) -> MicroscopeTags:
    """Return what is sure of an STK: in which unit its sections' distances are it does not say."""
    unit = UM.get(str(facts.get("CalibrationUnits", "")).strip().lower())
    x, y = (_micrometres(facts.get(f"{axis}Calibration"), unit) for axis in "XY")
    is_calibrated = bool(facts.get("SpatialCalibration", 0))
    step_ms = _mean_step(facts.get("TimeCreated"))
    return MicroscopeTags(
        _pixel_size(x, y, "STK calibration") if is_calibrated else None,
        None,
        step_ms * _S_PER_MS if step_ms > 0 else None,
    )


def _micrometres(value: Any, unit_um: float | None) -> float | None:
    if unit_um is None or not isinstance(value, (int, float)):
        return None
    return round(float(value) * unit_um, _DIGITS)


def _pixel_size(x: float | None, y: float | None, source: str) -> PixelSize | None:
    found = plausible_mpp(x, y)
    return None if found is None else PixelSize(found, source)


def _mean_step(moments: Any) -> float:
    """Return the mean time from one moment to the next, 0 where there are no two.

    >>> _mean_step([1.0, 3.0, 6.0]), _mean_step(None)
    (2.5, 0.0)
    """
    times = np.asarray([] if moments is None else moments, np.float64)
    return float((times[-1] - times[0]) / (len(times) - 1)) if len(times) > 1 else 0.0
