"""The waist: planning, ownership at scale, host suppression, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import InputError, ShapeError, UsageError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import Manifest
from darcnn.runtime.measure import measure_on_slide
from darcnn.runtime.planning import find_channel
from darcnn.runtime.polygons import draw_polygon
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.readers.protocol import SlideInfo
from darcnn.runtime.run_options import RunOptions, asked_options
from darcnn.runtime.segmenter import Segmenter

TILE_PX, HALO_PX = 48, 8


class ScriptedEngine:
    """Answers every tile with the boxes that `script` makes of its pixels; records what it is asked."""

    def __init__(
        self, script: Any, *, batch: int = 1, converged: bool = True, tile_px: int = TILE_PX
    ) -> None:
        self.spec = EngineSpec("scripted", batch, tile_px, 1, 8, 8, 28)
        self.script, self.converged = script, converged
        self.tiles: list[np.ndarray] = []
        self.n_masked = 0
        self.is_closed = False

    def detect(self, tiles: np.ndarray) -> Detections:
        boxes, scores = np.zeros((len(tiles), 8, 4), np.float32), np.zeros((len(tiles), 8), np.float32)
        for index, tile in enumerate(tiles):
            self.tiles.append(tile.copy())
            for slot, (*box, score) in enumerate(self.script(tile)):
                boxes[index, slot], scores[index, slot] = box, score
        return Detections(boxes, scores, np.full(len(tiles), self.converged), None)

    def masks(self, detections: Detections, boxes: np.ndarray, tile_index: np.ndarray) -> np.ndarray:
        assert len(boxes) == len(tile_index)
        self.n_masked += len(boxes)
        return np.ones((len(boxes), 28, 28), np.float32)

    def close(self) -> None:
        self.is_closed = True


def manifest(*, mpp: float | None = None, **changes: Any) -> Manifest:
    oracle = make_oracle_manifest(OracleEngine(tile_px=TILE_PX, channels=1), halo_px=HALO_PX, mpp=mpp)
    return replace(oracle, input=replace(oracle.input, nominal_diameter_px=20.0, **changes))


def segmenter(script: Any = lambda tile: [], *, mpp: float | None = None, **options: Any) -> Segmenter:
    return Segmenter(ScriptedEngine(script, **options), manifest(mpp=mpp))


def slide(
    width: int = 400,
    height: int = 300,
    *,
    mpp: Any = None,
    downsamples: tuple[float, ...] = (1.0,),
    is_rgb: bool = False,
    channels: int = 1,
) -> SlideInfo:
    return SlideInfo(
        path=None,
        name="slide",
        levels=tuple(Level(k, int(width / d), int(height / d), d) for k, d in enumerate(downsamples)),
        channel_names=tuple(f"c{k}" for k in range(channels)),
        dtype=np.dtype(np.uint8),
        is_rgb=is_rgb,
        mpp=mpp,
        mpp_source="file" if mpp else None,
    )


def blob_box(tile: np.ndarray) -> list[tuple[float, float, float, float, float]]:
    """Return the box of all that is bright on a tile."""
    ys, xs = np.nonzero(tile[:, :, 0] > 100)
    return [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, 0.9)] if xs.size else []


# planning


def test_the_pixel_size_decides_level_and_scale() -> None:
    plan = segmenter(mpp=0.5).plan(slide(mpp=(0.25, 0.25), downsamples=(1.0, 2.0, 4.0)))
    assert (plan.level.index, plan.scale, plan.width, plan.height) == (1, 0.5, 200, 150)
    assert (plan.mpp, plan.mpp_source) == (0.25, "file")


def test_a_given_pixel_size_goes_before_the_file() -> None:
    plan = segmenter(mpp=0.5).plan(slide(mpp=(0.25, 0.25)), mpp=1.0)
    assert (plan.scale, plan.width, plan.mpp, plan.mpp_source) == (2.0, 800, 1.0, "--mpp")


def test_a_diameter_decides_alone() -> None:
    plan = segmenter(mpp=0.5).plan(slide(mpp=(0.25, 0.25)), diameter_px=40)
    assert plan.scale == 0.5  # 20 network pixels nominal
    assert plan.mpp == 0.25


def test_a_scale_near_that_of_a_level_takes_its_pixels_as_they_are() -> None:
    info = slide(401, 301, mpp=(0.2528, 0.2528), downsamples=(1.0, 2.0))
    plan = segmenter(mpp=0.5).plan(info)
    assert (plan.level.index, plan.scale) == (1, 0.5)
    assert (plan.width, plan.height) == (200, 150)
    off = segmenter(mpp=0.5).plan(slide(mpp=(0.26, 0.26), downsamples=(1.0, 2.0)))
    assert off.scale == pytest.approx(0.52)
    assert off.width == 208


def test_pixels_as_they_are_need_no_size() -> None:
    assert segmenter(mpp=0.5).plan(slide(), pixels=True).scale == 1.0
    assert segmenter(mpp=None).plan(slide()).scale == 1.0
    assert segmenter(mpp=0.5).plan(slide(mpp=(0.25, 0.25)), pixels=True).scale == 1.0


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (slide(), {}, "no pixel size in the file; pass --mpp"),
        (slide(mpp=(0.25, 0.3)), {}, "not square: 0.25 x 0.3 um"),
        (slide(mpp=(0.001, 0.001)), {}, "scaled by 0.002"),
        (slide(mpp=(50.0, 50.0)), {}, "scaled by 100"),
        (slide(mpp=(0.5, 0.5), channels=2), {}, r"choose one with channel= \(they come last\): 0 c0, 1 c1"),
        (replace(slide(mpp=(0.5, 0.5), channels=2), doubts=("or colours?",)), {}, r"1 c1; or colours\?"),
    ],
)
def test_a_slide_that_does_not_fit_is_refused(info: SlideInfo, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        segmenter(mpp=0.5).plan(info, **options)


@pytest.mark.parametrize(
    "options", [{"mpp": 0.0}, {"mpp": float("nan")}, {"diameter_px": -1.0}, {"channel": 3}]
)
def test_an_option_out_of_range_is_refused(options: Any) -> None:
    with pytest.raises(UsageError, match=r"--mpp|--diameter|--channel"):
        segmenter(mpp=0.5).plan(slide(mpp=(0.5, 0.5)), **options)


def test_pixels_that_are_not_square_serve_if_the_size_is_given() -> None:
    assert segmenter(mpp=0.5).plan(slide(mpp=(0.25, 0.3)), mpp=0.5).scale == 1.0


def test_an_engine_must_fit_the_manifest() -> None:
    with pytest.raises(ShapeError, match="does not fit"):
        Segmenter(ScriptedEngine(blob_box, tile_px=64), manifest())


# from pixels to instances


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_an_object_lies_at_level_0_where_it_was_drawn(scale: float) -> None:
    image = np.zeros((150, 170), np.uint8)
    image[60:68, 90:100] = 255
    found = segmenter(blob_box, mpp=1.0)(image, mpp=scale)
    assert len(found) == 1
    np.testing.assert_allclose(found.boxes[0], [90, 60, 100, 68], atol=0.5 / scale)
    # the scripted mask fills its box
    assert found.polygons()[0].area == pytest.approx(80, rel=0.2)
    assert found.polygons()[0].centroid.distance(shapely.Point(95, 64)) < 0.5
    assert np.array_equal(draw_polygon(found.outlines[0], whole(image)), found.labels() == 1)


@pytest.mark.parametrize("rounds_up", [False, True])
def test_a_level_of_rounded_size_puts_objects_where_they_are(tmp_path: Path, rounds_up: bool) -> None:
    reduced = np.zeros((30 + rounds_up, 40 + rounds_up), np.uint8)
    reduced[24:28, 32:36] = 200  # near the far corner, where a stretched level would be off by five pixels
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as file:
        file.write(np.zeros((247, 327), np.uint8), metadata={"axes": "YX"}, subifds=1)
        file.write(reduced, subfiletype=1)

    def script(tile: np.ndarray) -> list[tuple[float, float, float, float, float]]:
        ys, xs = np.nonzero(tile[:, :, 0] == 200)  # beyond the slide's edge lies a mirror image
        return [(xs.min(), ys.min(), xs.min() + 4, ys.min() + 4, 0.9)] if xs.size else []

    with open_source(tmp_path / "a.ome.tif") as reader:
        some = segmenter(script)
        plan = some.plan(reader.info, diameter_px=20 * 8)
        assert (plan.level.index, plan.scale) == (1, 1 / 8)
        found = some.segment(reader, plan)
        np.testing.assert_allclose(found.boxes, [[256, 192, 288, 224]], atol=1e-3)
        row = measure_on_slide(found, reader, plan.level, None).to_pylist()[0]
    assert (row["mean_intensity_grey"], row["std_intensity_grey"]) == (200, 0)


def whole(image: np.ndarray) -> Region:
    return Region(0, 0, image.shape[1], image.shape[0])


def test_low_scores_are_dropped_and_their_masks_never_made() -> None:
    image = np.zeros((32, 32), np.uint8)  # one tile
    boxes = [(10, 10, 20, 20, 0.9), (25, 25, 35, 35, 0.4), (10, 25, 20, 35, 0.6), (9, 9, 12, 12, 0.0)]
    for min_score, n_found in ((0.7, 1), (None, 2), (0.1, 3), (0.0, 3)):
        engine = ScriptedEngine(lambda tile: boxes)
        found = Segmenter(engine, manifest(), min_score=min_score)(image)
        assert len(found) == n_found
        assert engine.n_masked == n_found


@pytest.mark.parametrize(("converged", "n_found"), [(True, 2), (False, 1)])
def test_a_tile_that_has_not_converged_is_finished_here(converged: bool, n_found: int) -> None:
    twins = [(12, 12, 22, 22, 0.8), (17, 12, 27, 22, 0.9)]  # a third of their union, half of each
    model = manifest()
    model = replace(model, limits=replace(model.limits, nms_threshold=0.3))
    found = Segmenter(ScriptedEngine(lambda tile: twins, converged=converged), model)(
        np.zeros((30, 30), np.uint8)
    )
    assert len(found) == n_found
    assert found.scores.max() == pytest.approx(0.9)


@pytest.mark.parametrize(("converged", "n_looks"), [(True, 1), (False, 5)])
def test_a_tile_that_has_not_converged_is_looked_at_in_quarters_too(converged: bool, n_looks: int) -> None:
    engine = ScriptedEngine(lambda tile: [], converged=converged)  # too many proposals hide what is there
    Segmenter(engine, manifest())(np.zeros((30, 30), np.uint8))
    assert len(engine.tiles) == n_looks


def test_a_mirror_image_beyond_the_edge_is_no_object() -> None:
    # the slide ends at 32: this box lies on it by 1 of 6 pixels, the other by 3 of 6
    boxes = [(31, 10, 37, 20, 0.9), (29, 22, 35, 30, 0.8)]
    found = segmenter(lambda tile: boxes)(np.zeros((32, 32), np.uint8))
    assert found.boxes.tolist() == [[29, 22, 32, 30]]


def test_an_object_at_the_edge_stays_where_its_box_reaches_a_little_further_out_than_in() -> None:
    boxes = [(24, 10, 41, 20, 0.9)]  # 8 of 17 pixels on the slide
    found = segmenter(lambda tile: boxes)(np.zeros((32, 32), np.uint8))
    assert found.boxes.tolist() == [[24, 10, 32, 20]]


def test_an_object_cut_by_a_tile_twice_as_large_is_marked() -> None:
    image = np.zeros((48, 300), np.uint8)
    image[10:20, 60:210] = 255  # longer than two tiles
    found = segmenter(blob_box)(image)
    assert len(found) >= 1
    assert found.truncated.all()
    image[:] = 0
    image[10:20, 0:12] = 255  # reaches the edge of the slide, which cuts nothing
    assert segmenter(blob_box)(image).truncated.tolist() == [False]
    for rows, columns in ((10, 12), (10, -12), (12, 10), (-12, 10)):  # from each edge of one tile
        narrow = np.zeros((32, 32), np.uint8)
        narrow[slice(rows) if rows > 0 else slice(rows, None)] += 100
        narrow[:, slice(columns) if columns > 0 else slice(columns, None)] += 100
        narrow[narrow < 200] = 0
        assert segmenter(blob_box)(narrow).truncated.tolist() == [False]


class UploadingEngine(ScriptedEngine):
    """Takes tiles only as `upload` gave them out."""

    def upload(self, tiles: np.ndarray) -> tuple[np.ndarray]:
        return (tiles,)

    def detect(self, tiles: Any) -> Detections:
        (pixels,) = tiles
        return super().detect(pixels)


def test_stream_uploads_batches_before_they_are_computed() -> None:
    image = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    found = []
    for kind in (ScriptedEngine, UploadingEngine):
        engine = kind(lambda tile: [(20, 20, 28, 28, float(tile[0, 0, 0]) / 255)], batch=2)
        with ArrayReader(image) as reader:
            segmenter = Segmenter(engine, manifest())
            plan = segmenter.plan(reader.info, pixels=True)
            found.append([(tile, one.scores.tolist()) for tile, one in segmenter.stream(reader, plan)])
    assert found[0] == found[1]
    assert len(found[0]) > 2


def test_stream_yields_every_tile_in_order_in_whole_batches() -> None:
    engine = ScriptedEngine(blob_box, batch=4)
    streaming = Segmenter(engine, manifest())
    with ArrayReader(np.zeros((70, 100), np.uint8)) as reader:
        plan = streaming.plan(reader.info)
        seen = [tile.index for tile, _ in streaming.stream(reader, plan)]
        some = [tile.index for tile, _ in streaming.stream(reader, plan, tiles=plan.tiles[2:4])]
    assert seen == list(range(len(plan.tiles)))
    assert some == [2, 3]
    assert len(engine.tiles) % 4 == 0


def test_a_tile_means_the_same_whatever_else_is_asked_for() -> None:
    labels = np.zeros((90, 120), int)
    for k, (y, x) in enumerate(np.ndindex(6, 8)):
        labels[15 * y + 2 : 15 * y + 12, 15 * x + 1 : 15 * x + 11] = k + 1
    engine = OracleEngine(tile_px=TILE_PX, batch=3)
    streaming = Segmenter(engine, make_oracle_manifest(engine, halo_px=HALO_PX))
    with ArrayReader(encode_labels(labels)) as reader:
        plan = streaming.plan(reader.info)
        together = {tile.index: found for tile, found in streaming.stream(reader, plan)}
        for tile in plan.tiles:
            ((_, alone),) = streaming.stream(reader, plan, tiles=[tile])
            assert np.array_equal(alone.boxes, together[tile.index].boxes)
            assert np.array_equal(alone.labels(), together[tile.index].labels())
        assert len(streaming.segment(reader, plan)) == 48
    assert sum(len(found) for found in together.values()) >= 48  # those on seams come with both tiles


def test_the_window_is_that_of_the_whole_slide() -> None:
    image = np.zeros((60, 200), np.uint16)
    image[:, :100], image[:, 100:] = 1000, 5000
    engine = ScriptedEngine(lambda tile: [])
    Segmenter(engine, manifest(intensity=IntensityRule("percentile", 0, 100)))(image)
    assert set(np.unique(engine.tiles[0])) == {0}
    assert set(np.unique(engine.tiles[-1])) == {255}


def test_what_is_found_is_told_in_a_line() -> None:
    assert repr(segmenter()(np.zeros((40, 50), np.uint8))) == "<Instances: 0 on 50 x 40 px>"


def test_the_name_of_a_file_is_no_array() -> None:
    name: Any = "a.png"
    with pytest.raises(ShapeError, match=r"'a.png' names a file.*open_source"):
        segmenter()(name)


def test_channels_are_named_whatever_the_case_unless_that_tells_them_apart() -> None:
    info = replace(slide(channels=3), channel_names=("DAPI", "gfp", "GFP"))
    assert [find_channel(info, name) for name in ("dapi", "DAPI", "gfp", "GFP", 2, None)] == [
        0,
        0,
        1,
        2,
        2,
        None,
    ]
    with pytest.raises(UsageError, match="no channel Gfp"):
        find_channel(info, "Gfp")


def test_a_channel_called_by_a_number_is_found_by_its_name_first() -> None:
    of_wavelengths = replace(slide(channels=3), channel_names=("405", "488", "561"))
    counted_from_one = replace(slide(channels=3), channel_names=("1", "2", "3"))
    assert [find_channel(of_wavelengths, name) for name in ("488", "2", 2)] == [1, 2, 2]
    assert [find_channel(counted_from_one, name) for name in ("1", "0", 1)] == [0, 0, 1]
    as_said = (RunOptions(channel="2"), RunOptions(channel=2))  # results of either are the same
    assert len({repr(asked_options(options, channel=2)) for options in as_said}) == 1
    assert asked_options(RunOptions(channel="1"), channel=0)["channel"] == 0


def test_a_channel_can_be_chosen() -> None:
    image = np.zeros((40, 40, 2), np.uint8)
    image[10:20, 12:24, 1] = 255
    assert len(segmenter(blob_box)(image, channel=0)) == 0
    assert segmenter(blob_box)(image, channel=1).boxes.tolist() == [[12, 10, 24, 20]]
    with pytest.raises(InputError, match="several channels"):
        segmenter(blob_box)(image)


@pytest.mark.parametrize(
    ("info", "options", "message"),
    [
        (slide(channels=1), {}, "has 1 channel, the model sees 2 separate channels; give an image with 2"),
        (slide(channels=3, is_rgb=True), {}, "has colours, the model sees 2 separate channels"),
        (slide(channels=2), {"channel": 1}, "--channel: the model sees 2 channels at once; leave it out"),
    ],
)
def test_a_model_of_two_channels_wants_two(info: SlideInfo, options: Any, message: str) -> None:
    engine = OracleEngine(tile_px=TILE_PX, channels=2)
    two = Segmenter(engine, make_oracle_manifest(engine, halo_px=HALO_PX))
    assert two.plan(slide(channels=2)).channel is None
    assert two.plan(slide(channels=5)).channel is None
    with pytest.raises((InputError, UsageError), match=message):
        two.plan(info, **options)


def test_a_model_of_three_channels_takes_three_but_does_not_choose_among_more() -> None:
    engine = OracleEngine(tile_px=TILE_PX, channels=3)
    three = Segmenter(engine, make_oracle_manifest(engine, halo_px=HALO_PX))
    assert three.plan(slide(channels=3)).channel is None
    for channels in (2, 4):
        with pytest.raises(InputError, match="several channels; choose one with channel=") as told:
            three.plan(slide(channels=channels))
        assert ("alpha" in str(told.value)) == (channels == 4)


def test_a_reader_counts_by_its_own_pixel_size_and_stays_open() -> None:
    image = np.zeros((120, 120), np.uint8)
    with ArrayReader(image, mpp=0.25) as reader:
        engine = ScriptedEngine(blob_box)
        Segmenter(engine, manifest(mpp=0.5))(reader)
        assert len(engine.tiles) == 4  # 60 network pixels, tiles of 48
        assert reader.read(whole(image), level=0).shape == (120, 120, 1)
    with ArrayReader(image) as reader, pytest.raises(InputError, match="no pixel size"):
        segmenter(blob_box, mpp=0.5)(reader)


def test_closing_closes_the_engine() -> None:
    with segmenter() as closing:
        engine: Any = closing.engine
        assert not engine.is_closed
    assert engine.is_closed


def test_what_is_larger_than_the_model_looks_for_is_not_reported():
    labels = np.zeros((40, 40), np.int32)
    labels[3:9, 3:9], labels[14:34, 14:34] = 1, 2
    engine = OracleEngine(tile_px=TILE_PX, channels=1, mask_px=64)
    manifest = make_oracle_manifest(engine, halo_px=HALO_PX)
    limited = replace(manifest, limits=replace(manifest.limits, max_diameter_px=10.0))
    pixels = encode_labels(labels, channels=1)[:, :, 0]
    assert len(Segmenter(engine, manifest)(pixels)) == 2
    found = Segmenter(engine, limited)(pixels)
    assert len(found) == 1
    assert np.array_equal(found.labels() > 0, labels == 1)
