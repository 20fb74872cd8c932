import logging
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from darcnn.runtime.engines.oracle import encode_labels
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.live import Calibration, CameraAxes, LiveSegmenter, MosaicGrid
from darcnn.runtime.live.calibration import Calibrator
from darcnn.runtime.live.mosaic_grid import MosaicReader
from darcnn.runtime.load import load
from darcnn.runtime.pipeline import RunOptions
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sinks.result_folder import TABLE_FILE

UM = 0.5  # per pixel


def scatter(height, width, seed, largest=9):
    """Return a label image of rectangles that do not touch, anywhere on it, of sides below `largest`."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.int64)
    n = 0
    for _ in range(height * width // 60):
        h, w = rng.integers(2, min(largest, height, width), 2)
        y, x = rng.integers(0, max(1, height - h)), rng.integers(0, max(1, width - w))
        if not labels[max(0, y - 1) : y + h + 1, max(0, x - 1) : x + w + 1].any():
            n += 1
            labels[y : y + h, x : x + w] = n
    return labels


def cut(picture, columns, rows, field, overlap):
    """Return the grid of `columns` x `rows` fields and the fields of the picture."""
    step = field - overlap
    corners = [(x * step, y * step) for y in range(rows) for x in range(columns)]
    grid = MosaicGrid.from_stage(
        [(100 + x * UM, -40 + y * UM) for x, y in corners], field_px=(field, field), pixel_size_um=UM
    )
    return grid, [picture[y : y + field, x : x + field] for x, y in corners]


def rows_of(instances):
    """Return the objects in an order of their own: box, score, pixels."""
    return sorted(
        (*box, score, *origin, mask.tobytes())
        for box, score, origin, mask in zip(
            instances.boxes.tolist(),
            instances.scores.tolist(),
            instances.origins.tolist(),
            instances.masks,
            strict=True,
        )
    )


def join(shape, results):
    return Instances.concatenate(shape, [result.instances for result in results])


@settings(max_examples=15, deadline=None)
@given(
    columns=st.integers(1, 4),
    rows=st.integers(1, 4),
    overlap=st.integers(0, 12),
    batch=st.integers(1, 3),
    seed=st.integers(0, 1000),
    largest=st.sampled_from([9, 28]),  # halos are of 8 px: the larger ones are cut, and looked at again
)
# in this one a field comes late that only the second look at a tile sees
@example(columns=4, rows=2, overlap=0, batch=1, seed=13, largest=28)
def test_in_any_order_the_fields_give_each_object_of_the_stitched_picture_once(
    make_engine, to_segmenter, columns, rows, overlap, batch, seed, largest
):
    field = 30
    height, width = (n * (field - overlap) + overlap for n in (rows, columns))
    picture = encode_labels(scatter(height, width, seed, largest))
    grid, fields = cut(picture, columns, rows, field, overlap)
    assert grid.shape == (height, width)
    expected = to_segmenter(make_engine())(picture)
    order = list(range(len(grid)))
    random.Random(seed).shuffle(order)
    with LiveSegmenter(to_segmenter(make_engine(batch=batch))) as live:
        mosaic = live.mosaic(grid)
        tickets = [mosaic.push(fields[n], at_um=grid.positions_um[n], key=n) for n in order]
        results = [ticket.result(30) for ticket in tickets]
        last = mosaic.finish().result(30)
    assert {result.pixel_size_um for result in results} == {UM}
    assert len(last.instances) == 0  # all was certain once the last field was in
    assert rows_of(join(grid.shape, results)) == rows_of(expected)


def test_ground_that_no_field_covers_costs_nothing(open_live, make_engine):
    engine = make_engine()
    picture = encode_labels(scatter(40, 40, 4))
    far = [(0.0, 0.0), (3000 * UM, 2000 * UM)]
    grid = MosaicGrid.from_stage(far, field_px=(40, 40), pixel_size_um=UM)
    live = open_live(engine)
    mosaic = live.mosaic(grid)
    engine.n_calls = 0
    first, second = (mosaic.push(picture, at_um=at).result(30) for at in far)
    assert 0 < len(first.instances) == len(second.instances)
    assert engine.n_calls < 40  # of 25,000 tiles
    assert len(mosaic.finish().result(10).instances) == 0


def test_objects_come_as_soon_as_the_fields_that_could_see_them_are_in(open_live):
    picture = encode_labels(scatter(40, 400, 3))
    grid, fields = cut(picture, 10, 1, 40, 0)
    live = open_live()
    mosaic = live.mosaic(grid)
    found = [
        len(mosaic.push(field, at_um=at).result(10).instances)
        for field, at in zip(fields, grid.positions_um, strict=True)
    ]
    assert all(n > 0 for n in found[1:])
    n_seen = np.cumsum(found)
    labels = scatter(40, 400, 3)
    # all is out that lies two tiles (of 16 px cores and 8 px halos) behind the front, and what a second look
    # at the last of them would see (16 px)
    for n in range(1, 10):
        behind = len(np.unique(labels[:, : 40 * (n + 1) - 72])) - 1
        assert n_seen[n] >= behind


def test_fields_are_let_go_when_nothing_looks_at_them_any_more(open_live, monkeypatch):
    held = []
    keep = MosaicReader.keep

    def watch(reader, indices):
        keep(reader, indices)
        held.append(reader.n_held)

    monkeypatch.setattr(MosaicReader, "keep", watch)
    grid, fields = cut(encode_labels(scatter(40, 800, 5)), 20, 1, 40, 0)
    mosaic = open_live().mosaic(grid)
    for field, at in zip(fields, grid.positions_um, strict=True):
        mosaic.push(field, at_um=at).result(10)
    assert max(held) <= 2
    assert held[-1] == 0


def test_a_field_that_never_comes_is_black_and_one_that_was_dropped_may_come_again(
    open_live, engine, to_segmenter
):
    picture = encode_labels(scatter(60, 60, 7))
    grid, fields = cut(picture, 2, 2, 30, 0)
    live = open_live(engine, queue=1, policy="drop_newest")
    mosaic = live.mosaic(grid)
    engine.gate.clear()
    engine.entered.clear()
    blocker = live.push(picture)
    assert engine.entered.wait(10)
    first = mosaic.push(fields[0], at_um=grid.positions_um[0])
    dropped = mosaic.push(fields[1], at_um=grid.positions_um[1])
    assert dropped.outcome(0).status == "dropped"
    engine.gate.set()
    blocker.result(10)
    results = [first.result(10)]
    results += [mosaic.push(fields[n], at_um=grid.positions_um[n]).result(10) for n in (1, 2)]
    results.append(mosaic.finish().result(10))
    assert len(results[-1].instances) > 0
    black = picture.copy()
    black[30:, 30:] = 0
    assert rows_of(join(grid.shape, results)) == rows_of(to_segmenter(engine)(black))


def test_an_engine_error_costs_a_tile_and_the_fields_go_on(open_live, make_engine, to_segmenter):
    labels = np.zeros((32, 96), np.int64)
    for n, x in enumerate(range(4, 90, 16)):
        labels[6:10, x : x + 4] = n + 1
    picture = encode_labels(labels)
    grid, fields = cut(picture, 3, 1, 32, 0)
    mosaic = open_live(make_engine(forbidden=6)).mosaic(grid)
    outcomes = [
        mosaic.push(field, at_um=at).outcome(10) for field, at in zip(fields, grid.positions_um, strict=True)
    ]
    while outcomes[-1].status != "done" and len(outcomes) < 10:  # four tiles show label 6
        outcomes.append(mosaic.finish().outcome(10))
    assert outcomes[-1].status == "done"
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    assert failed
    found = join(grid.shape, [outcome for outcome in outcomes if outcome.status == "done"])
    whole = rows_of(to_segmenter(make_engine())(picture))
    assert set(rows_of(found)) <= set(whole)
    assert len(found) >= len(whole) - 2  # those on the tiles that showed label 6


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (np.zeros((30, 31, 3), np.uint8), "is 30 x 31 px, the grid says 30 x 30"),
        (np.zeros((30, 30, 3), np.float32), "push"),
        ("field", "no array"),
    ],
)
def test_a_field_that_does_not_fit_fails_by_its_ticket(open_live, field, words):
    grid, fields = cut(encode_labels(scatter(30, 60, 1)), 2, 1, 30, 0)
    mosaic = open_live().mosaic(grid)
    mosaic.push(fields[0], at_um=grid.positions_um[0]).result(10)
    with pytest.raises(InputError, match=words) as caught:
        mosaic.push(field, at_um=grid.positions_um[1]).result(10)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is in already; push each position of the grid once"):
        mosaic.push(fields[0], at_um=grid.positions_um[0]).result(10)
    assert mosaic.push(fields[1], at_um=grid.positions_um[1]).result(10).status == "done"


def test_positions_become_pixels_whatever_way_the_stage_runs():
    positions = [(0.0, 0.0), (45.0, 0.0), (0.0, 44.8), (45.0, 44.8)]
    grid = MosaicGrid.from_stage(positions, field_px=(100, 100), pixel_size_um=0.5)
    assert grid.corners_px == ((0, 0), (90, 0), (0, 90), (90, 90))
    flipped = MosaicGrid.from_stage(positions, field_px=(100, 100), pixel_size_um=0.5, axes=CameraAxes(-1, 1))
    assert flipped.corners_px == ((90, 0), (0, 0), (90, 90), (0, 90))
    assert grid.find((44.0, 46.0)) == 3
    with pytest.raises(UsageError, match="no field of the grid near 22, 22 um"):
        grid.find((22.0, 22.0))


def test_fields_need_not_be_square_and_the_earlier_one_is_seen_where_they_overlap():
    grid = MosaicGrid.from_stage([(0, 0), (8, 0), (0, 15)], field_px=(20, 10), pixel_size_um=1.0)
    assert grid.shape == (35, 18)
    assert grid.covering(Region(9, 19, 10, 20)) == {0, 1, 2}
    assert grid.covering(Region(11, 25, 12, 26)) == set()
    reader = MosaicReader(grid, np.zeros((20, 10), np.uint8))
    for index in (2, 0, 1):  # they come in any order
        reader.add(index, np.full((20, 10), index + 1, np.uint8))
    drawn = reader.read(reader.info.whole, level=0)[..., 0]
    assert drawn[[17, 19, 34, 34], [9, 17, 9, 17]].tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    ("positions", "options", "words"),
    [
        ([], {}, "no positions"),
        ([(0, 0), (0.1, 0)], {}, "two fields at one place"),
        ([(0, np.nan)], {}, "not finite"),
        ([(0, 0)], {"pixel_size_um": 0.0}, "give sizes above 0"),
        (np.zeros((0, 2)), {}, "no positions"),
        ([(0, 0, 0)], {}, "give x and y of each field"),
        ([(0, 0)], {"field_px": (256.5, 256)}, "of pixels whole ones"),
        ([("a", 0)], {}, "no grid"),
        ([(0, 0)], {"axes": (-1, 1)}, "is no CameraAxes"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(positions, options, words):
    with pytest.raises(UsageError, match=words):
        MosaicGrid.from_stage(positions, **{"field_px": (10, 10), "pixel_size_um": 0.5, **options})


@pytest.mark.slow
def test_real_nuclei_of_a_mosaic_are_those_of_a_run_on_the_stitched_picture(root, tmp_path):
    def field(name):
        return np.asarray(Image.open(root / "tests" / "data" / "target" / name).convert("L"))

    one, two = field("u2os_2abc40c118.png"), field("u2os_1f6b7cead1.png")
    picture = np.block([[one, two, one[::-1]], [two[::-1], one.T, two.T]])  # 256 x 384
    grid, fields = cut(picture, 4, 2, 120, 32)
    stitched = picture[: grid.shape[0], : grid.shape[1]]
    with load("nuclei-fluorescence", device="cpu") as plain, ArrayReader(stitched, mpp=UM) as reader:
        plan = plain.plan(reader.info, diameter_px=16.0)
        assert len(plan.tiles) > 4
        expected = plain.segment(reader, plan)
        calibration = Calibration(window=plain.measure(reader, plan), diameter_px=16.0)
        summary = plain.run(reader, tmp_path, options=RunOptions(diameter_px=16.0))
        written = parquet.read_table(summary.folder / TABLE_FILE)
    order = [5, 0, 3, 7, 1, 2, 4, 6]
    with LiveSegmenter(load("nuclei-fluorescence", device="cpu"), queue=12, calibration=calibration) as live:
        mosaic = live.mosaic(grid)
        results = [mosaic.push(fields[n], at_um=grid.positions_um[n]).result(120) for n in order]
    found = join(grid.shape, results)
    assert len(found) > 20
    assert rows_of(found) == rows_of(expected)
    assert sorted(written["score"].to_pylist()) == sorted(found.scores.tolist())
    assert sorted(written["area_px"].to_pylist()) == sorted(int(mask.sum()) for mask in found.masks)


def test_a_field_that_fails_first_may_come_again_and_spoils_no_other(open_live, monkeypatch):
    picture = encode_labels(scatter(40, 80, 7))
    grid, fields = cut(picture, 2, 1, 40, 0)
    failing = [True]
    settle = Calibrator.settle

    def fail_once(self, *rest, **options):
        if failing.pop() if failing else False:
            raise RuntimeError("the engine failed")
        return settle(self, *rest, **options)

    monkeypatch.setattr(Calibrator, "settle", fail_once)
    mosaic = open_live().mosaic(grid)
    with pytest.raises(RuntimeError, match="the engine failed"):
        mosaic.push(fields[0][..., :1].astype(np.uint16), at_um=grid.positions_um[0]).result(10)
    results = [mosaic.push(fields[n], at_um=grid.positions_um[n]).result(10) for n in (0, 1)]
    results.append(mosaic.finish().result(10))
    assert len(join(grid.shape, results)) > 0
    assert len(join(grid.shape, results)) == len(open_live().push(picture).result(10).instances)


def test_fields_that_wait_for_one_with_objects_must_be_of_its_type(open_live, monkeypatch):
    picture = encode_labels(scatter(40, 120, 8))
    grid, fields = cut(picture, 3, 1, 40, 0)
    n_seen = []

    def settle(self, segmenter, reader, dtype, *, renew):
        n_seen.append(1)
        return Calibration(), len(n_seen) > 2  # the third field tells

    monkeypatch.setattr(Calibrator, "settle", settle)
    mosaic = open_live().mosaic(grid)
    assert len(mosaic.push(fields[0], at_um=grid.positions_um[0]).result(10).instances) == 0
    with pytest.raises(InputError, match="push fields of one type"):
        mosaic.push(fields[1].astype(np.uint16), at_um=grid.positions_um[1]).result(10)
    results = [mosaic.push(fields[n], at_um=grid.positions_um[n]).result(10) for n in (1, 2)]
    assert len(results[0].instances) == 0
    assert len(results[1].instances) == len(open_live().push(picture).result(10).instances) > 0


@pytest.mark.slow
def test_empty_corners_come_first_and_spoil_nothing(root):
    with Image.open(root / "tests" / "data" / "target" / "u2os_2abc40c118.png") as picture:
        field = np.asarray(picture.convert("L")).astype(np.uint16) * 16
    noise = np.random.default_rng(0).normal(100, 3, field.shape).astype(np.uint16)
    side = field.shape[0]
    for order in ((0, 1), (1, 0)):
        grid = MosaicGrid.from_stage([(0, 0), (side, 0)], field_px=field.shape, pixel_size_um=1.0)
        with LiveSegmenter(load("nuclei-fluorescence")) as live:
            mosaic = live.mosaic(grid)
            for n in order:
                mosaic.push((noise, field)[n], at_um=grid.positions_um[n]).result(120)
            learned = live.calibration
        assert learned.diameter_px is not None
    with LiveSegmenter(load("nuclei-fluorescence")) as live:
        mosaic = live.mosaic(grid)
        assert len(mosaic.push(noise, at_um=(0, 0)).result(60).instances) == 0
        assert len(mosaic.finish().result(60).instances) == 0  # nothing but empty fields: no error either


def test_arrays_serve_for_positions_and_sizes(open_live):
    picture = encode_labels(scatter(30, 60, 2))
    grid = MosaicGrid.from_stage(np.array([[0, 0], [15, 0]]), field_px=[30, np.int64(30)], pixel_size_um=UM)
    mosaic = open_live().mosaic(grid)
    for n in (0, 1):
        mosaic.push(picture[:, 30 * n : 30 * n + 30], at_um=np.array(grid.positions_um[n])).result(10)


def test_fields_of_a_turned_camera_lie_as_they_were_seen():
    stage = [(0, 0), (0, 50), (100, 0)]
    grid = MosaicGrid.from_stage(
        stage, field_px=(200, 100), pixel_size_um=0.5, axes=CameraAxes(1, -1, is_turned=True)
    )
    assert grid.corners_px == ((100, 0), (0, 0), (100, 200))


def test_a_field_beside_its_place_is_told_and_one_after_the_end_is_refused(open_live, caplog):
    grid = MosaicGrid.from_stage([(0, 0), (20, 0)], field_px=(40, 40), pixel_size_um=UM)
    mosaic = open_live().mosaic(grid)
    with caplog.at_level(logging.WARNING):
        mosaic.push(np.zeros((40, 40, 3), np.uint8), at_um=(4.5, 0)).result(10)
    assert "4.5 um beside its place" in caplog.text
    mosaic.finish().result(10)
    with pytest.raises(InputError, match="comes after `finish`"):
        mosaic.push(np.zeros((40, 40, 3), np.uint8), at_um=(20, 0)).result(10)
