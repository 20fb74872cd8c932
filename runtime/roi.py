"""`--roi`: the region of a slide that a user asks about, as a rectangle or as polygons of a GeoJSON file."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import UsageError
from darcnn.runtime.geometry import Region

__all__ = ["Roi", "read_roi"]

_NUMBER = r"\s*([-+]?[0-9.]+(?:e[-+]?[0-9]+)?)\s*"
_RECTANGLE = re.compile(",".join([_NUMBER] * 4), re.IGNORECASE)
# What is raised on damaged or other files: gzip, JSON (nested without an end) and shapely.
_NO_GEOJSON = (
    *(ValueError, TypeError, KeyError, AttributeError, EOFError, RecursionError),
    *(zlib.error, shapely.errors.ShapelyError),
)
_FIX = "give X0,Y0,X1,Y1 in pixels of the slide, or a GeoJSON file with polygons"
_FOUND_OBJECTS = ("detection", "cell", "tile")  # of QuPath: what was found, not where to look
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Roi:
    """One or more polygons, level-0 pixels."""

    shape: shapely.Geometry
    record: dict[str, Any]  # for run.json, and to tell one region from another

    def contains(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which points (N,), level-0 pixels, lie inside."""
        found: NDArray[np.bool_] = shapely.contains_xy(self.shape, x, y)
        return found

    def touches(self, region: Region) -> bool:
        """Tell whether any of `region`, level-0 pixels, lies inside."""
        return bool(shapely.intersects(self.shape, _box(region)))

    def area_in(self, region: Region) -> float:
        """Return how many of the pixels of `region` lie inside."""
        return float(shapely.area(shapely.intersection(self.shape, _box(region))))


def read_roi(text: str, *, origin_px0: tuple[int, int] = (0, 0)) -> Roi:
    """Return the region that a user asks for.

    Args:
        text: "X0,Y0,X1,Y1" in level-0 pixels, or the path of a GeoJSON file (it may be gzipped): a
            feature collection, a feature, a list of features or a geometry. Polygons count; points, lines
            and objects that QuPath found do not.
        origin_px0: where QuPath has its origin on this slide (`SlideInfo.origin_px0`); the polygons of a
            file count from there.
    Raises:
        UsageError: neither, empty, or the file cannot be read.

    >>> read_roi("0, 0, 10, 5").shape.area
    50.0
    """
    numbers = _RECTANGLE.fullmatch(text)
    if numbers is not None:
        x0, y0, x1, y1 = (_to_float(number) for number in numbers.groups())
        if not (x0 < x1 and y0 < y1):
            raise UsageError(f"{text} is empty", where="--roi", fix="give the upper left corner first")
        return Roi(shapely.box(x0, y0, x1, y1), {"rectangle": [x0, y0, x1, y1]})
    path = Path(text)
    try:
        content = path.read_bytes()
        packed = gzip.decompress(content) if content.startswith(_GZIP) else content
        geometries = list(_polygons(json.loads(packed)))
    except OSError as err:
        raise UsageError(f"cannot read {text} ({err.strerror or err})", where="--roi", fix=_FIX) from err
    except _NO_GEOJSON as err:
        raise UsageError(f"{text} is no GeoJSON", where="--roi", fix=_FIX) from err
    if not geometries:
        raise UsageError(f"{text} holds no polygons", where="--roi", fix=_FIX)
    joined = shapely.union_all(shapely.make_valid(np.array(geometries)))
    placed = shapely.transform(joined, lambda points: points + origin_px0)
    shapely.prepare(placed)
    return Roi(placed, {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()})


def _box(region: Region) -> shapely.Geometry:
    return shapely.box(region.x0, region.y0, region.x1, region.y1)


def _to_float(number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{number} is no number", where="--roi", fix=_FIX)
    return value


def _polygons(content: Any) -> Iterator[shapely.Geometry]:
    """Yield the polygons of GeoJSON, at any depth.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is none.
    """
    if isinstance(content, list):
        for member in content:
            yield from _polygons(member)
    elif content["type"] == "FeatureCollection":
        yield from _polygons(content["features"])
    elif content["type"] == "GeometryCollection":
        yield from _polygons(content["geometries"])
    elif content["type"] == "Feature":
        if (content.get("properties") or {}).get("objectType") not in _FOUND_OBJECTS and content["geometry"]:
            yield from _polygons(content["geometry"])
    elif content["type"] in ("Polygon", "MultiPolygon"):
        yield shapely.from_geojson(json.dumps(content))
