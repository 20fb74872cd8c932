"""Tiles seen from several sides: nothing is displaced, and what most views find is what is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.engines.protocol import Detections, Engine, EngineSpec
from darcnn.runtime.engines.views import View, ViewsEngine, choose_views, look_from_sides, vote
from darcnn.runtime.errors import UsageError
from darcnn.runtime.load import load
from darcnn.runtime.segmenter import Segmenter

FAST = settings(deadline=None, max_examples=40)
SIDE_PX = 16
ALL_VIEWS = [View(quarters, is_mirrored) for quarters in range(4) for is_mirrored in (False, True)]
IMAGE = Path(__file__).parents[1] / "data" / "target" / "u2os_1f6b7cead1.png"


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x0, y0 = draw(st.integers(0, SIDE_PX - 1)), draw(st.integers(0, SIDE_PX - 1))
    return x0, y0, draw(st.integers(x0 + 1, SIDE_PX)), draw(st.integers(y0 + 1, SIDE_PX))


@FAST
@given(boxes(), st.sampled_from(ALL_VIEWS))
def test_a_box_goes_with_its_pixels_and_comes_back(box: tuple[int, int, int, int], view: View) -> None:
    x0, y0, x1, y1 = box
    tile = np.zeros((1, SIDE_PX, SIDE_PX, 1), np.uint8)
    tile[0, y0:y1, x0:x1] = 1
    there = view.boxes(np.array([box], np.float32), SIDE_PX)
    ys, xs = np.nonzero(view.tiles(tile)[0, :, :, 0])
    assert there.tolist() == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
    assert view.boxes_back(there, SIDE_PX).tolist() == [list(box)]


@pytest.mark.parametrize("view", ALL_VIEWS)
def test_a_mask_comes_back_as_its_tile_went(view: View) -> None:
    cells = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    seen = view.tiles(cells[..., None])[..., 0].astype(np.float32)
    assert np.array_equal(view.masks_back(seen), cells)


def test_the_views_differ_and_the_first_is_the_tile_as_it_is() -> None:
    assert choose_views(4)[0] == View(0, False)
    assert len(set(choose_views(4))) == 4
    tile = np.arange(SIDE_PX**2, dtype=np.uint8).reshape(1, SIDE_PX, SIDE_PX, 1)
    assert np.array_equal(choose_views(2)[1].tiles(tile), tile.swapaxes(1, 2))
    with pytest.raises(UsageError, match="pass one of 1, 2, 4"):
        choose_views(8)


# votes

A, A_NEAR = (0, 0, 10, 10), (0, 0, 10, 12)
PAIR = (0, 0, 20, 10)  # A and its neighbour taken for one
B = (10, 0, 20, 10)


def votes_of(*views: dict[tuple[int, int, int, int], float]) -> dict[tuple[float, ...], float]:
    found = vote(
        [np.array(list(view), np.float32).reshape(-1, 4) for view in views],
        [np.array(list(view.values()), np.float32) for view in views],
        nms_threshold=0.4,
    )
    assert (np.diff(found[1]) <= 0).all()
    rounded = [round(float(score), 4) for score in found[1]]
    return dict(zip(map(tuple, found[0].round(4).tolist()), rounded, strict=True))


def test_what_half_of_the_views_find_is_reported_with_the_score_that_they_give() -> None:
    assert votes_of({A: 0.9}, {A: 0.7}, {}, {}) == {A: 0.7}
    assert votes_of({A: 0.9}, {}, {}, {}) == {}
    assert votes_of({A: 0.9}, {}) == {A: 0.9}
    assert votes_of({}, {}) == {}


def test_the_box_is_the_mean_by_score() -> None:
    assert votes_of({A: 0.9}, {A_NEAR: 0.3}) == {(0.0, 0.0, 10.0, 10.5): 0.9}


def test_two_that_one_view_takes_for_one_stay_two() -> None:
    apart = {A: 0.8, B: 0.8}
    assert votes_of({PAIR: 0.99}, apart, apart, apart).keys() == {A, B}


@FAST
@given(st.lists(st.tuples(boxes(), st.floats(0.05, 1.0)), max_size=12), st.sampled_from([2, 4]))
def test_views_that_agree_report_what_suppression_keeps(found: list, n_views: int) -> None:
    one = dict(found)
    agreed, alone = votes_of(*[one] * n_views), votes_of(one)
    assert agreed.keys() == alone.keys()
    assert agreed == pytest.approx(alone, abs=1e-3)


# the engine


@FAST
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4]), st.integers(1, 3))
def test_an_oracle_gives_back_every_object_from_all_sides(seed: int, n_views: int, batch: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.zeros((70, 90), np.int32)
    for name in range(1, 20):
        y, x = random.integers(1, (60, 80))
        h, w = random.integers(1, 8, 2)
        if not labels[y - 1 : y + h + 1, x - 1 : x + w + 1].any():
            labels[y : y + h, x : x + w] = name
            labels[y, x] = 0 if min(h, w) > 1 else name
    oracle = OracleEngine(tile_px=48, batch=batch, detections=500)
    manifest = make_oracle_manifest(oracle, halo_px=12)
    engine = look_from_sides(oracle, n_views, manifest.limits)
    assert isinstance(engine, Engine)
    assert (engine.spec.views, engine.spec.name) == (n_views, f"oracle, {n_views} views")
    found = Segmenter(engine, manifest)(encode_labels(labels)).labels()
    assert np.array_equal(found > 0, labels > 0)
    assert len(np.unique(found)) == len(np.unique(labels))


class Forgetful:
    """An engine whose features last until its next `detect`, as those on a GPU."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.last, self.is_closed = engine, None, False

    @property
    def spec(self) -> EngineSpec:
        return replace(self.engine.spec, keeps_atlas=False)

    def detect(self, tiles: np.ndarray) -> Detections:
        self.last = self.engine.detect(tiles)
        return replace(self.last, atlas=None)

    def masks(self, detections: Detections, boxes: np.ndarray, tile_index: np.ndarray) -> np.ndarray:
        return self.engine.masks(self.last, boxes, tile_index)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def model() -> Segmenter:
    with load("nuclei-fluorescence", device="cpu", backend="onnxruntime") as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def tile() -> np.ndarray:
    raw = np.asarray(Image.open(IMAGE).convert("L").crop((0, 0, 300, 300)).resize((512, 512)), np.float32)
    pixels = np.clip(raw / np.percentile(raw, 99.8) * 255, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels[None, :, :, None])


def look(engine: Engine, tile: np.ndarray, n_views: int, threshold: float = 0.5) -> tuple[np.ndarray, ...]:
    seen = ViewsEngine(engine, choose_views(n_views), nms_threshold=threshold)
    found = seen.detect(tile)
    good = found.scores[0] > 0.7
    boxes, index = found.boxes[0, good], np.zeros(int(good.sum()), np.int64)
    return boxes, found.scores[0, good], seen.masks(found, boxes, index)


def test_a_mirror_image_has_the_mirrored_objects(model: Segmenter, tile: np.ndarray) -> None:
    boxes, scores, masks = look(model.engine, tile, 2)
    assert len(boxes) > 3
    other_boxes, other_scores, other_masks = look(model.engine, tile.swapaxes(1, 2), 2)
    order = np.lexsort(boxes.round(2).T), np.lexsort(other_boxes[:, [1, 0, 3, 2]].round(2).T)
    assert np.allclose(boxes[order[0]], other_boxes[order[1]][:, [1, 0, 3, 2]], atol=1e-2)
    assert np.allclose(scores[order[0]], other_scores[order[1]], atol=1e-4)
    assert np.allclose(masks[order[0]], other_masks[order[1]].swapaxes(1, 2), atol=1e-3)


def test_features_that_do_not_last_are_computed_again(model: Segmenter, tile: np.ndarray) -> None:
    engine = Forgetful(model.engine)
    for one, other in zip(look(model.engine, tile, 4), look(engine, tile, 4), strict=True):
        assert np.array_equal(one, other)
    ViewsEngine(engine, choose_views(2), nms_threshold=0.5).close()
    assert engine.is_closed


def test_one_view_is_the_engine_itself(model: Segmenter) -> None:
    assert look_from_sides(model.engine, 1, model.manifest.limits) is model.engine
    with pytest.raises(UsageError, match="--views: no set of 3 views"):
        load("nuclei-fluorescence", views=3)
