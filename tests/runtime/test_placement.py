"""Where what a network saw on a tile lies: at the edges of tile and slide, each axis by itself."""

import numpy as np
import pytest

from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.placement import is_cut, is_small_enough, lies_inside, place
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter

WHOLE, NOTHING = np.ones((7, 7), np.float32), np.zeros((7, 7), np.float32)
NOMINAL_PX = 14.0


def plan_of(width, height, *, scale=1.0):
    engine = OracleEngine(tile_px=48, mask_px=int(2 * NOMINAL_PX), channels=1)
    with (
        Segmenter(engine, make_oracle_manifest(engine, halo_px=8)) as segmenter,
        ArrayReader(np.zeros((height, width), np.uint8)) as reader,
    ):
        return segmenter.plan(reader.info, diameter_px=NOMINAL_PX / scale)


def place_on(plan, shape, *found):
    """Place what the first tile of a plan shows: boxes, scores and masks."""
    boxes, scores, masks = (np.array(part, np.float32) for part in zip(*found, strict=True))
    return place(plan, shape, plan.tiles[0], boxes, scores, masks, is_saturated=False)


def test_beyond_every_edge_lie_mirror_images_and_what_is_wider_than_the_slide_need_only_cover_it():
    beyond = [[4, -7, 10, 1], [4, 31, 10, 39], [-7, 4, 1, 10], [31, 4, 39, 10]]
    on_it = [[4, -5, 10, 5], [4, 27, 10, 37], [-40, 4, 99, 10]]
    assert lies_inside(np.array([*beyond, *on_it], float), 32, 32).tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize(("width", "height"), [(100, 300), (300, 100)])
def test_a_box_is_cut_by_each_edge_of_its_tile_beyond_which_the_slide_goes_on(width, height):
    boxes = np.float32([[0.8, 20, 9, 30], [20, 0.8, 30, 9], [40, 20, 47.2, 30], [20, 40, 30, 47.2]])
    plan = plan_of(width, height)
    for tile in plan.tiles:
        read = tile.read
        goes_on = [read.x0 > 0, read.y0 > 0, read.x1 < width, read.y1 < height]
        assert is_cut(boxes, tile, plan).tolist() == goes_on


def test_size_is_the_geometric_mean_of_both_sides():
    boxes = np.float32([[0, 0, 100, 25], [0, 0, 52, 52]])
    assert is_small_enough(boxes, 51.0).tolist() == [True, False]


def test_what_has_no_pixel_takes_its_score_and_its_marks_along():
    empty, cut, whole = [10, 5, 20, 15], [36, 5, 48, 15], [20, 20, 30, 40]
    found = place_on(
        plan_of(100, 90), (90, 100), (empty, 0.9, NOTHING), (cut, 0.8, WHOLE), (whole, 0.7, WHOLE)
    )
    assert found.scores.tolist() == pytest.approx([0.8, 0.7])
    assert found.truncated.tolist() == [True, False]
    assert found.boxes.tolist() == [cut, whole]


def test_a_part_that_lies_in_a_whole_is_no_object_of_its_own():
    whole, part = [5, 5, 45, 45], [12, 12, 24, 24]
    assert len(place_on(plan_of(100, 90), (90, 100), (whole, 0.9, WHOLE), (part, 0.8, WHOLE))) == 1


def test_each_axis_has_a_factor_of_its_own():
    plan = plan_of(10, 130, scale=1 / 3)  # 3 x 43 network pixels
    found = place_on(plan, (130, 10), ([0, 30, 3, 43], 0.9, WHOLE))
    np.testing.assert_allclose(found.boxes, [[0, 30 * 130 / 43, 10, 130]], rtol=1e-5)
