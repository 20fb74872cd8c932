"""Tiles that are looked at once more: large objects come whole, full tiles are split."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import DamagedPixelsError
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import SampledTile, TileSampler
from darcnn.runtime.second_look import quarter_tile
from darcnn.runtime.segmenter import Segmenter

TILE_PX, HALO_PX = 48, 8  # cores of 32 px; a second look shows 96


class BrightEngine:
    """Reports what is bright on a tile as one object; counts the tiles that it is shown."""

    def __init__(self, *, batch=1):
        self.spec = EngineSpec("bright", batch, TILE_PX, 1, 8, 8, 28)
        self.n_tiles = 0

    def detect(self, tiles):
        boxes, scores = np.zeros((len(tiles), 8, 4), np.float32), np.zeros((len(tiles), 8), np.float32)
        for index, tile in enumerate(tiles):
            self.n_tiles += 1
            ys, xs = np.nonzero(tile[:, :, 0] > 100)
            if xs.size:
                boxes[index, 0] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                scores[index, 0] = 0.9
        return Detections(boxes, scores, np.ones(len(tiles), np.bool_), None)

    def masks(self, detections, boxes, tile_index):
        return np.ones((len(boxes), 28, 28), np.float32)

    def close(self):
        """Nothing to release."""


class FewSlots(OracleEngine):
    """An oracle that reports the first objects of a tile that has more than it has slots for."""

    def detect(self, tiles):
        roomy = OracleEngine(tile_px=self.spec.tile_px, batch=self.spec.batch, detections=4096)
        found, n = roomy.detect(tiles), self.spec.detections
        return Detections(found.boxes[:, :n], found.scores[:, :n], found.converged, found.atlas)


def bright_segmenter(*, max_diameter_px=None, batch=1):
    manifest = make_oracle_manifest(OracleEngine(tile_px=TILE_PX, channels=1), halo_px=HALO_PX)
    limits = replace(manifest.limits, max_diameter_px=max_diameter_px)
    return Segmenter(BrightEngine(batch=batch), replace(manifest, limits=limits))


def one_object(x0, y0, x1, y1, *, side=300):
    image = np.zeros((side, side), np.uint8)
    image[y0:y1, x0:x1] = 255
    return image


def grid_of_squares(n, *, step=9, size=5):
    labels = np.zeros((n * step, n * step), np.int32)
    for number, (row, column) in enumerate(np.ndindex(n, n)):
        labels[step * row + 2 : step * row + 2 + size, step * column + 2 : step * column + 2 + size] = (
            number + 1
        )
    return labels


@given(x=st.integers(100, 200), y=st.integers(100, 200), width=st.integers(4, 58), height=st.integers(4, 58))
def test_an_object_larger_than_a_tile_is_found_whole_and_once_wherever_it_lies(x, y, width, height):
    box = [x - width // 2, y - height // 2, x - width // 2 + width, y - height // 2 + height]
    found = bright_segmenter()(one_object(*box))
    assert len(found) == 1
    assert not found.truncated.any()
    np.testing.assert_allclose(found.boxes[0], box, atol=1)


def test_no_second_look_is_taken_where_nothing_is_cut():
    segmenter = bright_segmenter()
    with ArrayReader(one_object(100, 100, 110, 110)) as reader:
        plan = segmenter.plan(reader.info)
        segmenter.segment(reader, plan)
    assert segmenter.engine.n_tiles == len(plan.tiles)


def test_the_batch_changes_nothing():
    image = one_object(90, 120, 150, 140)
    one, three = bright_segmenter(batch=1)(image), bright_segmenter(batch=3)(image)
    assert np.array_equal(one.boxes, three.boxes)
    assert np.array_equal(one.labels(), three.labels())


def test_an_object_that_turns_out_too_large_is_none_of_the_model_s():
    image = one_object(110, 110, 166, 166)
    assert len(bright_segmenter()(image)) == 1
    assert len(bright_segmenter(max_diameter_px=50.0)(image)) == 0  # no tile shows more than 48 of its 56 px


def test_without_what_lies_around_an_object_stays_cut():
    segmenter = bright_segmenter()
    with ArrayReader(one_object(110, 110, 166, 120)) as reader:
        plan = segmenter.plan(reader.info)
        sampler = segmenter.sampler(reader, plan, segmenter.measure(reader, plan))
        cut = [
            found
            for tile in plan.tiles
            for found in segmenter.segment_batch(plan, (300, 300), [tile], [sampler.read(tile)])
            if len(found)
        ]
    assert cut
    assert all(found.truncated.all() for found in cut)


def test_damage_around_a_tile_leaves_the_object_cut(monkeypatch):
    read = TileSampler.read

    def read_tiles_only(self, tile):
        if tile.read.width > TILE_PX:
            raise DamagedPixelsError("is damaged", where="slide", fix="copy it again")
        return read(self, tile)

    monkeypatch.setattr(TileSampler, "read", read_tiles_only)
    found = bright_segmenter()(one_object(110, 110, 166, 120))
    assert len(found)
    assert found.truncated.all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tile_with_more_objects_than_the_model_can_report_is_split(batch):
    labels = grid_of_squares(10)
    engine = FewSlots(tile_px=64, batch=batch, detections=30)  # a tile shows 49
    found = Segmenter(engine, make_oracle_manifest(engine, halo_px=10))(encode_labels(labels))
    assert len(found) == 100
    assert not found.is_saturated
    assert np.array_equal(found.labels() > 0, labels > 0)


def test_a_quarter_that_is_full_as_well_is_told():
    labels = grid_of_squares(14, step=6, size=3)
    engine = FewSlots(tile_px=64, detections=16)
    found = Segmenter(engine, make_oracle_manifest(engine, halo_px=10))(encode_labels(labels))
    assert found.is_saturated
    assert len(found) > 16


def test_quarters_part_the_core_and_show_nothing_twice():
    segmenter = bright_segmenter()
    image = np.random.default_rng(0).integers(0, 255, (300, 300)).astype(np.uint8)
    with ArrayReader(image) as reader:
        plan = segmenter.plan(reader.info)
        sampler = segmenter.sampler(reader, plan, segmenter.measure(reader, plan))
        tile = plan.tiles[len(plan.tiles) // 2]
        quarters = quarter_tile(SampledTile(plan, (300, 300), tile, sampler.read(tile)), HALO_PX)
    assert len(quarters) == 4
    assert sum(one.tile.core.width * one.tile.core.height for one in quarters) == 32 * 32
    for one in quarters:
        seen = one.tile.read
        assert (seen.width, seen.height) == (32, 32)  # 16 and twice the halo
        shown = one.pixels[: seen.height, : seen.width, 0]
        assert np.array_equal(shown, image[seen.y0 : seen.y1, seen.x0 : seen.x1])
        assert len(np.unique(one.pixels[seen.height :])) == 1


def test_what_the_larger_tile_does_not_show_is_no_object(monkeypatch):
    read = TileSampler.read

    def read_nothing_around(self, tile):
        pixels = read(self, tile)
        return pixels if tile.read.width == TILE_PX else np.zeros_like(pixels)

    monkeypatch.setattr(TileSampler, "read", read_nothing_around)
    assert len(bright_segmenter()(one_object(110, 110, 166, 120))) == 0
