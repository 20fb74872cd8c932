"""Formats on request hold what the usual ones hold; a finished slide gets them without being done again."""

import csv
import gzip
import json
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import zarr
from filelock import FileLock

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import OutputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter

BOTH = RunOptions(also=("csv", "labels-tiff"))


@pytest.fixture(scope="module")
def segmenter():
    engine = OracleEngine(tile_px=256, mask_px=48)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter:
        yield segmenter


@pytest.fixture
def reader():
    labels = np.zeros((700, 1300), np.int32)
    for number, (y, x) in enumerate(((10, 10), (400, 700), (680, 1280)), start=1):
        labels[y : y + 18, x : x + 14] = number
    with ArrayReader(encode_labels(labels), name="a slide", mpp=0.5) as reader:
        yield reader


def check_extras(folder):
    table = pq.read_table(folder / "objects.parquet")
    with (folder / "objects.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [name for name in table.column_names if name != "geometry"]
    assert [int(line["id"]) for line in lines] == table["id"].to_pylist() == [1, 2, 3]
    assert [float(line["x"]) for line in lines] == table["x"].to_pylist()
    group = zarr.open_group(folder / "labels.ome.zarr", mode="r")
    with tifffile.TiffFile(folder / "labels.ome.tiff") as tiff:
        levels = tiff.series[0].levels
        assert tiff.is_ome
        assert [level.shape for level in levels] == [(700, 1300), (350, 650), (175, 325)]
        assert all(np.array_equal(level.asarray(), group[str(n)][:]) for n, level in enumerate(levels))
        assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata


def test_formats_on_request_hold_what_the_usual_ones_hold(segmenter, reader, tmp_path):
    check_extras(run_slide(segmenter, reader, tmp_path, options=BOTH).folder)


def test_a_finished_slide_gets_another_format_without_being_done_again(
    segmenter, reader, tmp_path, monkeypatch
):
    whole = run_slide(segmenter, reader, tmp_path / "at once", options=BOTH).folder
    folder = run_slide(segmenter, reader, tmp_path / "later").folder
    assert not (folder / "objects.csv").exists()
    monkeypatch.setattr(segmenter, "stream", lambda *_, **__: 1 / 0)
    with FileLock(folder / ".lock"), pytest.raises(OutputError, match="in use"):
        run_slide(segmenter, reader, tmp_path / "later", options=BOTH)
    assert run_slide(segmenter, reader, tmp_path / "later", options=BOTH).was_done
    check_extras(folder)
    for name in ("objects.csv", "labels.ome.tiff"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}


def test_overwriting_without_a_format_removes_its_earlier_file(segmenter, reader, tmp_path):
    folder = run_slide(segmenter, reader, tmp_path, options=BOTH).folder
    run_slide(segmenter, reader, tmp_path, options=RunOptions(overwrite=True))
    assert not (folder / "objects.csv").exists()
    assert (folder / "objects.parquet").exists()


def test_a_table_that_is_cut_off_is_one_line(segmenter, reader, tmp_path):
    path = run_slide(segmenter, reader, tmp_path).folder / "objects.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"objects\.parquet: is damaged; pass --overwrite"):
        run_slide(segmenter, reader, tmp_path, options=BOTH)


def test_an_unknown_format_is_refused_before_any_work(segmenter, reader, tmp_path):
    with pytest.raises(UsageError, match="choose from csv, labels-tiff"):
        run_slide(segmenter, reader, tmp_path / "out", options=RunOptions(also=("svg",)))
    assert not (tmp_path / "out").exists()


def test_outlines_for_qupath_lie_on_the_plane_that_was_chosen(segmenter, reader, tmp_path):
    planes = []
    for number, options in enumerate((RunOptions(), RunOptions(z=5), RunOptions(t=2))):
        folder = run_slide(segmenter, reader, tmp_path / str(number), options=options).folder
        content = json.loads(gzip.decompress((folder / "objects.geojson.gz").read_bytes()))
        planes.append([feature["geometry"].get("plane") for feature in content["features"]])
    assert all(planes)
    assert [found[0] for found in planes] == [None, {"c": -1, "z": 5, "t": 0}, {"c": -1, "z": 0, "t": 2}]
    assert all(len({repr(one) for one in found}) == 1 for found in planes)


def test_outlines_for_qupath_count_from_where_it_begins(segmenter, reader, tmp_path):
    def outlines(out):
        folder = run_slide(segmenter, reader, out).folder
        content = json.loads(gzip.decompress((folder / "objects.geojson.gz").read_bytes()))
        shapes = [shapely.geometry.shape(feature["geometry"]) for feature in content["features"]]
        record = json.loads((folder / "run.json").read_text())
        return np.array([shape.bounds for shape in shapes]), pq.read_table(folder / "objects.parquet"), record

    plain, table, record = outlines(tmp_path / "plain")
    assert record["input"]["origin_px"] == [0, 0]
    object.__setattr__(reader.info, "origin_px0", (300, 40))  # as a slide with openslide.bounds-x and -y
    moved, same_table, record = outlines(tmp_path / "moved")
    assert record["input"]["origin_px"] == [300, 40]
    assert np.allclose(plain - moved, [300, 40, 300, 40])
    assert table["geometry"] == same_table["geometry"]


def test_what_goes_wrong_at_the_labels_does_not_wait_for_the_picture_and_the_outlines(
    segmenter, reader, tmp_path, monkeypatch
):
    began, strips = threading.Event(), []

    def read_slowly(reader, size):
        for top in range(100):
            began.set()
            time.sleep(0.05)
            reader.read(Region(0, 0, 9, 9), level=0)
            strips.append(top)
        yield from ()

    def fail(*_, **__):
        assert began.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr("darcnn.runtime.sinks.overview.read_strips", read_slowly)
    batches = []

    def make_slowly(rows, *_):
        batches.append(rows.num_rows)
        time.sleep(0.5)
        return "{}"

    monkeypatch.setattr("darcnn.runtime.sinks.geojson._FEATURES", 1)
    monkeypatch.setattr("darcnn.runtime.sinks.geojson._features", make_slowly)
    monkeypatch.setattr("darcnn.runtime.outputs.write_label_pyramid", fail)
    with pytest.raises(KeyboardInterrupt):
        run_slide(segmenter, reader, tmp_path)
    assert len(strips) < 90
    assert len(batches) < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("darcnn-output")]
    monkeypatch.undo()
    assert run_slide(segmenter, reader, tmp_path).n_objects == 3  # goes on


def test_a_picture_that_cannot_be_drawn_is_told(segmenter, reader, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("darcnn.runtime.outputs.write_overview", fail)
    with pytest.raises(OutputError, match="no space left"):
        run_slide(segmenter, reader, tmp_path)
