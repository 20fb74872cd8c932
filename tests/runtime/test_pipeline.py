"""From a slide to its folder: what is written is what was found, and failures leave nothing behind."""

import errno
import gzip
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from filelock import FileLock
from PIL import Image

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import InputError, OutputError, UsageError
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.record import fingerprint, fingerprint_file, fingerprint_pixels
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.result_folder import claim_folder
from darcnn.runtime.tiling import SEAM_PX

NAMES = {"objects.parquet", "objects.geojson.gz", "labels.ome.zarr", "overview.png", "run.json"}


def disk_labels(shape, n, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    while labels.max() < n:
        y, x, radius = generator.uniform((0, 0, 3), (*shape, 9))
        disk = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        around = (rows - y) ** 2 + (columns - x) ** 2 < (radius + 2) ** 2
        if disk.sum() > 12 and not labels[around].any():
            labels[disk] = labels.max() + 1
    return labels


@pytest.fixture(scope="module")
def labels():
    return disk_labels((230, 310), 60)


@pytest.fixture(scope="module")
def segmenter():
    engine = OracleEngine(tile_px=128, batch=2, mask_px=48)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter:
        yield segmenter


@pytest.fixture
def reader(labels):
    with ArrayReader(encode_labels(labels), name="slide 1", mpp=0.5) as reader:
        yield reader


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_a_run_writes_what_the_segmenter_finds(segmenter, reader, labels, tmp_path):
    summary = run_slide(segmenter, reader, tmp_path / "out")
    assert summary.folder == tmp_path / "out" / "slide 1"
    assert {path.name for path in summary.folder.iterdir()} == NAMES
    found = segmenter(reader)
    drawn = zarr.open_group(summary.folder / "labels.ome.zarr", mode="r")["0"][:]
    assert np.array_equal(drawn, found.labels())
    assert np.array_equal(drawn > 0, labels > 0)
    frame = geopandas.read_parquet(summary.folder / "objects.parquet")
    assert frame["id"].tolist() == list(range(1, len(found) + 1))
    assert frame["area_px"].tolist() == [int(mask.sum()) for mask in found.masks]
    assert summary.n_objects == len(found) == labels.max()
    features = json.loads(gzip.decompress((summary.folder / "objects.geojson.gz").read_bytes()))["features"]
    assert len(features) == len(found)


def test_what_a_reader_doubts_is_a_warning(segmenter, labels, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(encode_labels(labels), photometric="rgb", metadata=None)
        file.write(np.zeros((20, 30), np.uint8), metadata=None)
    with open_source(tmp_path / "a.tif") as reader:
        summary = run_slide(segmenter, reader, tmp_path)
    assert summary.warnings[0].endswith("left out (30 x 20 px)")


def test_brightness_is_that_of_the_raw_pixels_of_every_object(segmenter, reader, labels, tmp_path):
    folder = run_slide(segmenter, reader, tmp_path).folder
    frame = geopandas.read_parquet(folder / "objects.parquet")
    drawn = zarr.open_group(folder / "labels.ome.zarr", mode="r")["0"][:]
    for number, red in zip(frame["id"], frame["mean_intensity_red"], strict=True):
        assert red == np.unique(labels[drawn == number] % 256).item()
    assert (frame["std_intensity_red"] == 0).all()


def test_objects_are_numbered_along_the_lattice(segmenter, reader, tmp_path):
    folder = run_slide(segmenter, reader, tmp_path).folder
    frame = geopandas.read_parquet(folder / "objects.parquet")
    rows = [32 + 64, 32 + 2 * 64]  # where cores end, but for the last: 230 px, tiles of 128 with a halo of 32
    columns = [*rows, 32 + 3 * 64]  # of 310 px
    cells = [
        (np.digitize(y, rows), np.digitize(x, columns))
        for y, x in zip(*((frame[f"bbox_{a}0"] + frame[f"bbox_{a}1"]) / 2 for a in "yx"), strict=True)
        # an object on a seam may come with either tile
        if min(abs(y - np.array(rows)).min(), abs(x - np.array(columns)).min()) > SEAM_PX + 1
    ]
    assert len(cells) > 40
    assert cells == sorted(cells)


def test_a_run_is_the_same_twice(segmenter, reader, tmp_path):
    first, second = (contents(run_slide(segmenter, reader, tmp_path / name).folder) for name in "ab")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] in ([], ["run.json"])


def test_run_json_says_what_was_done(segmenter, reader, tmp_path):
    summary = run_slide(segmenter, reader, tmp_path, options=RunOptions(mpp=0.25))
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["model"]["name"] == "oracle"
    assert len(record["model"]["manifest_sha256"]) == 64
    assert record["engine"] == "oracle"
    assert record["options"]["mpp"] == 0.25
    assert (record["input"]["width_px"], record["input"]["mpp"]) == (310, 0.25)
    assert record["input"]["mpp_source"] == "--mpp"
    assert record["counts"]["objects"] == summary.n_objects == 60
    assert record["counts"]["tiles"] == 12
    assert {"detect", "measure", "table", "geojson", "labels", "overview"} <= record["seconds"].keys()
    assert {"darcnn", "python", "numpy", "zarr"} <= record["versions"].keys()


def test_the_overview_shows_the_slide_and_a_legend(segmenter, reader, tmp_path):
    with Image.open(run_slide(segmenter, reader, tmp_path).overview) as picture:
        assert picture.mode == "RGB"
        assert picture.width >= 310
        assert 230 < picture.height < 300


def test_micrometres_are_null_without_a_pixel_size(segmenter, labels, tmp_path):
    with ArrayReader(encode_labels(labels), name="x") as reader:
        summary = run_slide(segmenter, reader, tmp_path, options=RunOptions(pixels=True))
    frame = geopandas.read_parquet(summary.folder / "objects.parquet")
    assert frame["area_um2"].isna().all()
    assert not frame["eccentricity"].isna().any()
    assert "pixel size unknown: micrometre columns are empty" in summary.warnings


def test_a_slide_without_objects_is_a_complete_result(segmenter, tmp_path):
    with ArrayReader(np.zeros((290, 280, 3), np.uint8), name="empty") as reader:
        for options, warning in ((RunOptions(), "no tissue"), (RunOptions(tissue=False), "no objects found")):
            summary = run_slide(segmenter, reader, tmp_path / warning, options=options)
            assert {path.name for path in summary.folder.iterdir()} == NAMES
            assert summary.n_objects == 0
            assert warning in summary.warnings[0]


def test_a_channel_goes_by_its_name(tmp_path):
    labels = disk_labels((100, 120), 5)
    engine = OracleEngine(tile_px=128, channels=1)
    pixels = np.stack([np.zeros_like(labels), labels], axis=2).astype(np.uint8)
    names = ["actin", "DAPI"]
    with (
        Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter,
        ArrayReader(pixels, channel_names=names, mpp=1.0) as reader,
    ):
        summary = run_slide(segmenter, reader, tmp_path, options=RunOptions(channel="DAPI"))
        assert summary.n_objects == 5
        assert "mean_intensity_actin" in geopandas.read_parquet(summary.folder / "objects.parquet")
        with pytest.raises(UsageError, match="0 actin, 1 DAPI"):
            run_slide(segmenter, reader, tmp_path, options=RunOptions(channel="GFP"))


@pytest.mark.parametrize(("channels", "in_file"), [(2, 2), (2, 3), (4, 4)])
def test_a_model_of_several_channels_sees_the_first_of_the_file(channels, in_file, tmp_path):
    labels = disk_labels((100, 120), 5)
    engine = OracleEngine(tile_px=128, channels=channels)
    pixels = encode_labels(labels, channels=channels)
    pixels = np.concatenate([pixels, np.full((100, 120, in_file - channels), 7, np.uint8)], axis=2)
    with (
        Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter,
        ArrayReader(pixels, mpp=1.0, is_rgb=False) as reader,
    ):
        summary = run_slide(segmenter, reader, tmp_path)
    assert summary.n_objects == 5
    found = geopandas.read_parquet(summary.folder / "objects.parquet")
    assert [name for name in found if name.startswith("mean_intensity")] == [
        f"mean_intensity_channel_{index}" for index in range(in_file)
    ]
    with Image.open(summary.overview) as picture:
        assert picture.mode == "RGB"


def test_progress_counts_every_tile(segmenter, reader, tmp_path):
    calls, found, pixels = [], [], []

    def progress(done, total, *, n_objects, megapixels):
        calls.append((done, total))
        found.append(n_objects)
        pixels.append(megapixels)

    summary = run_slide(segmenter, reader, tmp_path, progress=progress)
    assert calls == [(n, 12) for n in range(1, 13)]
    assert found == sorted(found)
    assert found[-1] >= summary.n_objects
    assert pixels[-1] == pytest.approx(230 * 310 / 1e6)


@pytest.mark.parametrize(("n_objects", "n_saturated"), [(4, 2), (3, 0)])  # two tiles show them
def test_a_tile_with_as_many_objects_as_there_are_slots_is_warned_of(tmp_path, n_objects, n_saturated):
    engine = OracleEngine(tile_px=128, detections=4)
    labels = np.zeros((320, 320), np.int32)
    for number in range(n_objects):
        labels[150:160, 130 + 15 * number : 140 + 15 * number] = number + 1
    with (
        Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter,
        ArrayReader(encode_labels(labels)) as reader,
    ):
        summary = run_slide(segmenter, reader, tmp_path)
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["counts"]["tiles_saturated"] == n_saturated
    assert any("may be missing" in warning for warning in summary.warnings) == bool(n_saturated)


# --- the folder


def test_a_finished_slide_is_not_done_again(segmenter, reader, tmp_path, monkeypatch):
    first = run_slide(segmenter, reader, tmp_path)
    before = contents(first.folder)
    monkeypatch.setattr(segmenter, "stream", stream_that_must_not(segmenter, False))
    again = run_slide(segmenter, reader, tmp_path)
    assert (again.was_done, again.n_objects) == (True, first.n_objects)
    assert contents(first.folder) == before


def test_another_image_of_the_same_name_is_not_done_before(segmenter, labels, tmp_path):
    def run(pixels, **options):
        with ArrayReader(pixels, name="same") as reader:
            return run_slide(segmenter, reader, tmp_path, options=RunOptions(**options))

    pixels = encode_labels(labels)
    run(pixels)
    assert run(pixels).was_done
    changed = pixels.copy()
    changed[0, 0] = 0 if changed[0, 0].any() else 1
    with pytest.raises(OutputError, match="--overwrite"):
        run(changed)


def test_a_complete_folder_is_refused_and_overwritten_when_asked(segmenter, reader, tmp_path):
    folder = run_slide(segmenter, reader, tmp_path).folder
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(OutputError, match="--overwrite"):
        run_slide(segmenter, reader, tmp_path, options=RunOptions(mpp=0.3))  # another question
    assert contents(folder) == before
    (folder / "overview.png").write_bytes(b"old")
    run_slide(segmenter, reader, tmp_path, options=RunOptions(overwrite=True))
    assert {path.name for path in folder.iterdir()} == NAMES | {"notes.txt"}
    assert (folder / "overview.png").read_bytes() == before["overview.png"]


def test_a_file_in_place_of_the_folder_is_an_output_error(segmenter, reader, tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(OutputError, match="stands where a folder is needed"):
        run_slide(segmenter, reader, tmp_path / "out")
    (tmp_path / "slide 1").touch()
    with pytest.raises(OutputError, match="stands where a folder is needed"):
        run_slide(segmenter, reader, tmp_path)


def test_a_folder_with_other_files_is_left_alone(segmenter, reader, tmp_path):
    (tmp_path / "slide 1").mkdir()
    (tmp_path / "slide 1" / "scan.dat").write_text("mine")
    with pytest.raises(OutputError, match=r"no results, such as scan\.dat"):
        run_slide(segmenter, reader, tmp_path)
    assert contents(tmp_path) == {"slide 1/scan.dat": b"mine"}


def test_parts_without_a_journal_are_cleaned_up(segmenter, reader, tmp_path):
    folder = tmp_path / "slide 1"
    (folder / ".parts" / "built").mkdir(parents=True)
    (folder / ".parts" / "row-00000.parquet").write_bytes(b"half")
    (folder / "objects.parquet").write_bytes(b"half")
    (folder / ".lock").touch()
    run_slide(segmenter, reader, tmp_path)
    assert {path.name for path in folder.iterdir()} == NAMES


def test_a_folder_in_use_is_refused(segmenter, reader, tmp_path):
    folder = tmp_path / "slide 1"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(OutputError, match="in use"):
        run_slide(segmenter, reader, tmp_path)
    run_slide(segmenter, reader, tmp_path)


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_one_line_and_left_as_it_was(
    segmenter, reader, tmp_path, monkeypatch, reason, recwarn
):
    fcntl = pytest.importorskip("fcntl", reason="other systems lock in another way")

    def refuse(*_):
        raise OSError(reason, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OutputError, match="is on a disk without locks"):
        run_slide(segmenter, reader, tmp_path)
    assert not list(tmp_path.iterdir())
    assert not list(recwarn)


def test_a_folder_in_use_by_a_thread_is_refused(tmp_path):
    claimed, done = threading.Event(), threading.Event()

    def hold():
        with claim_folder(tmp_path / "a", overwrite=False):
            claimed.set()
            done.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert claimed.wait(10)
    with pytest.raises(OutputError, match="in use"), claim_folder(tmp_path / "a", overwrite=True):
        pass
    done.set()
    thread.join(10)
    assert not (tmp_path / "a").exists()


STEPS = {
    "find": "darcnn.runtime.rows._measure_tile",
    "parts": "darcnn.runtime.parts.pq.write_table",
    "table": "darcnn.runtime.outputs.write_parquet",
    "geojson": "darcnn.runtime.outputs.write_geojson",
    "labels": "darcnn.runtime.sinks.ome_zarr._put",
    "overview": "darcnn.runtime.outputs.write_overview",
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_failure_leaves_finished_rows_only_and_keeps_an_earlier_result(
    segmenter, reader, tmp_path, monkeypatch, step, failure
):
    def fail(*_, **__):
        raise failure

    folder = run_slide(segmenter, reader, tmp_path / "kept").folder
    before = contents(folder)
    expected = OutputError if isinstance(failure, OSError) and step != "find" else type(failure)
    monkeypatch.setattr(STEPS[step], fail)
    with pytest.raises(expected):
        run_slide(segmenter, reader, tmp_path / "new")
    left = contents(tmp_path / "new")
    if step in ("find", "parts"):
        assert list((tmp_path / "new").iterdir()) == []
    else:  # all rows were done, and will not be done again
        assert {name.split("/")[1] for name in left} == {".parts"}
    options = RunOptions(overwrite=True)
    with pytest.raises(expected):
        run_slide(segmenter, reader, tmp_path / "kept", options=options)
    assert results(folder) == before
    monkeypatch.undo()
    monkeypatch.setattr(segmenter, "stream", stream_that_must_not(segmenter, step in ("find", "parts")))
    run_slide(segmenter, reader, tmp_path / "new")
    run_slide(segmenter, reader, tmp_path / "kept", options=options)
    for name in ("objects.parquet", "objects.geojson.gz", "overview.png"):
        assert (tmp_path / "new" / "slide 1" / name).read_bytes() == before[name]
    assert {path.name for path in folder.iterdir()} == NAMES


def results(folder):
    """Return the contents of a folder without the parts of a run that goes on."""
    return {name: data for name, data in contents(folder).items() if not name.startswith(".parts")}


def stream_that_must_not(segmenter, may_run):
    original = segmenter.stream

    def stream(*arguments, **options):
        assert may_run, "a finished row was done again"
        return original(*arguments, **options)

    return stream


def test_a_filter_leaves_out_objects_and_their_numbers(segmenter, reader, tmp_path):
    everything = pq.read_table(run_slide(segmenter, reader, tmp_path / "all").folder / "objects.parquet")
    limit = int(np.median(everything["area_px"].to_numpy()))
    options = RunOptions(row_filter=f"area_px > {limit}")
    summary = run_slide(segmenter, reader, tmp_path / "some", options=options)
    some = pq.read_table(summary.folder / "objects.parquet")
    assert 0 < some.num_rows == summary.n_objects < everything.num_rows
    assert some["area_px"].to_pylist() == [a for a in everything["area_px"].to_pylist() if a > limit]
    assert some["id"].to_pylist() == list(range(1, some.num_rows + 1))
    with pytest.raises(OutputError, match="--overwrite"):
        run_slide(segmenter, reader, tmp_path / "some")  # without the filter it is another result
    with pytest.raises(UsageError, match="no column colour"):
        run_slide(segmenter, reader, tmp_path / "new", options=RunOptions(row_filter="colour > 3"))
    assert not (tmp_path / "new").exists()


def test_a_filter_changes_nothing_of_what_is_said_of_the_model(segmenter, tmp_path):
    labels = np.zeros((600, 600), np.int32)  # 29 objects as large as the model expects, and one far larger
    for number, (row, column) in enumerate(np.ndindex(5, 6)):
        side = 90 if not number else 28
        labels[100 * row + 5 : 100 * row + 5 + side, 100 * column + 5 : 100 * column + 5 + side] = number + 1
    with ArrayReader(encode_labels(labels), name="a", mpp=0.5) as reader:
        runs = {
            limit: run_slide(
                segmenter, reader, tmp_path / str(limit), options=RunOptions(row_filter=f"area_px > {limit}")
            )
            for limit in (0, 1000, 10000)
        }
    assert {limit: run.n_objects for limit, run in runs.items()} == {0: 30, 1000: 1, 10000: 0}
    assert runs[0].warnings == runs[1000].warnings
    assert runs[10000].warnings == ("--filter leaves out every object that was found (30)", *runs[0].warnings)
    counts = [json.loads((run.folder / "run.json").read_text())["counts"] for run in runs.values()]
    assert [one["filtered"] for one in counts] == [0, 29, 30]
    assert len({one["tiles_with_objects"] for one in counts}) == 1


def test_another_question_does_not_go_on_with_the_parts_of_the_first(
    segmenter, reader, tmp_path, monkeypatch
):
    monkeypatch.setattr("darcnn.runtime.outputs.write_overview", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_slide(segmenter, reader, tmp_path)
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"begun with another options; pass --restart"):
        run_slide(segmenter, reader, tmp_path, options=RunOptions(mpp=0.3))
    run_slide(segmenter, reader, tmp_path, options=RunOptions(mpp=0.3, restart=True))
    assert {path.name for path in (tmp_path / "slide 1").iterdir()} == NAMES


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_a_part_that_is_cut_off_is_done_again(segmenter, reader, tmp_path, monkeypatch, kept):
    before = contents(run_slide(segmenter, reader, tmp_path / "whole").folder)
    monkeypatch.setattr("darcnn.runtime.outputs.write_overview", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_slide(segmenter, reader, tmp_path)
    monkeypatch.undo()
    part = tmp_path / "slide 1" / ".parts" / "row-00001.parquet"
    part.write_bytes(part.read_bytes()[: int(kept * part.stat().st_size)])
    rows, original = [], segmenter.stream

    def stream(*arguments, **options):
        rows.append(options["tiles"][0].core.y0)
        return original(*arguments, **options)

    monkeypatch.setattr(segmenter, "stream", stream)
    after = contents(run_slide(segmenter, reader, tmp_path).folder)
    assert len(rows) == 1
    assert after["objects.parquet"] == before["objects.parquet"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse some of these names")
@pytest.mark.parametrize("name", ["~", "run:1", "s3:", "a%20b"])
def test_the_name_of_the_folder_is_taken_as_it_is(segmenter, reader, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = run_slide(segmenter, reader, Path(name, "x"), options=RunOptions(also=("csv",))).folder
    assert folder == Path(name, "x", "slide 1")
    assert {path.name for path in (tmp_path / folder).iterdir()} == NAMES | {"objects.csv"}


def on_another_engine(segmenter):
    engine = OracleEngine(tile_px=128, batch=2, mask_px=48)
    engine._spec = replace(engine.spec, name="oracle 2 fp16")
    return Segmenter(engine, segmenter.manifest)


def stop_at_the_overview(monkeypatch, segmenter, reader, out, **options):
    with monkeypatch.context() as patch:
        patch.setattr("darcnn.runtime.outputs.write_overview", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_slide(segmenter, reader, out, options=RunOptions(**options))


def test_no_result_is_of_two_engines(segmenter, reader, tmp_path, monkeypatch):
    stop_at_the_overview(monkeypatch, segmenter, reader, tmp_path)
    with on_another_engine(segmenter) as other:
        with pytest.raises(OutputError, match="begun on oracle, and this is oracle 2 fp16; pass --restart"):
            run_slide(other, reader, tmp_path)
        folder = run_slide(other, reader, tmp_path, options=RunOptions(restart=True)).folder
    assert json.loads((folder / "run.json").read_text())["engine"] == "oracle 2 fp16"
    assert run_slide(segmenter, reader, tmp_path).was_done  # a finished result stays, whatever found it


def test_an_overwriting_that_was_stopped_goes_on_or_leaves_nothing(segmenter, reader, tmp_path, monkeypatch):
    folder = run_slide(segmenter, reader, tmp_path).folder
    stop_at_the_overview(monkeypatch, segmenter, reader, tmp_path, overwrite=True)
    assert list((folder / ".parts").glob("row-*"))
    with monkeypatch.context() as patch:
        patch.setattr(segmenter, "stream", stream_that_must_not(segmenter, False))
        assert not run_slide(segmenter, reader, tmp_path, options=RunOptions(overwrite=True)).was_done
    stop_at_the_overview(monkeypatch, segmenter, reader, tmp_path, overwrite=True)
    with FileLock(folder / ".lock"):
        assert run_slide(segmenter, reader, tmp_path).was_done
        assert (folder / ".parts").exists()  # another run is at it
    assert run_slide(segmenter, reader, tmp_path).was_done
    assert {path.name for path in folder.iterdir()} == NAMES


def test_a_run_stopped_in_any_row_ends_as_one_that_never_stopped(segmenter, reader, tmp_path, monkeypatch):
    whole = contents(run_slide(segmenter, reader, tmp_path / "whole").folder)
    rows = len({tile.core.y0 for tile in segmenter.plan(reader.info).tiles})
    original = segmenter.stream
    for stop in range(rows):
        calls = []

        def stream(*arguments, calls=calls, stop=stop, **options):
            calls.append(options["tiles"][0].core.y0)
            if len(calls) == stop + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(segmenter, "stream", stream)
        with pytest.raises(KeyboardInterrupt):
            run_slide(segmenter, reader, tmp_path / "stopped" / str(stop))
        monkeypatch.setattr(segmenter, "stream", original)
        folder = run_slide(segmenter, reader, tmp_path / "stopped" / str(stop)).folder
        assert len(calls) == stop + 1
        stopped = contents(folder)
        assert {name: data for name, data in stopped.items() if name != "run.json"} == {
            name: data for name, data in whole.items() if name != "run.json"
        }


def test_a_failed_swap_puts_the_earlier_result_back(segmenter, reader, tmp_path, monkeypatch):
    folder = run_slide(segmenter, reader, tmp_path).folder
    before = contents(folder)
    replace = type(folder).replace

    def fail(self, target):
        if self.parent.name == "built" and self.name == "overview.png" and target.parent == folder:
            raise PermissionError(13, "open in a viewer")
        return replace(self, target)

    monkeypatch.setattr(type(folder), "replace", fail)
    with pytest.raises(OutputError, match="no permission"):
        run_slide(segmenter, reader, tmp_path, options=RunOptions(overwrite=True))
    assert results(folder) == before


def test_nothing_is_made_for_a_slide_that_cannot_be_planned(segmenter, tmp_path):
    engine = OracleEngine(tile_px=128)
    manifest = make_oracle_manifest(engine, halo_px=32, mpp=0.5)
    with (
        Segmenter(engine, manifest) as scaled,
        ArrayReader(np.zeros((50, 50, 3), np.uint8)) as reader,
        pytest.raises(InputError, match="no pixel size"),
    ):
        run_slide(scaled, reader, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fingerprint_tells_files_apart_by_their_ends(tmp_path):
    content = np.random.default_rng(0).bytes((2 << 20) + 100)
    longer = content[: 1 << 20] + b"x" + content[1 << 20 :]  # its ends are the same
    for name, data in zip(
        "abcde", (content, content[:-1] + b"x", b"x" + content[1:], longer, b"tiny"), strict=True
    ):
        (tmp_path / name).write_bytes(data)
    prints = [fingerprint_file(tmp_path / name) for name in "abcde"]
    assert len({entry["sha256"] for entry in prints}) == 5
    assert [entry["of"] for entry in prints] == ["first and last MiB and size"] * 4 + ["all"]


def test_images_in_memory_are_told_apart_by_every_row_and_by_their_type():
    image = np.zeros((2100, 4), np.uint8)
    changed = image.copy()
    changed[-1, -1] = 1
    readers = (ArrayReader(one) for one in (image, changed, np.zeros((2100, 2), np.uint16)))
    assert len({fingerprint_pixels(reader)["sha256"] for reader in readers}) == 3


def zarr_of(path, labels):
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", data=labels.astype(np.uint16), compressors=None)
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    scale = [{"type": "scale", "scale": [0.5, 0.5]}]
    datasets = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return path


def test_an_ome_zarr_is_known_by_what_is_in_it_not_by_how_it_is_spelled(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        zarr_of(tmp_path / name / "img.ome.zarr", np.full((300, 300), 1 if name == "one" else 2))
    known = []
    for folder, path in (("one", "img.ome.zarr"), ("two", "img.ome.zarr"), ("one/img.ome.zarr", ".")):
        monkeypatch.chdir(tmp_path / folder)
        with open_source(path) as reader:
            known.append(fingerprint(reader.info))
    with open_source(tmp_path / "one" / "img.ome.zarr") as reader:
        known.append(fingerprint(reader.info))
        chunk = tmp_path / "one" / "img.ome.zarr" / "0" / "0.0"
        chunk.write_bytes(2 * chunk.read_bytes())  # a longer file with the same ends
        known.append(fingerprint(reader.info))
    assert known[0] == known[2] == known[3]
    assert len({one["sha256"] for one in known}) == 3
    assert [one["name"] for one in known] == ["img.ome.zarr"] * 5


def test_a_folder_that_a_system_has_left_its_marks_in_is_gone_on_with(tmp_path):
    folder = tmp_path / "a"
    (folder / ".parts").mkdir(parents=True)
    for name in (".DS_Store", "._x", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"")
    with claim_folder(folder, overwrite=False) as claimed:
        assert claimed.path == folder
    assert (folder / ".DS_Store").exists()


def test_what_only_has_the_names_of_results_is_not_deleted(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "objects.csv").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"no results, such as objects\.csv"),
        claim_folder(folder, overwrite=False),
    ):
        pass
    assert (folder / "objects.csv").read_text() == "mine"
