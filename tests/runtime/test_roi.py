"""`--roi`: a rectangle or what was drawn in QuPath, and one line where it is neither."""

import gzip
import hashlib
import json

import numpy as np
import pytest
import shapely

from darcnn.runtime.errors import UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.roi import read_roi

SQUARE = shapely.geometry.mapping(shapely.box(10, 20, 30, 40))
HOLED = shapely.geometry.mapping(shapely.box(0, 0, 9, 9).difference(shapely.box(3, 3, 6, 6)))
FOUND = {"type": "Polygon", "coordinates": [[[50, 50], [90, 50], [90, 90], [50, 50]]]}


def feature(geometry, kind="annotation"):
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind}}


def write(tmp_path, content, name="drawn.geojson"):
    path = tmp_path / name
    data = json.dumps(content).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def inside(roi, *points):
    x, y = np.array(points, float).T
    return roi.contains(x, y).tolist()


def test_a_rectangle_is_read():
    roi = read_roi("10,20, 30 , 40.5")
    assert inside(roi, (11, 21), (29, 40.2), (31, 21)) == [True, True, False]
    assert roi.record == {"rectangle": [10.0, 20.0, 30.0, 40.5]}
    assert roi.area_in(Region(0, 0, 20, 30)) == 100
    assert roi.touches(Region(0, 0, 11, 21))
    assert not roi.touches(Region(0, 0, 9, 9))


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [feature(SQUARE), feature(HOLED)]},
        [feature(SQUARE), feature(HOLED)],
        feature({"type": "GeometryCollection", "geometries": [SQUARE, HOLED]}),
        {"type": "MultiPolygon", "coordinates": [SQUARE["coordinates"], HOLED["coordinates"]]},
        [feature(SQUARE), feature(HOLED), feature({"type": "Point", "coordinates": [1, 1]})],
        [feature(SQUARE), feature(HOLED), *(feature(FOUND, kind) for kind in ("detection", "cell", "tile"))],
    ],
)
@pytest.mark.parametrize("name", ["drawn.geojson", "drawn.geojson.gz"])
def test_polygons_of_every_form_of_geojson_count_and_what_was_found_does_not(tmp_path, content, name):
    roi = read_roi(write(tmp_path, content, name))
    assert inside(roi, (11, 21), (1, 1), (4, 4), (80, 70)) == [True, True, False, False]
    assert roi.record == {
        "file": name,
        "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),
    }


def test_polygons_count_from_where_qupath_begins(tmp_path):
    roi = read_roi(write(tmp_path, SQUARE), origin_px0=(100, 200))
    assert inside(roi, (115, 225), (15, 25)) == [True, False]


def test_a_polygon_that_crosses_itself_is_mended(tmp_path):
    bow = {"type": "Polygon", "coordinates": [[[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]]]}
    assert inside(read_roi(write(tmp_path, bow)), (9, 5), (1, 5), (5, 1)) == [True, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no polygons"),
        ({"type": "Point", "coordinates": [0, 0]}, "holds no polygons"),
        ({"a": 1}, "is no GeoJSON"),
        (3, "is no GeoJSON"),
        (None, "is no GeoJSON"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1]]]}, "is no GeoJSON"),
        ({"type": "Polygon"}, "is no GeoJSON"),
        (
            {"type": "FeatureCollection", "features": [feature({"type": "Polygon", "coordinates": "x"})]},
            "is no GeoJSON",
        ),
    ],
)
def test_a_file_without_polygons_is_one_line(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        read_roi(write(tmp_path, content))


@pytest.mark.parametrize("text", ["1,2,3", "3,3,1,1", "0,0,1..2,4", "nowhere.geojson", "", "nan,0,1,1"])
def test_text_that_is_no_region_is_one_line(text):
    with pytest.raises(UsageError, match="--roi"):
        read_roi(text)


@pytest.mark.parametrize("content", [b"[" * 100_000, None])
def test_a_damaged_file_of_regions_is_one_line(tmp_path, content):
    path = tmp_path / "roi.geojson.gz"
    if content is None:
        text = json.dumps({"type": "FeatureCollection", "features": [], "x": list(range(999))})
        packed = bytearray(gzip.compress(text.encode()))
        packed[40:60] = bytes(20)
        content = bytes(packed)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no GeoJSON"):
        read_roi(str(path))
