"""Slides with damaged tiles: the tiles are named, the rest is what it is without the damage."""

import csv
import json
import os
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from PIL import Image

from darcnn.runtime.cli import main
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import DamagedPixelsError, InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers import open_source
from darcnn.runtime.readers.mended import MendedReader
from darcnn.runtime.rows import find_rows_here
from darcnn.runtime.segmenter import Segmenter

SVS = Path(__file__).parents[2] / "examples" / "CMU-1-Small-Region.svs"
NEAR_PX = 60  # larger than any object: what lies further from a damaged tile's core is not its own


@pytest.fixture
def make_of(monkeypatch):
    """Return what makes the segmenter for a kind of slide; it can be sent to other processes."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    from dark_engine import DarkEngine

    def make(name):
        if name != "slide.svs":
            return make_oracle()
        engine = DarkEngine(tile_px=512, batch=2, detections=1024)
        return partial(Segmenter, engine, make_oracle_manifest(engine, halo_px=128))

    return make


def make_oracle():
    engine = OracleEngine(tile_px=128, batch=2, mask_px=48)
    return partial(Segmenter, engine, make_oracle_manifest(engine, halo_px=32))


def disks():
    generator = np.random.default_rng(7)
    labels = np.zeros((430, 480), np.int32)
    rows, columns = np.ogrid[:430, :480]
    for _ in range(300):
        y, x = generator.uniform((0, 0), labels.shape)
        if not labels[(rows - y) ** 2 + (columns - x) ** 2 < 14**2].any():
            labels[(rows - y) ** 2 + (columns - x) ** 2 < generator.uniform(4, 9) ** 2] = labels.max() + 1
    return encode_labels(labels)


def overwrite(path, start, n_bytes):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(n_bytes))


def segment_of(path, index, level=0):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        return page.dataoffsets[index], page.databytecounts[index]


def write_svs(path):
    shutil.copy(SVS, path)
    return path


def damage_svs(path):
    overwrite(path, *segment_of(path, 54))  # tiles of 240 px, 10 in a row


def write_tiff(path):
    tifffile.imwrite(path, disks(), tile=(64, 64), compression="zlib", photometric="rgb")
    return path


def damage_tiff(path):
    start, n_bytes = segment_of(path, 27)  # 8 in a row: x 192, y 192
    overwrite(path, start + n_bytes // 3, n_bytes // 3)


def write_zarr(path):
    group = zarr.create_group(path, zarr_format=3)
    group.create_array("0", data=np.moveaxis(disks(), 2, 0), chunks=(3, 64, 64))
    axes = [{"name": "c", "type": "channel"}] + [{"name": name, "type": "space"} for name in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    return path


def damage_zarr(path):
    chunk = path / "0" / "c" / "0" / "3" / "3"
    chunk.write_bytes(chunk.read_bytes()[:20])


FORMATS = {
    "slide.svs": (write_svs, damage_svs, (4 * 240, 5 * 240, 5 * 240, 6 * 240)),
    "slide.tif": (write_tiff, damage_tiff, (192, 192, 256, 256)),
    "slide.ome.zarr": (write_zarr, damage_zarr, (192, 192, 256, 256)),
}
OPTIONS = {"slide.svs": {"roi": "500,800,1700,1900"}}  # to save time


@pytest.fixture
def tiff(tmp_path):
    path = write_tiff(tmp_path / "slide.tif")
    damage_tiff(path)
    return path


@pytest.fixture(scope="module")
def oracle():
    with make_oracle()() as segmenter:
        yield segmenter


def run(segmenter, path, out, *, find_rows=find_rows_here, **options):
    with open_source(path) as reader:
        chosen = RunOptions(pixels=True, **options)
        summary = run_slide(segmenter, reader, out, options=chosen, find_rows=find_rows)
    return summary, json.loads((summary.folder / "run.json").read_text())


def tables(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def objects_far_from(cores, folder):
    """Return objects, without their number, and how many there are within the cores."""
    table = pq.read_table(folder / "objects.parquet").drop_columns(["id"])
    x, y = (table[name].to_numpy() for name in ("x", "y"))
    near, inside = np.zeros((2, len(x)), bool)
    for core in cores:
        for hit, margin in ((near, NEAR_PX), (inside, -NEAR_PX)):
            hit |= (
                (core["x0"] - margin <= x)
                & (x < core["x1"] + margin)
                & (core["y0"] - margin <= y)
                & (y < core["y1"] + margin)
            )
    return table.filter(~near).to_pylist(), int(inside.sum())


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_far_from_a_damaged_tile_is_found_as_without_the_damage(name, make_of, tmp_path):
    write, damage, broken = FORMATS[name]
    path = write(tmp_path / name)
    options = OPTIONS.get(name, {})
    with make_of(name)() as segmenter:
        before, sound = run(segmenter, path, tmp_path / "before", **options)
        damage(path)
        after, record = run(segmenter, path, tmp_path / "after", **options)
        plan = segmenter.plan(open_source(path).info, pixels=True)
    assert (before.n_unreadable, sound["unreadable"]) == (0, [])
    # unreadable are the tiles that would have read a broken pixel, and no others
    x0, y0, x1, y1 = broken
    touched = [
        tile
        for tile in plan.tiles
        if tile.read.x0 < x1 and x0 < tile.read.x1 and tile.read.y0 < y1 and y0 < tile.read.y1
    ]
    lost = record["unreadable"]
    assert [entry["tile"] for entry in lost] == [tile.index for tile in touched]
    assert [(e["x0"], e["y0"], e["x1"], e["y1"]) for e in lost] == [
        (t.core.x0, t.core.y0, t.core.x1, t.core.y1) for t in touched
    ]
    assert record["counts"]["tiles_unreadable"] == after.n_unreadable == len(lost) < record["counts"]["tiles"]
    first = lost[0]
    assert after.warnings[0].startswith(
        f"damaged tiles: {len(lost)} of {record['counts']['tiles']}; nothing was found in them, "
        f"the first lies at x {first['x0']} to {first['x1']}, y {first['y0']} to {first['y1']}"
    )
    far_before, _ = objects_far_from(lost, before.folder)
    far_after, _ = objects_far_from(lost, after.folder)
    assert far_after == far_before
    assert len(far_after) > 20
    assert after.n_objects < before.n_objects


def test_nothing_is_found_in_a_damaged_tile(oracle, tiff, tmp_path):
    summary, record = run(oracle, tiff, tmp_path / "out")
    table = pq.read_table(summary.folder / "objects.parquet")
    for core in record["unreadable"]:
        # its neighbours report what has its centre up to 4 px inside
        boxes = [table[f"bbox_{side}"].to_numpy() for side in ("x0", "y0", "x1", "y1")]
        x, y = (boxes[0] + boxes[2]) / 2, (boxes[1] + boxes[3]) / 2
        inside = (core["x0"] + 5 < x) & (x < core["x1"] - 5) & (core["y0"] + 5 < y) & (y < core["y1"] - 5)
        assert not inside.any()


def test_the_overview_stripes_damaged_tiles(oracle, tiff, tmp_path):
    summary, record = run(oracle, tiff, tmp_path / "out")
    with Image.open(summary.overview) as picture:
        orange = (np.asarray(picture) == (255, 110, 0)).all(axis=2)
    covered = np.zeros_like(orange)
    for core in record["unreadable"]:
        covered[core["y0"] : core["y1"], core["x0"] : core["x1"]] = True
    assert not orange[~covered].any()
    assert 0.1 < orange[covered].mean() < 0.5


def test_the_command_exits_with_1_and_says_so_again_for_a_finished_slide(tiff, tmp_path, monkeypatch):
    sound = write_tiff(tmp_path / "sound.tif")
    module = types.ModuleType("darcnn.runtime.load")
    module.load = lambda *_, **__: make_oracle()()
    monkeypatch.setitem(sys.modules, "darcnn.runtime.load", module)
    out = tmp_path / "out"

    def command(*options):
        arguments = [str(tiff), str(sound), "--model", "m", "--pixels", "--out", str(out), *options]
        return CliRunner().invoke(main, arguments)

    first, again = command(), command()
    assert (first.exit_code, again.exit_code) == (1, 1)
    assert "done before" in again.stdout
    assert first.stderr == again.stderr
    (line,) = (line for line in first.stderr.splitlines() if "damaged" in line)
    assert line.startswith("slide: ")
    with (out / "summary.csv").open(newline="") as file:
        states = [
            (row["slide"], row["state"], int(row["tiles_unreadable"]) > 0) for row in csv.DictReader(file)
        ]
    assert states == [
        ("slide", "done", True),
        ("sound", "done", False),
    ]  # nothing changed: it stays as it was
    events = [json.loads(event) for event in command("--json").stdout.splitlines()]
    assert [event["tiles_unreadable"] > 0 for event in events if event["event"] == "finish"] == [True, False]
    write_tiff(tiff)
    assert command("--overwrite").exit_code == 0


def test_a_run_stopped_in_any_row_names_the_same_tiles(oracle, tiff, tmp_path, monkeypatch):
    whole, record = run(oracle, tiff, tmp_path / "whole")
    original = oracle.stream
    with open_source(tiff) as reader:
        n_rows = len({tile.core.y0 for tile in oracle.plan(reader.info, pixels=True).tiles})
    for stop in range(1, n_rows, 2):
        calls = []

        def stream(*arguments, calls=calls, stop=stop, **options):
            calls.append(1)
            if len(calls) == stop + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        monkeypatch.setattr(oracle, "stream", stream)
        with pytest.raises(KeyboardInterrupt):
            run(oracle, tiff, tmp_path / str(stop))
        monkeypatch.setattr(oracle, "stream", original)
        resumed, resumed_record = run(oracle, tiff, tmp_path / str(stop))
        assert tables(resumed.folder) == tables(whole.folder)
        assert resumed.warnings == whole.warnings
        for key in ("counts", "unreadable", "warnings"):
            assert resumed_record[key] == record[key]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_workers_name_the_same_tiles(name, make_of, tmp_path):
    cluster = pytest.importorskip("darcnn.runtime.cluster", reason="needs the extra cluster")
    write, damage, _ = FORMATS[name]
    path = write(tmp_path / name)
    damage(path)
    make, options = make_of(name), OPTIONS.get(name, {})
    with make() as segmenter:
        alone, record = run(segmenter, path, tmp_path / "alone", **options)
        with cluster.open_cluster(make, n_workers=2) as runner:
            shared, of_workers = run(
                segmenter, path, tmp_path / "shared", find_rows=runner.find_rows, **options
            )
    assert tables(shared.folder) == tables(alone.folder)
    assert shared.warnings == alone.warnings
    assert of_workers["unreadable"] == record["unreadable"] != []


def test_a_slide_of_which_nothing_can_be_read_fails(oracle, tmp_path):
    path = write_tiff(tmp_path / "slide.tif")
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    for start, n_bytes in segments:
        overwrite(path, start, n_bytes)
    with pytest.raises(InputError, match=r"slide\.tif: cannot be decoded"):
        run(oracle, path, tmp_path / "out")
    write_tiff(path)
    for start, n_bytes in segments[9:]:  # the first row of 64 px, and one tile more, are left
        overwrite(path, start, n_bytes)
    with pytest.raises(InputError, match=r"of 42 tiles none can be read; copy it again and pass --restart"):
        run(oracle, path, tmp_path / "out", tissue=False)
    write_tiff(path)
    assert run(oracle, path, tmp_path / "out", tissue=False, restart=True)[0].n_unreadable == 0


def test_an_error_stays_an_error_in_the_waist(oracle, tiff):
    with open_source(tiff) as reader:
        with pytest.raises(DamagedPixelsError):
            oracle(reader, pixels=True)
        plan = oracle.plan(reader.info, pixels=True)
        with pytest.raises(DamagedPixelsError):
            list(oracle.stream(reader, plan))
        told = [tile.index for tile, _ in oracle.stream(reader, plan, skips_damaged=True)]
    assert told == sorted(set(told))
    assert 0 < len(told) < len(plan.tiles)


def test_a_tile_damaged_where_its_objects_are_measured_is_damaged(oracle, tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "slide.tif")
    original = sys.modules["darcnn.runtime.rows"]._measure_tile

    def measure(tile, *arguments):
        if tile.index == 13:
            raise DamagedPixelsError("is damaged", where="x", fix="y")
        return original(tile, *arguments)

    monkeypatch.setattr("darcnn.runtime.rows._measure_tile", measure)
    assert [entry["tile"] for entry in run(oracle, path, tmp_path / "out")[1]["unreadable"]] == [13]


@pytest.mark.parametrize("error", [InputError("is gone", where="x", fix="y"), OSError(5, "I/O error")])
def test_what_is_no_damage_fails_the_slide(oracle, tmp_path, monkeypatch, error):
    path = write_tiff(tmp_path / "slide.tif")

    def decode(*_):
        raise error

    monkeypatch.setattr("darcnn.runtime.readers.tiff_pages.PageFiles._decoded", decode)
    with pytest.raises(type(error)) as caught:
        run(oracle, path, tmp_path / "out")
    assert caught.value is error


# --- reduced levels


@pytest.fixture
def pyramid(tmp_path):
    path, pixels = tmp_path / "slide.tif", disks()
    with tifffile.TiffWriter(path) as tiff:
        for step, kind in ((1, 0), (4, 1)):
            level = pixels[::step, ::step]
            tiff.write(level, tile=(64, 64), compression="zlib", photometric="rgb", subfiletype=kind)
    return path


def test_damage_in_a_reduced_level_loses_no_object(oracle, pyramid, tmp_path):
    before, _ = run(oracle, pyramid, tmp_path / "before")
    overwrite(pyramid, *segment_of(pyramid, 3, level=1))
    with open_source(pyramid) as reader, pytest.raises(DamagedPixelsError):
        reader.read(Region(64, 64, 65, 65), level=1)
    after, record = run(oracle, pyramid, tmp_path / "after")
    for file in ("objects.parquet", "objects.geojson.gz"):
        assert (after.folder / file).read_bytes() == (before.folder / file).read_bytes()
    assert (after.n_unreadable, record["unreadable"]) == (0, [])
    assert after.warnings[0].startswith("the slide is damaged in a reduced level")


def test_damage_off_the_region_is_warned_of(oracle, tiff, tmp_path):
    summary, _ = run(oracle, tiff, tmp_path / "out", roi="380,0,480,60")
    assert summary.n_unreadable == 0
    assert summary.warnings[0].startswith("the slide is damaged in a reduced level, or where no object")


def test_a_mended_slide_has_its_typical_colour_in_the_hole_only(tiff):
    pixels = disks()
    with open_source(tiff) as reader:
        mended = MendedReader(reader)
        seen = mended.read(Region(100, 150, 400, 400), level=0)
        again = mended.read(Region(180, 186, 300, 270), level=0)
    hole = np.zeros(pixels.shape[:2], bool)
    for region in mended.holes:
        assert max(region.width, region.height) <= 128
        hole[region.y0 : region.y1, region.x0 : region.x1] = True
    assert hole[192:256, 192:256].all()
    expected = np.where(hole[..., None], 0, pixels)[150:400, 100:400]  # most of it is black
    assert np.array_equal(seen[~hole[150:400, 100:400]], expected[~hole[150:400, 100:400]])
    assert not seen[42:106, 92:156].any()
    assert not again[6:70, 12:76].any()


# --- readers


def test_a_slide_goes_on_after_damage_in_any_thread(tmp_path):
    path = write_svs(tmp_path / "slide.svs")
    damage_svs(path)
    spots = [(x, y) for y in range(60, 2900, 480) for x in range(60, 2200, 240)]
    broken = (4 * 240 + 60, 5 * 240 + 60)
    with open_source(SVS) as sound, open_source(path) as reader, ThreadPoolExecutor(4) as pool:

        def read(spot):
            region = Region(*spot, spot[0] + 40, spot[1] + 40)
            if spot == broken:
                with pytest.raises(DamagedPixelsError, match=r"slide\.svs: is damaged near x 1020, y 1260"):
                    reader.read(region, level=0)
                return True
            return np.array_equal(reader.read(region, level=0), sound.read(region, level=0))

        asked = [spot for start in range(0, len(spots), 3) for spot in (*spots[start : start + 3], broken)]
        assert all(pool.map(read, asked))


def test_a_slide_that_vanishes_is_not_taken_for_damaged(tmp_path):
    path = write_svs(tmp_path / "slide.svs")
    damage_svs(path)
    with open_source(path) as reader:
        path.rename(tmp_path / "elsewhere.svs")
        with pytest.raises(InputError, match=r"slide\.svs: is gone") as caught:
            reader.read(Region(1020, 1260, 1060, 1300), level=0)
    assert not isinstance(caught.value, DamagedPixelsError)


@pytest.mark.parametrize("codec", ["gzip", "zlib", "lzma", "bz2", "zstd", "lz4"])
@pytest.mark.parametrize("content", [b"", b"\0" * 50, None])
def test_a_broken_chunk_of_any_codec_is_damage(codec, content, tmp_path):
    numcodecs = pytest.importorskip("numcodecs")
    names = {"gzip": "GZip", "zlib": "Zlib", "lzma": "LZMA", "bz2": "BZ2", "zstd": "Zstd", "lz4": "LZ4"}
    path = tmp_path / "a.zarr"
    group = zarr.create_group(path, zarr_format=2)
    values = np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)
    group.create_array("0", data=values, chunks=(32, 32), compressors=getattr(numcodecs, names[codec])())
    group.attrs["multiscales"] = [{"axes": ["y", "x"], "datasets": [{"path": "0"}]}]
    chunk = path / "0" / "1.1"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with open_source(path) as reader:
        assert np.array_equal(reader.read(Region(0, 0, 32, 64), level=0)[..., 0], values[:, :32])
        with pytest.raises(DamagedPixelsError, match="cannot be read as OME-Zarr"):
            reader.read(Region(0, 0, 64, 64), level=0)


def test_a_chunk_that_the_disk_refuses_is_not_taken_for_damaged(tmp_path, monkeypatch):
    path = write_zarr(tmp_path / "a.ome.zarr")

    async def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    with open_source(path) as reader:
        monkeypatch.setattr("zarr.storage.LocalStore.get", refuse)
        with pytest.raises(InputError, match="Permission denied") as caught:
            reader.read(Region(192, 192, 256, 256), level=0)
    assert not isinstance(caught.value, DamagedPixelsError)
