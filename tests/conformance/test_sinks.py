"""Every file that a run writes opens in the programs it is meant for and says what was found."""

import gzip
import json
import logging
import uuid
from dataclasses import replace

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader as OmeReader
from ome_zarr_models.v05.image_label import ImageLabel
from PIL import Image

from darcnn.runtime.errors import OutputError
from darcnn.runtime.geometry import Grid, Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import Window
from darcnn.runtime.masks import label_instances
from darcnn.runtime.measure import measure, object_schema
from darcnn.runtime.polygons import draw_polygon
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sinks.atomic import atomic_file, atomic_folder, translated
from darcnn.runtime.sinks.geojson import write_geojson
from darcnn.runtime.sinks.ome_zarr import write_label_pyramid
from darcnn.runtime.sinks.overview import write_overview
from darcnn.runtime.sinks.parquet import count_objects, read_objects, write_parquet

SHAPE = (1100, 1500)
MPP = (0.5, 0.5)
WHOLE = Window(0, 255)


def disk_labels(shape, n, seed=1):
    """Separate disks, numbered from 1 in the order in which they are drawn."""
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    while labels.max() < n:
        y, x, radius = generator.uniform((0, 0, 4), (*shape, 12))
        disk = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        around = (rows - y) ** 2 + (columns - x) ** 2 < (radius + 2) ** 2
        if disk.sum() > 20 and not labels[around].any():
            labels[disk] = labels.max() + 1
    return labels


def numbered(table, first=1):
    return table.set_column(0, "id", pa.array(np.arange(first, first + len(table)), pa.int64()))


def make_table(instances, mpp=MPP):
    height, width = instances.shape
    pixels = np.random.default_rng(3).integers(0, 999, (height, width, 1)).astype(np.uint16)
    return numbered(measure(instances, pixels, Region(0, 0, width, height), (1.0, 1.0), ["DAPI"], mpp))


def in_parts(table, rows=20):
    return [table.slice(start, rows) for start in range(0, len(table), rows)]


@pytest.fixture(scope="module")
def labels():
    return disk_labels(SHAPE, 70)


@pytest.fixture(scope="module")
def instances(labels):
    return label_instances(labels)


@pytest.fixture
def objects(instances, tmp_path):
    path = tmp_path / "objects.parquet"
    table = make_table(instances)
    assert write_parquet(path, in_parts(table), table.schema) == len(instances)
    return path


@pytest.fixture
def no_objects(tmp_path):
    path = tmp_path / "none.parquet"
    write_parquet(path, [], object_schema(["DAPI"]))
    return path


# --- parquet


def test_parquet_opens_with_geopandas_and_keeps_every_point(objects, instances):
    frame = geopandas.read_parquet(objects)
    assert frame.crs is None
    assert frame["id"].tolist() == list(range(1, len(instances) + 1))
    assert shapely.equals_exact(frame.geometry.to_numpy(), instances.polygons(), 0.0).all()


def test_parquet_says_that_it_is_geoparquet(objects, instances):
    geo = json.loads(pq.read_schema(objects).metadata[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    column = geo["columns"]["geometry"]
    assert (column["encoding"], column["geometry_types"], column["crs"]) == ("WKB", ["Polygon"], None)
    assert column["bbox"] == pytest.approx(shapely.total_bounds(instances.polygons()))


def test_parquet_is_read_one_row_group_at_a_time_and_only_where_asked(objects, instances):
    groups = list(read_objects(objects))
    assert [len(group) for group in groups] == [20, 20, 20, 10]
    assert count_objects(objects) == len(instances)
    near = list(read_objects(objects, ["id", "bbox_y0"], rows_px0=(0, 1)))
    assert len(near) < len(groups)
    assert near[0].column_names == ["id", "bbox_y0"]


def test_an_empty_parquet_has_all_columns(no_objects):
    frame = geopandas.read_parquet(no_objects)
    assert len(frame) == 0
    assert list(frame.columns) == object_schema(["DAPI"]).names


# --- geojson


def read_geojson(path):
    return json.loads(gzip.decompress(path.read_bytes()))


def test_geojson_is_what_qupath_imports_as_detections(objects, instances, tmp_path):
    path = tmp_path / "objects.geojson.gz"
    write_geojson(path, objects, slide_name="slide \u00e9", class_name="nuclei", colour=(1, 2, 3))
    content = read_geojson(path)
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == len(instances)
    table = pq.read_table(objects).to_pylist()
    for feature, row, polygon in zip(content["features"], table, instances.polygons(), strict=True):
        assert feature["type"] == "Feature"
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.geom_type == "Polygon"
        assert shapely.hausdorff_distance(shape, polygon) < 0.01
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": "nuclei", "color": [1, 2, 3]}
        measured = properties["measurements"]
        assert all(isinstance(value, (int, float)) and value is not True for value in measured.values())
        assert measured["Area \u00b5m^2"] == pytest.approx(row["area_um2"], rel=1e-6)
        assert measured["DAPI: Mean"] == pytest.approx(row["mean_intensity_DAPI"], rel=1e-6)
        assert measured["Truncated"] == 0
        assert measured["ID"] == row["id"]


def test_geojson_is_plain_ascii_and_each_id_a_uuid_of_its_own(objects, instances, tmp_path):
    path = tmp_path / "objects.geojson.gz"
    write_geojson(path, objects, slide_name="slide", class_name="nuclei \u00b5")
    gzip.decompress(path.read_bytes()).decode("ascii")
    ids = {uuid.UUID(feature["id"]) for feature in read_geojson(path)["features"]}
    assert len(ids) == len(instances)


def test_geojson_bytes_depend_on_the_slide_and_its_objects_only(objects, tmp_path):
    first, second, other = (tmp_path / name for name in ("a.gz", "b.gz", "c.gz"))
    write_geojson(first, objects, slide_name="slide", class_name="nuclei")
    write_geojson(second, objects, slide_name="slide", class_name="nuclei")
    write_geojson(other, objects, slide_name="another", class_name="nuclei")
    assert first.read_bytes() == second.read_bytes()
    assert {f["id"] for f in read_geojson(first)["features"]}.isdisjoint(
        f["id"] for f in read_geojson(other)["features"]
    )


def test_geojson_leaves_out_what_is_not_known(instances, tmp_path):
    table = make_table(instances, mpp=None)
    write_parquet(tmp_path / "o.parquet", [table], table.schema)
    write_geojson(tmp_path / "o.gz", tmp_path / "o.parquet", slide_name="s", class_name="c")
    measured = read_geojson(tmp_path / "o.gz")["features"][0]["properties"]["measurements"]
    assert not [name for name in measured if "\u00b5m" in name]
    assert "Area px^2" in measured


def test_geojson_stays_valid_where_rounding_would_close_a_neck(tmp_path):
    neck = np.array([[0, 0], [4, 0], [2.004, 2], [4, 4], [0, 4], [1.996, 2], [0, 0]], np.float64)
    labels = np.zeros((8, 8), np.int32)
    labels[0:4, 0:4] = 1
    table = make_table(replace(label_instances(labels), outlines=(neck,)))
    write_parquet(tmp_path / "o.parquet", [table], table.schema)
    write_geojson(tmp_path / "o.gz", tmp_path / "o.parquet", slide_name="s", class_name="c")
    (feature,) = read_geojson(tmp_path / "o.gz")["features"]
    drawn = shapely.Polygon(feature["geometry"]["coordinates"][0])
    assert not shapely.is_valid(shapely.Polygon(neck.round(2)))
    assert shapely.is_valid(drawn)
    assert shapely.equals_exact(drawn, shapely.Polygon(neck), 0.0)


def test_geojson_without_objects_is_an_empty_collection(no_objects, tmp_path):
    write_geojson(tmp_path / "o.gz", no_objects, slide_name="s", class_name="c")
    assert read_geojson(tmp_path / "o.gz") == {"type": "FeatureCollection", "features": []}


# --- label pyramid


def write_labels(tmp_path, objects, shape=SHAPE, mpp=MPP, **options):
    path = tmp_path / "labels.ome.zarr"
    grid = Grid.of_steps(None if mpp is None else mpp[::-1], "micrometer", n_axes=2)
    write_label_pyramid(path, objects, shape=shape, grid=grid, name="slide", **options)
    return path


@pytest.mark.parametrize("shard_px", [512, 2048])
def test_label_pyramid_is_the_label_image_of_the_instances(objects, labels, instances, tmp_path, shard_px):
    group = zarr.open_group(write_labels(tmp_path, objects, shard_px=shard_px), mode="r")
    assert np.array_equal(group["0"][:], instances.labels())
    assert np.array_equal(group["0"][:] > 0, labels > 0)
    assert group["0"].dtype == np.uint32


def test_each_level_is_every_second_pixel_of_the_one_before(objects, labels, tmp_path):
    group = zarr.open_group(write_labels(tmp_path, objects, shard_px=512), mode="r")
    assert sorted(group.array_keys()) == ["0", "1", "2"]
    for level in (1, 2):
        assert np.array_equal(group[str(level)][:], group["0"][:: 2**level, :: 2**level])
    assert max(group["2"].shape) <= 512 < max(group["1"].shape)


def test_label_pyramid_is_sharded_and_says_where_it_lies(objects, tmp_path):
    group = zarr.open_group(write_labels(tmp_path, objects, mpp=(0.5, 0.25)), mode="r")
    assert (group["0"].chunks, group["0"].shards) == ((512, 512), (1536, 1536))
    ome = group.attrs["ome"]
    assert ome["version"] == "0.5"
    assert [axis["unit"] for axis in ome["multiscales"][0]["axes"]] == ["micrometer", "micrometer"]
    scales = [d["coordinateTransformations"][0]["scale"] for d in ome["multiscales"][0]["datasets"]]
    assert scales == [[0.25, 0.5], [0.5, 1.0], [1.0, 2.0]]


def test_label_pyramid_opens_with_the_ome_zarr_reader(objects, instances, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    path = write_labels(tmp_path, objects)
    nodes = list(OmeReader(parse_url(str(path)))())
    assert len(nodes) == 1
    assert [level.shape for level in nodes[0].data] == [(1100, 1500), (550, 750), (275, 375)]
    assert np.array_equal(np.asarray(nodes[0].data[0]), instances.labels())
    assert not caplog.records


def test_label_pyramid_is_valid_by_the_published_models(objects, tmp_path):
    group = zarr.open_group(write_labels(tmp_path, objects, mpp=None), mode="r")
    assert ImageLabel.from_zarr(group).ome_attributes.version == "0.5"


def test_the_better_object_lies_on_top_and_of_equals_the_first(tmp_path):
    rings = [[(10, 10), (40, 10), (40, 40), (10, 40), (10, 10)] for _ in range(3)]
    rings[1] = [(x + 15, y) for x, y in rings[1]]
    rings[2] = [(x + 30, y) for x, y in rings[2]]
    arrays = tuple(np.array(ring, float) for ring in rings)
    found = Instances(
        (60, 90),
        np.array([[*ring.min(axis=0), *ring.max(axis=0)] for ring in arrays], np.float32),
        np.array([0.9, 0.6, 0.6], np.float32),
        np.array([ring.min(axis=0) for ring in arrays], np.int64),
        tuple(np.ones((30, 30), bool) for _ in arrays),
        arrays,
        np.zeros(3, bool),
    )
    table = make_table(found)
    write_parquet(tmp_path / "o.parquet", [table], table.schema)
    path = write_labels(tmp_path, tmp_path / "o.parquet", shape=(60, 90))
    row = zarr.open_group(path, mode="r")["0"][20]
    assert row[10:70].tolist() == [1] * 30 + [2] * 15 + [3] * 15


def test_objects_on_the_border_of_shards_and_of_the_slide_are_whole(tmp_path):
    ring = np.array([[500.2, 505.7], [700, 498], [660, 720.5], [510, 650], [500.2, 505.7]])
    over = ring + np.array([330.0, 0.0])  # leaves the slide to the right
    shape = (800, 900)
    mask = draw_polygon(ring, Region(0, 0, 900, 800))
    parts = [draw_polygon(r, Region(0, 0, 900, 800)) for r in (ring, over)]
    found = Instances(
        shape,
        np.zeros((2, 4), np.float32),
        np.ones(2, np.float32),
        np.zeros((2, 2), np.int64),
        tuple(parts),
        (ring, over),
        np.zeros(2, bool),
    )
    table = make_table(found)
    write_parquet(tmp_path / "o.parquet", [table], table.schema)
    drawn = zarr.open_group(write_labels(tmp_path, tmp_path / "o.parquet", shape=shape, shard_px=512))["0"][:]
    assert np.array_equal(drawn == 1, mask)
    assert np.array_equal(drawn == 2, parts[1])


def test_a_slide_without_objects_has_an_empty_pyramid(no_objects, tmp_path):
    group = zarr.open_group(write_labels(tmp_path, no_objects, shape=(300, 200)), mode="r")
    assert group["0"].shape == (300, 200)
    assert not group["0"][:].any()


# --- overview


def draw_overview(tmp_path, found, pixels, *, window=WHOLE, mpp=None, channels=1, **source):
    table = make_table(found, mpp=None)
    write_parquet(tmp_path / "o.parquet", [table], table.schema)
    with ArrayReader(pixels, **source) as reader:
        write_overview(
            tmp_path / "overview.png",
            tmp_path / "o.parquet",
            reader,
            window=window,
            channel=None,
            channels=channels,
            model_name="nuclei",
            mpp=mpp,
        )
    with Image.open(tmp_path / "overview.png") as picture:
        return np.asarray(picture)


def test_overview_draws_outlines_on_the_slide_through_the_window(tmp_path):
    labels = np.zeros((400, 500), np.int32)
    labels[100:200, 150:250] = 1
    pixels = np.full((400, 500), 1000, np.uint16)
    picture = draw_overview(tmp_path, label_instances(labels), pixels, window=Window(0, 4000))
    inside, edge, outside = picture[150, 200], picture[150, 149:152], picture[350, 400]
    assert inside.tolist() == outside.tolist() == [64, 64, 64]
    assert edge[:, 1].max() > 180  # yellow-green, shared by two pixels
    assert (picture[400:] == 255).any()
    assert (picture[400:] < 100).any()  # the legend


@pytest.mark.parametrize(
    ("ground", "is_green"), [((230, 150, 200), True), ((110, 110, 110), True), ((20, 170, 60), False)]
)
def test_outlines_on_colours_are_seen_whatever_the_ground(tmp_path, ground, is_green):
    labels = np.zeros((400, 500), np.int32)
    labels[100:200, 150:250] = 1
    pixels = np.full((400, 500, 3), ground, np.uint8)
    edge = draw_overview(tmp_path, label_instances(labels), pixels)[120:180, 148:153].reshape(-1, 3)
    assert np.linalg.norm(edge - np.array(ground, float), axis=1).max() > 90  # a line is shared by two pixels
    assert (edge.max(axis=0)[0] <= max(ground)) == is_green


def test_overview_shows_the_brightest_of_separate_channels(tmp_path):
    pixels = np.zeros((40, 50, 3), np.uint16)
    pixels[:20, :, 0], pixels[20:, :, 1], pixels[:, :, 2] = 1000, 10, 60_000  # the model sees two of them
    window = Window((0.0, 0.0), (4000.0, 10.0))
    picture = draw_overview(tmp_path, Instances.empty((40, 50)), pixels, window=window, channels=2)
    assert picture[5, 5].tolist() == [64, 64, 64]
    assert picture[30, 5].tolist() == [255, 255, 255]
    one_for_all = Window(0.0, 4000.0)  # as a user gives it
    picture = draw_overview(tmp_path, Instances.empty((40, 50)), pixels, window=one_for_all, channels=2)
    assert picture[5, 5].tolist() == [64, 64, 64]


def test_overview_is_at_most_2048_px_and_the_same_in_strips(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 255, (2500, 2100, 3)).astype(np.uint8)
    nothing = Instances.empty((2500, 2100))
    whole = draw_overview(tmp_path, nothing, pixels, mpp=(0.5, 0.5))
    assert whole.shape[1] == round(2100 * 2048 / 2500)
    assert 2048 < whole.shape[0] < 2148
    monkeypatch.setattr("darcnn.runtime.thumbnail._STRIP_BYTES", 1 << 17)
    strips = draw_overview(tmp_path, nothing, pixels, mpp=(0.5, 0.5))
    assert np.abs(whole.astype(int) - strips).max() <= 1


def test_overview_shows_tiny_objects_as_dots(tmp_path):
    labels = np.zeros((40, 8192), np.int32)  # 4 px of the slide are one of the picture
    labels[16:20, 4000:4004] = 1
    picture = draw_overview(tmp_path, label_instances(labels), np.zeros((40, 8192), np.uint8))
    lit = np.argwhere(picture[:10].max(axis=2) > 100)
    assert lit.tolist() == [[4, 1000]]


def test_overview_of_a_tiny_image_has_room_for_its_legend(tmp_path):
    pixels = np.zeros((20, 30), np.uint8)
    picture = draw_overview(tmp_path, Instances.empty((20, 30)), pixels, mpp=(0.1, 0.1))
    assert picture.shape[1] > 200
    assert picture[0, 0].tolist() == [0, 0, 0]


# --- atomic writing


@pytest.mark.parametrize("write", ["parquet", "geojson", "zarr"])
def test_a_failed_write_leaves_nothing(objects, tmp_path, monkeypatch, write):
    folder = tmp_path / "out"
    folder.mkdir()

    def fail():
        yield pq.read_table(objects)
        raise OSError(28, "No space left on device")

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("darcnn.runtime.sinks.ome_zarr.draw_polygons", refuse)
    monkeypatch.setattr("darcnn.runtime.sinks.geojson._rings", refuse)
    writers = {
        "parquet": lambda: write_parquet(folder / "o.parquet", fail(), pq.read_schema(objects)),
        "geojson": lambda: write_geojson(folder / "o.gz", objects, slide_name="s", class_name="c"),
        "zarr": lambda: write_labels(folder, objects),
    }
    with pytest.raises(OutputError, match="no space left"), translated(folder):
        writers[write]()
    assert list(folder.iterdir()) == []


def test_atomic_names_appear_only_when_complete(tmp_path):
    with atomic_file(tmp_path / "a") as file:
        file.write(b"x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"x"
    (tmp_path / ".b.tmp").mkdir()  # left by a run that was killed
    (tmp_path / ".b.tmp" / "old").touch()
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]


def test_a_file_in_place_of_a_folder_is_said(tmp_path):
    (tmp_path / "out").touch()
    with (
        pytest.raises(OutputError, match="stands where a folder is needed"),
        translated(tmp_path / "out"),
        atomic_file(tmp_path / "out" / "a"),
    ):
        pass
