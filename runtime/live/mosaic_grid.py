"""Where the fields of view of a mosaic lie, and what is there of its pixels."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.live.visits import CameraAxes, check_axes
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.base import PlaneReader
from darcnn.runtime.readers.protocol import Pixels, SlideInfo

__all__ = ["MosaicGrid", "MosaicReader"]

_log = logging.getLogger(__name__)

_FAR_PX = 8  # from where a field was planned; what lies on the border of two is cut or doubled by as much


@dataclass(frozen=True, slots=True)
class MosaicGrid:
    """Fields of view of one size on one picture; where they overlap the earlier in the list is seen."""

    positions_um: tuple[tuple[float, float], ...]  # of the stage, x y, at each field
    field_px: tuple[int, int]  # (H, W) of a field
    pixel_size_um: float
    corners_px: tuple[tuple[int, int], ...]  # x y of each field's first pixel on the mosaic
    _corners: NDArray[np.int64] = field(init=False, repr=False, compare=False)  # (N, 2), the same

    def __post_init__(self) -> None:
        """Make the array once: every tile of a mosaic asks for the fields that it lies on."""
        object.__setattr__(self, "_corners", np.array(self.corners_px, np.int64).reshape(-1, 2))

    @classmethod
    def from_stage(
        cls,
        positions_um: Sequence[tuple[float, float]],
        *,
        field_px: tuple[int, int],
        pixel_size_um: float,
        axes: CameraAxes | None = None,
    ) -> Self:
        """Return the grid of the fields seen from these positions of the stage.

        Args:
            positions_um: x y of any one point of each field, say its centre.
            field_px: (H, W).
            pixel_size_um: micrometres per pixel.
            axes: how the camera sits on the stage; None: its columns and rows run along x and y.
        Raises:
            UsageError: no positions, two at one place, or a number that does not serve.

        >>> MosaicGrid.from_stage([(0, 0), (90, 0)], field_px=(50, 100), pixel_size_um=1.0).corners_px
        ((0, 0), (90, 0))
        """
        try:
            stage = np.asarray(positions_um, np.float64)
            height, width = (operator.index(side) for side in field_px)
        except (TypeError, ValueError) as err:
            raise UsageError(
                f"no grid ({err})", where="grid", fix="give numbers, of pixels whole ones"
            ) from err
        if not len(stage):
            raise UsageError("no positions", where="grid", fix="give the stage positions of the fields")
        if stage.ndim != 2 or stage.shape[1] != 2:
            raise UsageError(
                f"positions of shape {stage.shape}", where="grid", fix="give x and y of each field"
            )
        if min(height, width) < 1 or not (math.isfinite(pixel_size_um) and pixel_size_um > 0):
            raise UsageError(
                f"fields of {height} x {width} px of {pixel_size_um} um",
                where="grid",
                fix="give sizes above 0",
            )
        places = check_axes(axes).to_picture(stage) / pixel_size_um  # (N, 2) px
        if not np.isfinite(places).all():
            raise UsageError("a position is not finite", where="grid", fix="give micrometres")
        corners = np.rint(places - places.min(axis=0)).astype(np.int64)
        if len(np.unique(corners, axis=0)) < len(corners):
            raise UsageError("two fields at one place", where="grid", fix="give each position once")
        return cls(
            positions_um=tuple((float(x), float(y)) for x, y in stage),
            field_px=(height, width),
            pixel_size_um=pixel_size_um,
            corners_px=tuple((int(x), int(y)) for x, y in corners),
        )

    def __len__(self) -> int:
        return len(self.corners_px)

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the mosaic, pixels."""
        x, y = np.max(self.corners_px, axis=0)
        return int(y) + self.field_px[0], int(x) + self.field_px[1]

    def region(self, index: int) -> Region:
        """Return where a field lies on the mosaic."""
        (x, y), (height, width) = self.corners_px[index], self.field_px
        return Region(x, y, x + width, y + height)

    def covering(self, region: Region) -> set[int]:
        """Return the fields that have a pixel in `region` of the mosaic."""
        height, width = self.field_px
        x, y = self._corners.T
        hits = (x < region.x1) & (x + width > region.x0) & (y < region.y1) & (y + height > region.y0)
        return set(np.flatnonzero(hits).tolist())

    def find(self, at_um: tuple[float, float]) -> int:
        """Return the field whose position is nearest to the stage's; a field is put where it was planned.

        Raises:
            UsageError: the nearest is more than a quarter of a field away.
        """
        away = np.hypot(*(np.asarray(self.positions_um) - np.asarray(at_um, np.float64)).T)
        index = int(np.argmin(away))
        if not away[index] <= min(self.field_px) * self.pixel_size_um / 4:
            raise UsageError(
                f"no field of the grid near {at_um[0]:g}, {at_um[1]:g} um",
                where="at_um",
                fix="push at the positions that the grid was made of",
            )
        if away[index] > _FAR_PX * self.pixel_size_um:
            _log.warning(
                "a field %.3g um beside its place in the grid is shown there: make the grid of where the "
                "stage stops",
                away[index],
            )
        return index


class MosaicReader(PlaneReader):
    """The pixels of a mosaic as far as fields are in; elsewhere 0."""

    def __init__(self, grid: MosaicGrid, first: NDArray[Any]) -> None:
        """Begin an empty mosaic of fields like `first`."""
        with ArrayReader(first, name="mosaic", mpp=grid.pixel_size_um) as like:
            info = like.info
        height, width = grid.shape
        super().__init__(
            SlideInfo(
                path=None,
                name="mosaic",
                levels=(Level(0, width, height, 1.0),),
                channel_names=info.channel_names,
                dtype=info.dtype,
                is_rgb=info.is_rgb,
                mpp=info.mpp,
                mpp_source=info.mpp_source,
            )
        )
        self._grid = grid
        self._stored = first.dtype
        self._fields: dict[int, ArrayReader] = {}

    def add(self, index: int, field: NDArray[Any]) -> None:
        """Put a field in its place.

        Raises:
            InputError: it is of another type, or has other channels, than the first.
        """
        reader = ArrayReader(field)
        if field.dtype != self._stored or reader.info.channel_names != self.info.channel_names:
            raise InputError(
                f"holds {field.dtype} in {len(reader.info.channel_names)} channels, the first field "
                f"{self._stored} in {len(self.info.channel_names)}",
                where="field",
                fix="push fields of one type",
            )
        self._fields[index] = reader

    def keep(self, indices: set[int]) -> None:
        """Let go of all other fields; nobody will look at them again."""
        for index in set(self._fields) - indices:
            del self._fields[index]

    @property
    def n_held(self) -> int:
        """How many fields are in memory."""
        return len(self._fields)

    def _read(self, region: Region, level: Level) -> Pixels:
        pixels = np.zeros((region.height, region.width, len(self.info.channel_names)), self.info.dtype)
        for index in sorted(self._fields, reverse=True):  # the earlier is drawn over the later
            place = self._grid.region(index)
            x0, x1 = max(place.x0, region.x0), min(place.x1, region.x1)
            y0, y1 = max(place.y0, region.y0), min(place.y1, region.y1)
            if x0 < x1 and y0 < y1:
                inside = Region(x0 - place.x0, y0 - place.y0, x1 - place.x0, y1 - place.y0)
                part = self._fields[index].read(inside, level=0)
                pixels[y0 - region.y0 : y1 - region.y0, x0 - region.x0 : x1 - region.x0] = part
        return pixels

    def _release(self) -> None:
        self._fields.clear()
