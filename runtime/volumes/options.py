"""What a user may choose for a run on a volume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from darcnn.runtime.errors import UsageError
from darcnn.runtime.volumes.volume import AXES, Axis

__all__ = ["EXTRA_VOLUME_FORMATS", "AxisOption", "VolumeOptions", "parse_voxel_size"]

AxisOption = Literal["auto", "z", "y", "x", "all"]

EXTRA_VOLUME_FORMATS = ("csv", "ctc", "labels-mrc", "labels-tiff")  # written when asked for

_NM_PER_UNIT = {"nm": 1.0, "A": 0.1, "um": 1000.0}


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """What a user may choose."""

    # whose planes are looked at; all: what at least two agree on; auto: what serves the model and the volume
    axis: AxisOption = "auto"
    n_joined: int | None = None  # planes that a slab joins, odd; None: as the model's rule says
    voxel_nm: tuple[float, float, float] | None = None  # z y x, in place of what the file says
    diameter_px: float | Literal["auto"] | None = None  # of a typical object, voxels; auto: estimated
    pixels: bool = False  # take the voxels as they are, whatever their size
    t: int | None = None  # which time point of a series of volumes
    series: bool = False  # the planes are time points, whatever the file says
    project: bool = False  # of a series of stacks, the brightest of each: a series of pictures
    channel: int | str | None = None  # number or name
    # raw values that become black and white; None: the model's rule
    window: tuple[float, float] | None = None
    row_filter: str | None = None  # a condition on the measurements of the objects that are reported
    also: tuple[str, ...] = ()  # of EXTRA_VOLUME_FORMATS; may change without finding the objects again
    overwrite: bool = False  # replace a complete result
    restart: bool = False  # begin anew where an earlier try stopped

    @property
    def first_axis(self) -> Axis:
        """The axis that is looked along first."""
        return AXES[0] if self.axis == "auto" or self.axis == "all" else self.axis


def parse_voxel_size(text: str) -> tuple[float, float, float]:
    """Return nanometres per voxel along z, y, x of what a user wrote: a number or three, and a unit.

    Raises:
        UsageError: it is no size.

    >>> parse_voxel_size("1.35"), parse_voxel_size("13.5A"), parse_voxel_size("0.3,0.1,0.1um")
    ((1.35, 1.35, 1.35), (1.35, 1.35, 1.35), (300.0, 100.0, 100.0))
    """
    words = text.strip()
    unit = next((one for one in _NM_PER_UNIT if words.endswith(one)), "")
    try:
        sizes = [float(word) for word in words.removesuffix(unit).split(",")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 3) or not all(math.isfinite(one) and one > 0 for one in sizes):
        raise UsageError(
            f"{text!r} is no size",
            where="--voxel-size",
            fix="pass 1.35, 13.5A or Z,Y,X such as 0.3,0.1,0.1um",
        )
    z, y, x = (
        round(one * _NM_PER_UNIT.get(unit, 1.0), 9) for one in (sizes * 3 if len(sizes) == 1 else sizes)
    )
    return z, y, x
