"""Objects for QuPath: a gzipped GeoJSON FeatureCollection of detections."""

from __future__ import annotations

import gzip
import json
import math
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from darcnn.runtime.ahead import map_ahead
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.sinks.parquet import read_objects

__all__ = ["write_geojson"]

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "darcnn:object")  # fixed: ids must not change between versions
_COLOUR = (255, 200, 0)  # of the class in QuPath: seen on stained tissue and on black
_FEATURES = 2048  # so many features are handed to the compressor at once
_LEVEL = 5  # half the time of 6, and 1 % more bytes

# Column -> name in QuPath's table, with its unit; geometry and the place are in the feature itself.
_MEASUREMENTS = {
    "id": "ID",  # of the table, and the value in the label image
    "score": "Score",
    "area_px": "Area px^2",
    "area_um2": "Area \u00b5m^2",
    "perimeter_um": "Perimeter \u00b5m",
    "major_axis_um": "Major axis \u00b5m",
    "minor_axis_um": "Minor axis \u00b5m",
    "eccentricity": "Eccentricity",
    "solidity": "Solidity",
    "truncated": "Truncated",  # 0 or 1: QuPath reads numbers only
}
_INTENSITIES = {"mean_intensity_": "Mean", "std_intensity_": "Std.Dev."}


def write_geojson(
    path: Path,
    objects: Path,
    *,
    slide_name: str,
    class_name: str,
    colour: tuple[int, int, int] = _COLOUR,
    origin_px0: tuple[int, int] = (0, 0),
    plane: tuple[int, int] = (0, 0),
    stop: threading.Event | None = None,
) -> None:
    """Write the table `objects` (objects.parquet) as detections that QuPath 0.4 and later imports.

    Coordinates are level-0 pixels counted from `origin_px0` (`SlideInfo.origin_px0`: where QuPath begins),
    rounded to 1/100 where that leaves the outline valid. They lie on `plane` (z, t) of a stack or series. The
    `id` of a feature is a UUID made of the slide's name and the object's id, so the same run always writes
    the same bytes.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
        CancelledError: `stop` was set meanwhile; nothing is left behind.
    """
    fixed = {
        "objectType": "detection",
        "classification": {"name": class_name, "color": list(colour)},
    }
    opening = _dump(fixed)[:-1]  # the measurements follow inside the same braces
    z, t = plane  # where QuPath finds none it takes 0 and 0
    place = f',"plane":{{"c":-1,"z":{z},"t":{t}}}' if z or t else ""
    # no time and no file name in the header, so that equal content is equal bytes
    with (
        atomic_file(path) as file,
        gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=file, mtime=0) as out,
    ):
        out.write(b'{"type":"FeatureCollection","features":[')
        separator = b"\n"
        for _, features in map_ahead(
            lambda rows: _features(rows, slide_name, opening, origin_px0, place),
            _slices(objects),
            name="geojson",
        ):  # compressing one while the next is made
            if stop is not None and stop.is_set():
                raise CancelledError
            out.write(separator + features.encode("ascii"))
            separator = b",\n"
        out.write(b"\n]}\n")


def _slices(objects: Path) -> Iterator[pa.Table]:
    for part in read_objects(objects):
        for start in range(0, part.num_rows, _FEATURES):
            yield part.slice(start, _FEATURES)


def _features(rows: pa.Table, slide_name: str, opening: str, origin_px0: tuple[int, int], place: str) -> str:
    names = _measurement_names(rows.column_names)
    keys = [_dump(name) for name in names]
    values = [rows[name].to_pylist() for name in names.values()]
    measured = [_measurements(keys, row) for row in zip(*values, strict=True)]
    rings = _rings(rows, origin_px0)
    ids = [uuid.uuid5(_NAMESPACE, f"{slide_name}/{number}") for number in rows["id"].to_pylist()]
    return ",\n".join(
        f'{{"type":"Feature","id":"{identity}","geometry":{{"type":"Polygon","coordinates":[[[{ring}]]]{place}}},'
        f'"properties":{opening},"measurements":{measurements}}}}}'
        for identity, ring, measurements in zip(ids, rings, measured, strict=True)
    )


def _measurement_names(columns: Sequence[str]) -> dict[str, str]:
    """Return name in QuPath -> column, in the order of the columns."""
    names = {}
    for column in columns:
        if column in _MEASUREMENTS:
            names[_MEASUREMENTS[column]] = column
        for prefix, kind in _INTENSITIES.items():
            if column.startswith(prefix):
                names[f"{column.removeprefix(prefix)}: {kind}"] = column
    return names


def _measurements(keys: Sequence[str], values: Sequence[float | int | bool | None]) -> str:
    """Return a JSON object of numbers, `keys` in quotes; what is not known is left out."""
    known = (
        f"{key}:{value:.7g}" if isinstance(value, float) else f"{key}:{value:d}"
        for key, value in zip(keys, values, strict=True)
        if value is not None and math.isfinite(value)
    )
    return "{" + ",".join(known) + "}"


def _rings(rows: pa.Table, origin_px0: tuple[int, int]) -> list[str]:
    """Return "x,y],[x,y" of each outline; Arrow writes numbers ten times as fast as json."""
    rings = shapely.get_exterior_ring(shapely.from_wkb(rows["geometry"].to_numpy()))
    points, owner = shapely.get_coordinates(rings, return_index=True)
    points = points - origin_px0
    rounded = points.round(2)
    # where rounding closes a narrow neck, the outline would touch itself: it keeps its digits
    polygons = shapely.polygons(shapely.linearrings(rounded, indices=owner))
    closes = np.logical_not(shapely.is_valid(polygons))
    rounded[closes[owner]] = points[closes[owner]]
    x, y = (pc.cast(pa.array(np.ascontiguousarray(one)), pa.string()) for one in rounded.T)
    offsets = pa.array(np.searchsorted(owner, np.arange(len(rings) + 1)), pa.int32())
    pairs = pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise(x, y, ","))
    joined: list[str] = pc.binary_join(pairs, "],[").to_pylist()
    return joined


def _dump(content: Any) -> str:
    # plain ASCII: QuPath reads the file in the computer's own encoding
    return json.dumps(content, separators=(",", ":"), ensure_ascii=True)
