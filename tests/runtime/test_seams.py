"""An object on a seam is reported by two tiles, seen slightly differently, and stays once."""

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.pipeline import run_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.seams import drop_twins, lies_near_seam
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import plan_tiles

SIZE_PX, STEP_PX = 10, 16
TILE_PX, HALO_PX = 64, 16  # cores of 32 px


class UnsteadyEngine(OracleEngine):
    """Sees every object up to 0.7 px off, in each tile otherwise, as a network does."""

    def __init__(self, seed, **options):
        super().__init__(**options)
        self.rng = np.random.default_rng(seed)

    def detect(self, tiles):
        found = super().detect(tiles)
        shift = self.rng.uniform(-0.7, 0.7, (*found.boxes.shape[:2], 2)).astype(np.float32)
        found.boxes[:] += np.tile(shift, 2)
        found.scores[found.scores > 0] = self.rng.uniform(0.6, 1.0, int((found.scores > 0).sum()))
        return found

    def masks(self, detections, boxes, tile_index):
        return np.ones((len(boxes), self.spec.mask_px, self.spec.mask_px), np.float32)


def squares(offset):
    """Return a tall label image of squares in rows, some with their centre on a seam."""
    labels = np.zeros((224, 96), np.int32)
    for number, (row, column) in enumerate(np.ndindex(13, 5)):
        y, x = STEP_PX * row + offset, STEP_PX * column + offset
        labels[y : y + SIZE_PX, x : x + SIZE_PX] = number + 1
    return labels


# at 11 every second centre lies on a seam, at 7 where a neighbour begins to report
@pytest.mark.parametrize("offset", [2, 7, 11])
@pytest.mark.parametrize("seed", range(3))
def test_every_object_is_found_once_however_unsteady_the_engine(tmp_path, offset, seed):
    labels = squares(offset)
    engine = UnsteadyEngine(seed, tile_px=TILE_PX, batch=1)
    manifest = make_oracle_manifest(engine, halo_px=HALO_PX)
    with Segmenter(engine, manifest) as segmenter, ArrayReader(encode_labels(labels)) as reader:
        found = segmenter.segment(reader, segmenter.plan(reader.info))
        written = run_slide(segmenter, reader, tmp_path)  # which resolves seams between rows by itself
    centres = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
    nearest = np.rint((centres - offset - SIZE_PX / 2) / STEP_PX).astype(int)
    assert len(found) == written.n_objects == 65
    assert len({tuple(place) for place in nearest.tolist()}) == 65


def test_only_pairs_of_different_tiles_are_one_object():
    box = shapely.box(0, 0, 10, 10)
    polygons = np.array([box, shapely.box(1, 0, 11, 10), shapely.box(0, 1, 10, 11)])
    scores = np.array([0.7, 0.8, 0.9])
    assert drop_twins(polygons, scores, np.array([3, 3, 3])).all()
    assert drop_twins(polygons, scores, np.array([3, 4, 3])).tolist() == [True, False, True]


def test_a_report_that_lies_in_a_better_one_for_more_than_half_is_the_same_object():
    pair, more_than_half = shapely.box(0, 0, 20, 10), shapely.box(9, 0, 21, 10)
    small = shapely.box(14, 2, 20, 8)  # all of it in the pair, IoU 0.18
    polygons, tiles = np.array([pair, small]), np.array([1, 2])
    assert drop_twins(polygons, np.array([0.9, 0.8]), tiles).tolist() == [True, False]
    assert drop_twins(polygons, np.array([0.8, 0.9]), tiles).tolist() == [
        True,
        True,
    ]  # the pair reaches beyond
    assert drop_twins(np.array([pair, more_than_half]), np.array([0.8, 0.9]), tiles).tolist() == [False, True]


def test_of_equal_scores_the_lower_tile_s_report_stays():
    polygons = np.array([shapely.box(0, 0, 10, 10)] * 3)
    assert drop_twins(polygons, np.full(3, 0.5), np.array([7, 2, 5])).tolist() == [False, True, False]


@given(st.permutations(range(8)), st.integers(0, 1000))
def test_the_order_of_work_decides_nothing(order, seed):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 12, (8, 2))
    polygons = shapely.box(corners[:, 0], corners[:, 1], corners[:, 0] + 10, corners[:, 1] + 10)
    scores, tiles = rng.random(8), rng.integers(0, 4, 8)
    kept = drop_twins(polygons, scores, tiles)
    order = np.array(order)
    assert drop_twins(polygons[order], scores[order], tiles[order]).tolist() == kept[order].tolist()


@pytest.mark.parametrize(("width", "height"), [(80, 400), (400, 80)])
def test_seams_lie_where_a_core_ends_and_the_slide_goes_on(width, height):
    for tile in plan_tiles(width, height, tile_px=TILE_PX, halo_px=HALO_PX):
        x0, y0, x1, y1 = tile.core.x0, tile.core.y0, tile.core.x1, tile.core.y1
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        corners = np.float32([[x0, y], [x, y0], [x1 - 1, y], [x, y1 - 1], [x, y]])
        boxes = np.hstack([corners, corners + 1]) * np.float32([2, 3, 2, 3])
        near = lies_near_seam(tile, boxes, factor=(2.0, 3.0), extent=(width, height))
        assert near.tolist() == [x0 > 0, y0 > 0, x1 < width, y1 < height, False]


def test_what_reaches_a_seam_is_near_it_wherever_its_centre_lies():
    tiles = plan_tiles(100, 80, tile_px=TILE_PX, halo_px=HALO_PX)  # the first core ends at 48
    long = np.float32([[10, 4, 41, 8], [10, 4, 39, 8]])  # its centre is far from the seam, its end is not
    assert lies_near_seam(tiles[0], long, factor=(1.0, 1.0), extent=(100, 80)).tolist() == [True, False]
