"""The ground on which objects are looked for: the tissue of a slide, and the region that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.geometry import Region
from darcnn.runtime.manifest import ModelInput
from darcnn.runtime.planning import SlidePlan, to_level0
from darcnn.runtime.readers.mended import MendedReader
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.roi import Roi
from darcnn.runtime.tiling import SEAM_PX, Tile
from darcnn.runtime.tissue import TissueMask, find_tissue

__all__ = ["Ground", "survey_ground", "when_surveyed"]

_UM2_PER_MM2 = 1e6


@dataclass(frozen=True, slots=True)
class Ground:
    """Objects whose centroid lies on it are reported, and tiles that hold none of it are skipped."""

    tissue: TissueMask | None  # None: tissue was not asked for
    roi: Roi | None  # None: the whole slide
    tiles: tuple[Tile, ...]  # the tiles that are looked at
    area_px0: float  # of it, without the margin that the tissue is given
    has_holes: bool = False  # pixels were damaged where tissue was looked for

    def keep(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return which rows of a table of objects lie on the ground, (N,)."""
        x, y = (table[name].to_numpy() for name in ("x", "y"))
        kept = np.ones(table.num_rows, np.bool_)
        if self.tissue is not None:
            kept &= self.tissue.contains(x, y)
        if self.roi is not None:
            kept &= self.roi.contains(x, y)
        return kept

    def area_mm2(self, mpp: tuple[float, float] | None) -> float | None:
        """Return its area, None where the pixel size (x, y) is unknown."""
        return None if mpp is None else self.area_px0 * mpp[0] * mpp[1] / _UM2_PER_MM2

    def touches(self, region: Region) -> bool:
        """Tell whether a region, level-0 pixels, holds any of it."""
        on_tissue = self.tissue is None or self.tissue.touches(region)
        return on_tissue and (self.roi is None or self.roi.touches(region))

    def describe(self, mpp: tuple[float, float] | None) -> dict[str, Any]:
        """Return what run.json says of it."""
        return {
            "tissue_rule": None if self.tissue is None else self.tissue.rule,
            "area_px": round(self.area_px0),
            "area_mm2": self.area_mm2(mpp),
        }


def survey_ground(
    reader: Reader, plan: SlidePlan, model: ModelInput, *, tissue: bool, roi: Roi | None
) -> Ground:
    """Look where a slide has tissue, and return the ground of a run on it.

    What is damaged where tissue is looked for counts as tissue, so that it is not passed over in silence.

    Args:
        reader: the open slide; stays open.
        plan: of the slide.
        model: what the model sees.
        tissue: whether glass is left out.
        roi: the region asked for, None for all of it.
    Raises:
        InputError: the slide cannot be read.
    """
    info = reader.info
    mask = None
    mended = MendedReader(reader)
    if tissue:
        is_separate = not info.is_rgb or plan.channel is not None
        seen = tuple(range(min(model.channels, len(info.channel_names))))
        mask = find_tissue(
            mended,
            diameter_px0=model.nominal_diameter_px / plan.scale,
            channels=(seen if plan.channel is None else (plan.channel,)) if is_separate else None,
        ).including(mended.holes)
    reach = model.nominal_diameter_px + 2 * SEAM_PX  # a tile owns objects whose centroid lies beyond its core
    ground = Ground(mask, roi, (), _area(info, mask, roi), has_holes=bool(mended.holes))
    tiles = (tile for tile in plan.tiles if ground.touches(to_level0(tile.core, plan, info, reach_px=reach)))
    return replace(ground, tiles=tuple(tiles))


def when_surveyed(survey: Callable[[], Ground]) -> Callable[[Region], bool]:
    """Return what tells whether a region touches the ground, which is surveyed once somebody asks."""
    known = cache(survey)
    return lambda region: known().touches(region)


def _area(info: SlideInfo, mask: TissueMask | None, roi: Roi | None) -> float:
    whole = info.whole
    if roi is None:
        return float(whole.width * whole.height) if mask is None else mask.area_px0
    if mask is None:
        return roi.area_in(whole)
    height, width = mask.seen.shape
    row, column = np.nonzero(mask.seen)
    x = (column + 0.5) * info.width_px0 / width
    y = (row + 0.5) * info.height_px0 / height
    return float(roi.contains(x, y).sum() * (info.width_px0 / width) * (info.height_px0 / height))
