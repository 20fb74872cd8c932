"""What is known of each object: where it lies, how large, how round and how bright it is."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Level, Region, span_px0
from darcnn.runtime.instances import Instances
from darcnn.runtime.readers.protocol import Reader

__all__ = ["measure", "measure_on_slide", "name_columns", "object_schema"]

_BLOCK_PX = 4096  # side of what is read at once to measure brightness, pixels of the level

# A pixel is a square, not a point: its own second moment is 1/12 along each axis (as MATLAB's regionprops;
# scikit-image leaves it out, and there a single pixel has no axes).
_PIXEL_MOMENT = 1.0 / 12.0

_BOX_COLUMNS = ("bbox_x0", "bbox_y0", "bbox_x1", "bbox_y1")
_UM_COLUMNS = ("area_um2", "perimeter_um", "major_axis_um", "minor_axis_um")
_PX_COLUMNS = ("perimeter_px", "major_axis_px", "minor_axis_px")


def measure(
    instances: Instances,
    pixels: NDArray[Any],
    region: Region,
    factor: tuple[float, float],
    channel_names: Sequence[str],
    mpp: tuple[float, float] | None,
) -> pa.Table:
    """Return one row for each of the N `instances`, with the columns of `object_schema`.

    Shape comes from the mask at level 0: the axes are those of the ellipse with the mask's second moments,
    as in scikit-image's `regionprops` but for the pixels' own extent. Perimeter and solidity come from the
    outline. Brightness is sampled at the centres of the mask's pixels; those that
    lie outside `pixels` or are not finite are left out. `id` is null: it is given once all is known.

    Args:
        instances: objects, level-0 pixels.
        pixels: (H, W, C), raw values of `region`.
        region: where `pixels` lie, in pixels of their own level.
        factor: level-0 pixels per pixel of that level, along x and y.
        channel_names: C names.
        mpp: micrometres per level-0 pixel (x, y); None makes every um column null.
    Raises:
        ShapeError: `pixels` do not fit `region` or `channel_names`.

    >>> square = np.ones((4, 4), bool)
    >>> ring = np.array([[2, 1], [6, 1], [6, 5], [2, 5], [2, 1]], float)
    >>> one = Instances((8, 8), np.array([[2, 1, 6, 5]], "f4"), np.array([0.9], "f4"), np.array([[2, 1]]),
    ...                 (square,), (ring,), np.array([False]))
    >>> table = measure(one, np.full((8, 8, 1), 7), Region(0, 0, 8, 8), (1, 1), ["DAPI"], (0.5, 0.5))
    >>> row = table.to_pylist()[0]
    >>> [row[name] for name in ("x", "y", "area_px", "area_um2", "perimeter_um", "mean_intensity_DAPI")]
    [4.0, 3.0, 16, 4.0, 8.0, 7.0]
    """
    if pixels.shape != (region.height, region.width, len(channel_names)):
        raise ShapeError(f"pixels {pixels.shape} for {region} and {len(channel_names)} channels")
    ground = _spread(instances)
    polygons = instances.polygons()
    columns: dict[str, Any] = {
        "id": pa.nulls(len(instances), pa.int64()),
        "geometry": pa.array(shapely.to_wkb(polygons), pa.binary()),
        "score": instances.scores,
        "x": ground.mean_x + 0.5,  # a pixel's centre, not its corner
        "y": ground.mean_y + 0.5,
        **_boxes(ground),
        "area_px": ground.area.astype(np.int64),
        **_shapes(ground, polygons, mpp),
    }
    columns |= _brightness(ground, pixels, region, factor, name_columns(channel_names))
    columns["truncated"] = instances.truncated
    schema = object_schema(channel_names)
    arrays = [_column(columns[field.name], field.type, len(instances)) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def object_schema(channel_names: Sequence[str]) -> pa.Schema:
    """Return the columns of the table of objects, in their order."""
    fields = [
        pa.field("id", pa.int64()),
        pa.field("geometry", pa.binary()),
        pa.field("score", pa.float32()),
        pa.field("x", pa.float64()),
        pa.field("y", pa.float64()),
        *(pa.field(name, pa.int32()) for name in _BOX_COLUMNS),
        pa.field("area_px", pa.int64()),
        *(pa.field(name, pa.float32()) for name in _PX_COLUMNS),
        *(pa.field(name, pa.float32()) for name in _UM_COLUMNS),
        pa.field("eccentricity", pa.float32()),
        pa.field("solidity", pa.float32()),
    ]
    for name in name_columns(channel_names):
        fields += [pa.field(f"{kind}_intensity_{name}", pa.float32()) for kind in ("mean", "std")]
    return pa.schema([*fields, pa.field("truncated", pa.bool_())])


def measure_on_slide(
    instances: Instances, reader: Reader, level: Level, mpp: tuple[float, float] | None
) -> pa.Table:
    """Return what `measure` does, with the raw pixels of `level`, read a block at a time."""
    names = reader.info.channel_names
    if not len(instances):
        return object_schema(names).empty_table()
    span = span_px0(level, reader.info.levels[0])
    factor = (span[0] / level.width_px, span[1] / level.height_px)
    step = _BLOCK_PX * level.downsample
    cells = np.floor((instances.origins - instances.origins.min(axis=0)) / step).astype(np.int64)  # (N, 2)
    _, block = np.unique(cells, axis=0, return_inverse=True)
    block = block.reshape(-1)
    tables = []
    for number in range(int(block.max()) + 1):
        members = instances.select(block == number)
        region = _cover(members, level, factor)
        pixels = reader.read(region, level=level.index)
        tables.append(measure(members, pixels, region, factor, names, mpp))
    order = np.argsort(np.argsort(block, kind="stable"), kind="stable")  # back to the order found
    return pa.concat_tables(tables).take(order)


def _cover(instances: Instances, level: Level, factor: tuple[float, float]) -> Region:
    """Return the region of the level that holds all masks; at least one pixel."""
    low = np.floor(instances.origins.min(axis=0) / factor).astype(int)
    high = np.ceil(instances.ends.max(axis=0) / factor).astype(int)
    last = np.array([level.width_px, level.height_px]) - 1
    low = np.clip(low, 0, last)
    high = np.clip(high, low + 1, last + 1)
    return Region(int(low[0]), int(low[1]), int(high[0]), int(high[1]))


def name_columns(channel_names: Sequence[str]) -> tuple[str, ...]:
    """Return names fit for columns: letters, digits and underscores, each one once.

    >>> name_columns(["DAPI", "Alexa Fluor 488", "", "dapi", "Cy\u00e9 5"])
    ('DAPI', 'Alexa_Fluor_488', '2', 'dapi_2', 'Cye_5')
    """
    names: list[str] = []
    taken: set[str] = set()  # lower case: many programs ignore the case of a column
    for index, channel in enumerate(channel_names):
        plain = unicodedata.normalize("NFKD", channel).encode("ascii", "ignore").decode()
        stem = re.sub(r"[^0-9A-Za-z]+", "_", plain).strip("_") or str(index)
        name, times = stem, 1
        while name.lower() in taken:
            times += 1
            name = f"{stem}_{times}"
        taken.add(name.lower())
        names.append(name)
    return tuple(names)


@dataclass(frozen=True, slots=True)
class _Ground:
    """The P mask pixels of all N objects in one list, object by object, and their sums."""

    owner: NDArray[np.int64]  # (P,) row of the object
    x: NDArray[np.int64]  # (P,) level-0 columns
    y: NDArray[np.int64]  # (P,) level-0 rows
    area: NDArray[np.float64]  # (N,) pixels
    mean_x: NDArray[np.float64]  # (N,)
    mean_y: NDArray[np.float64]  # (N,)

    def mean(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Return the mean of `values` (P,) over each object; NaN for an object without pixels."""
        return _mean(self.owner, values, len(self.area))


def _mean(owner: NDArray[np.int64], values: NDArray[Any], n: int) -> NDArray[np.float64]:
    sums = np.bincount(owner, weights=values, minlength=n)
    counts = np.bincount(owner, minlength=n)
    means: NDArray[np.float64] = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
    return means


def _spread(instances: Instances) -> _Ground:
    n = len(instances)
    extents = instances.ends - instances.origins  # (N, 2) w h
    cells = np.flatnonzero(
        np.concatenate([mask.ravel() for mask in instances.masks] or [np.zeros(0, np.bool_)])
    )
    sizes = extents.prod(axis=1)
    stops = np.cumsum(sizes)
    owner = np.searchsorted(stops, cells, "right")
    row, column = np.divmod(cells - (stops - sizes)[owner], extents[owner, 0])
    x, y = column + instances.origins[owner, 0], row + instances.origins[owner, 1]
    area = np.bincount(owner, minlength=n).astype(np.float64)
    return _Ground(owner, x, y, area, mean_x=_mean(owner, x, n), mean_y=_mean(owner, y, n))


def _boxes(ground: _Ground) -> dict[str, NDArray[np.int32]]:
    """The extent of each mask, half-open; the detection's box may be larger or smaller."""
    boxes = np.zeros((len(ground.area), 4), np.int32)
    seen, starts = np.unique(ground.owner, return_index=True)
    if seen.size:
        low = [np.minimum.reduceat(places, starts) for places in (ground.x, ground.y)]
        high = [np.maximum.reduceat(places, starts) + 1 for places in (ground.x, ground.y)]
        boxes[seen] = np.stack([*low, *high], axis=1)
    return {name: boxes[:, side] for side, name in enumerate(_BOX_COLUMNS)}


def _shapes(
    ground: _Ground, polygons: NDArray[np.object_], mpp: tuple[float, float] | None
) -> dict[str, NDArray[np.float64] | None]:
    """Return the px and um columns, eccentricity and solidity; lengths in um where `mpp` is known."""
    dx, dy = ground.x - ground.mean_x[ground.owner], ground.y - ground.mean_y[ground.owner]
    xx, yy = (ground.mean(d * d) + _PIXEL_MOMENT for d in (dx, dy))
    xy = ground.mean(dx * dy)
    hull = shapely.area(shapely.convex_hull(polygons))
    solidity = np.divide(shapely.area(polygons), hull, out=np.full(len(hull), np.nan), where=hull > 0)
    longest, shortest = _axes(xx, yy, xy)
    columns: dict[str, NDArray[np.float64] | None] = {
        "perimeter_px": shapely.length(polygons),
        "major_axis_px": longest,
        "minor_axis_px": shortest,
        "solidity": np.minimum(solidity, 1.0),  # rounding alone can exceed it
        **dict.fromkeys(_UM_COLUMNS),
    }
    if mpp is not None:
        step_x, step_y = mpp
        points, owner = shapely.get_coordinates(polygons, return_index=True)
        rings: Any = shapely.linearrings(points * mpp, indices=owner)
        longest, shortest = _axes(xx * step_x**2, yy * step_y**2, xy * step_x * step_y)
        columns |= {
            "area_um2": ground.area * step_x * step_y,
            "perimeter_um": shapely.length(rings),
            "major_axis_um": longest,
            "minor_axis_um": shortest,
        }
    return {**columns, "eccentricity": np.sqrt(1.0 - (shortest / longest) ** 2)}


def _axes(
    xx: NDArray[np.float64], yy: NDArray[np.float64], xy: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the axes of the ellipses that have these second moments, the longer ones first."""
    middle, spread = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    return 4.0 * np.sqrt(middle + spread), 4.0 * np.sqrt(np.maximum(middle - spread, 0.0))


def _brightness(
    ground: _Ground,
    pixels: NDArray[Any],
    region: Region,
    factor: tuple[float, float],
    names: Sequence[str],
) -> dict[str, NDArray[np.float64]]:
    column = np.floor((ground.x + 0.5) / factor[0]).astype(np.int64) - region.x0
    row = np.floor((ground.y + 0.5) / factor[1]).astype(np.int64) - region.y0
    inside = (column >= 0) & (column < region.width) & (row >= 0) & (row < region.height)
    owner, cell = ground.owner[inside], row[inside] * region.width + column[inside]
    seen_pixels = pixels.reshape(-1, len(names))[cell]  # (P, C)
    columns = {}
    for index, name in enumerate(names):
        values, seen = seen_pixels[:, index].astype(np.float64), owner  # (P,)
        if pixels.dtype.kind == "f":
            is_finite = np.isfinite(values)
            values, seen = values[is_finite], owner[is_finite]
        mean = _mean(seen, values, len(ground.area))
        variance = _mean(seen, (values - mean[seen]) ** 2, len(ground.area))
        columns[f"mean_intensity_{name}"] = mean
        columns[f"std_intensity_{name}"] = np.sqrt(variance)
    return columns


def _column(values: Any, kind: pa.DataType, n: int) -> pa.Array:
    """Return an Arrow column; what could not be measured (None, NaN) is null."""
    if values is None:
        return pa.nulls(n, kind)
    if isinstance(values, pa.Array):
        return values
    return pa.array(values, kind, from_pandas=True) if pa.types.is_floating(kind) else pa.array(values, kind)
