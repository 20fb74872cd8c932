"""Tiles off the ground are skipped, and that changes nothing but time: what is on the ground stays."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import OutputError, UsageError
from darcnn.runtime.ground import survey_ground
from darcnn.runtime.pipeline import RunOptions, run_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.slide import SlideReader
from darcnn.runtime.roi import read_roi
from darcnn.runtime.segmenter import Segmenter

COLUMNS = ("x", "y", "area_px", "score", "bbox_x0", "bbox_y1")


def two_islands():
    """Return labels of disks in two corners of a slide, nothing between them."""
    generator = np.random.default_rng(5)
    labels = np.zeros((700, 900), np.int32)
    rows, columns = np.ogrid[:700, :900]
    for low, high in (((0, 0), (200, 260)), ((480, 600), (700, 900))):
        for _ in range(60):
            y, x = generator.uniform(low, high)
            disk = (rows - y) ** 2 + (columns - x) ** 2 < generator.uniform(4, 9) ** 2
            around = (rows - y) ** 2 + (columns - x) ** 2 < 12**2
            if disk.sum() > 12 and not labels[around].any():
                labels[disk] = labels.max() + 1
    return labels


@pytest.fixture(scope="module")
def segmenter():
    engine = OracleEngine(tile_px=128, batch=2, mask_px=48)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=32)) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def reader():
    with ArrayReader(encode_labels(two_islands()), name="islands", mpp=0.5) as reader:
        yield reader


@pytest.fixture(scope="module")
def everything(segmenter, reader, tmp_path_factory):
    folder = tmp_path_factory.mktemp("all")
    return found(run_slide(segmenter, reader, folder, options=RunOptions(tissue=False)))


def found(summary):
    return pq.read_table(summary.folder / "objects.parquet")


def rows(table):
    return list(zip(*(table[name].to_pylist() for name in COLUMNS), strict=True))


def test_tissue_skips_tiles_and_loses_no_object(segmenter, reader, everything, tmp_path):
    summary = run_slide(segmenter, reader, tmp_path)
    record = json.loads((summary.folder / "run.json").read_text())
    assert record["ground"]["tissue_rule"] == "bright on dark"
    assert record["counts"]["tiles_skipped"] > record["counts"]["tiles"]
    assert rows(found(summary)) == rows(everything)
    assert found(summary)["geometry"] == everything["geometry"]
    assert 0 < summary.ground_mm2 < 0.5 * 700 * 900 * 0.25 / 1e6
    assert record["ground"]["area_mm2"] == summary.ground_mm2
    assert summary.objects_per_mm2 == pytest.approx(summary.n_objects / summary.ground_mm2)


@settings(max_examples=8, deadline=None)
@given(
    st.tuples(st.integers(0, 880), st.integers(0, 680)), st.tuples(st.integers(1, 500), st.integers(1, 500))
)
def test_a_region_holds_what_a_run_without_it_finds_there(
    segmenter, reader, everything, tmp_path_factory, corner, size
):
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    options = RunOptions(roi=",".join(map(str, box)), tissue=False)
    summary = run_slide(segmenter, reader, tmp_path_factory.mktemp("some"), options=options)
    x, y = (everything[name].to_numpy() for name in ("x", "y"))
    expected = [
        row
        for row, inside in zip(rows(everything), shapely.contains_xy(shapely.box(*box), x, y), strict=True)
        if inside
    ]
    assert rows(found(summary)) == expected
    assert summary.ground_mm2 == pytest.approx(
        (min(box[2], 900) - box[0]) * (min(box[3], 700) - box[1]) * 0.25 / 1e6
    )


def test_region_and_tissue_leave_what_lies_on_both(segmenter, reader):
    plan = segmenter.plan(reader.info)
    model = segmenter.manifest.input
    tissue = survey_ground(reader, plan, model, tissue=True, roi=None)
    upper = survey_ground(reader, plan, model, tissue=True, roi=read_roi("0,0,900,350"))
    lower = survey_ground(reader, plan, model, tissue=True, roi=read_roi("0,350,900,700"))
    empty = survey_ground(reader, plan, model, tissue=True, roi=read_roi("460,100,480,130"))
    assert upper.area_px0 + lower.area_px0 == pytest.approx(tissue.area_px0)
    assert {tile.index for tile in upper.tiles + lower.tiles} == {tile.index for tile in tissue.tiles}
    assert empty.tiles == ()


def test_a_region_without_tissue_is_a_complete_result_that_says_so(segmenter, reader, tmp_path):
    summary = run_slide(segmenter, reader, tmp_path, options=RunOptions(roi="460,100,480,130"))
    assert summary.n_objects == 0
    assert "no tissue found" in summary.warnings[0]
    assert summary.objects_per_mm2 is None


def test_another_region_is_another_question(segmenter, reader, tmp_path):
    drawn = tmp_path / "drawn.geojson"
    drawn.write_text(json.dumps(shapely.geometry.mapping(shapely.box(0, 0, 100, 100))))
    options = RunOptions(roi=str(drawn))
    first = run_slide(segmenter, reader, tmp_path / "out", options=options)
    assert run_slide(segmenter, reader, tmp_path / "out", options=options).was_done
    assert json.loads((first.folder / "run.json").read_text())["options"]["roi"]["file"] == "drawn.geojson"
    drawn.write_text(json.dumps(shapely.geometry.mapping(shapely.box(0, 0, 200, 100))))
    with pytest.raises(OutputError, match="--overwrite"):
        run_slide(segmenter, reader, tmp_path / "out", options=options)
    with pytest.raises(UsageError, match="--roi"):
        run_slide(segmenter, reader, tmp_path / "out", options=RunOptions(roi="1,2"))


@pytest.mark.slow
def test_the_example_slide_is_half_glass(example_slide):
    engine = OracleEngine(tile_px=512)
    manifest = make_oracle_manifest(engine, halo_px=64, mpp=0.25)
    with Segmenter(engine, manifest) as segmenter, SlideReader(example_slide) as reader:
        plan = segmenter.plan(reader.info)
        ground = survey_ground(reader, plan, segmenter.manifest.input, tissue=True, roi=None)
    assert ground.tissue.rule == "stain on glass"
    assert 0.25 < ground.area_px0 / (2220 * 2967) < 0.5
    assert len(ground.tiles) < 0.75 * len(plan.tiles)
    keratin_flake = (np.array([2088.0]), np.array([605.0]))
    assert not ground.tissue.contains(*keratin_flake).any()
