"""What is counted and timed on the way through a slide, and what of it a user is warned of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from darcnn.runtime.fit import ModelFit, warn_of_none
from darcnn.runtime.geometry import Region
from darcnn.runtime.parts import TILE, FinalRow
from darcnn.runtime.stage_seconds import StageSeconds

__all__ = ["Tally"]

_MANY_TILES = 20
_FEW_OBJECTS = 0.1  # of the tiles hold any: of tissue one expects more


@dataclass(slots=True)
class Tally(StageSeconds):
    """Counts of the final objects of one slide, and the seconds of each stage."""

    fit: ModelFit
    n_tiles: int  # that are looked at
    n_tiles_skipped: int
    n_found: int = 0  # objects, before a filter
    n_objects: int = 0  # that are reported
    n_truncated: int = 0
    n_tiles_with_objects: int = 0
    n_tiles_saturated: int = 0
    unreadable: Mapping[int, Region] = field(default_factory=dict)  # damaged tiles, cores in level-0 pixels
    doubts: tuple[str, ...] = ()  # about the model and the objects' size, before any was found
    has_holes: bool = False  # damage where tissue, brightness or overview are seen

    def find(self, part: pa.Table) -> None:
        """Take all objects of a row of tiles: how the model fits does not depend on a filter."""
        self.n_found += part.num_rows
        self.n_tiles_with_objects += len(np.unique(part[TILE]))
        self.fit.add(*(part[name].to_numpy().astype(np.float64) for name in ("area_px", "score")))

    def count(self, row: FinalRow) -> None:
        """Take those of them that are reported."""
        self.n_objects += row.table.num_rows
        self.n_truncated += int(row.table["truncated"].to_numpy().sum())
        self.n_tiles_saturated += row.n_saturated

    def counts(self) -> dict[str, int]:
        """Return the counts that run.json holds."""
        return {
            "objects": self.n_objects,
            "filtered": self.n_found - self.n_objects,
            "truncated": self.n_truncated,
            "tiles": self.n_tiles,
            "tiles_skipped": self.n_tiles_skipped,
            "tiles_with_objects": self.n_tiles_with_objects,
            "tiles_saturated": self.n_tiles_saturated,
            "tiles_unreadable": len(self.unreadable),
        }

    def warnings(self, *, has_pixel_size: bool) -> tuple[str, ...]:
        """Return one line for each thing that a user should look at."""
        warnings = []
        if self.unreadable:
            first = self.unreadable[min(self.unreadable)]
            warnings.append(
                f"damaged tiles: {len(self.unreadable)} of {self.n_tiles}; nothing was found in them, "
                f"the first lies at x {first.x0} to {first.x1}, y {first.y0} to {first.y1}; "
                "copy the slide again and pass --overwrite"
            )
        elif self.has_holes:
            warnings.append(
                "the slide is damaged in a reduced level, or where no object was looked for; the overview "
                "shows no pixels there"
            )
        if not self.n_tiles:
            warnings.append("no tissue found where it was looked for; --no-tissue looks at everything")
        elif not self.n_objects:
            warnings.append(warn_of_none(self.n_found))
        elif self.n_tiles >= _MANY_TILES and self.n_tiles_with_objects < _FEW_OBJECTS * self.n_tiles:
            warnings.append(f"only {self.n_tiles_with_objects} of {self.n_tiles} tiles hold objects")
        if self.n_truncated:
            warnings.append(
                f"cut, for they reach beyond a tile twice as large: {self.n_truncated} of "
                f"{self.n_objects} objects"
            )
        if self.n_tiles_saturated:
            warnings.append(
                f"tiles that hold as many objects as the model can report: {self.n_tiles_saturated}; "
                "some objects may be missing there"
            )
        warnings.extend((*self.doubts, *self.fit.warnings()))
        if not has_pixel_size:
            warnings.append("pixel size unknown: micrometre columns are empty")
        return tuple(warnings)
