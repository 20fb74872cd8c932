"""Masks and outlines: they agree, and they lie where the probabilities say."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.geometry import Region
from darcnn.runtime.outlines import Outlined, outline_crops, outline_probabilities
from darcnn.runtime.polygons import draw_polygon

FAST = settings(deadline=None, max_examples=100)

# twentieths hit 0.5 exactly, where contours touch themselves
grids = hnp.arrays(np.float32, (6, 6), elements=st.integers(0, 20).map(lambda n: n / 20))
corners = st.floats(-20, 50, width=32)
sides = st.floats(0.125, 40, width=32)
boxes_in_view = st.tuples(corners, corners, sides, sides).map(
    lambda box: np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]], np.float32)
)


def outline(grid: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> Outlined | None:
    """Return the outline of one object."""
    (found,) = outline_probabilities(grid[None], box[None], shape)
    return found


@FAST
@given(grids, boxes_in_view)
def test_mask_and_outline_always_agree(grid: np.ndarray, box: np.ndarray) -> None:
    found = outline(grid, box, (40, 45))
    if found is None:
        return
    (x0, y0), mask, ring = found
    polygon = shapely.Polygon(ring)
    assert polygon.is_valid
    assert (ring[0] == ring[-1]).all()
    assert shapely.box(0, 0, 45, 40).covers(polygon)
    # trimmed to its own extent
    assert mask.any(axis=0)[[0, -1]].all()
    assert mask.any(axis=1)[[0, -1]].all()
    whole = draw_polygon(ring, Region(-5, -5, 60, 60))
    expected = np.zeros_like(whole)
    expected[y0 + 5 : y0 + 5 + mask.shape[0], x0 + 5 : x0 + 5 + mask.shape[1]] = mask
    assert np.array_equal(whole, expected)


@FAST
@given(grids, boxes_in_view)
def test_drawing_is_point_in_polygon(grid: np.ndarray, box: np.ndarray) -> None:
    found = outline(grid, box, (40, 45))
    if found is None:
        return
    polygon = shapely.Polygon(found[2])
    xs, ys = np.meshgrid(np.arange(45) + 0.5, np.arange(40) + 0.5)
    is_clear = shapely.distance(polygon.exterior, shapely.points(xs, ys)) > 1e-9
    drawn = draw_polygon(found[2], Region(0, 0, 45, 40))
    assert np.array_equal(drawn[is_clear], shapely.contains_xy(polygon, xs, ys)[is_clear])


def test_a_soft_disc_comes_back_at_its_size_and_place() -> None:
    at = (np.arange(28) + 0.5) / 28 - 0.5
    probabilities = 1 / (1 + np.exp((np.hypot(at[None], at[:, None]) - 0.4) * 40))
    box = np.array([100.3, 50.7, 160.3, 110.7], np.float32)
    found = outline(probabilities.astype(np.float32), box, (300, 300))
    assert found is not None
    polygon = shapely.Polygon(found[2])
    assert polygon.area == pytest.approx(np.pi * 24**2, rel=0.01)
    assert polygon.centroid.distance(shapely.Point(130.3, 80.7)) < 0.1
    assert found[1].sum() == pytest.approx(polygon.area, rel=0.01)


def test_a_binary_mask_at_its_own_size_is_exact() -> None:
    grid = np.zeros((8, 8), np.float32)
    grid[1:5, 2:7] = 1
    grid[4, 2] = 0
    found = outline(grid, np.array([10, 20, 18, 28], np.float32), (100, 100))
    assert found is not None
    assert found[0].tolist() == [12, 21]
    assert np.array_equal(found[1], grid[1:5, 2:7] > 0)


def test_the_largest_part_stays_and_holes_are_filled() -> None:
    grid = np.zeros((12, 12), np.float32)
    grid[1:8, 1:8] = 1
    grid[4, 4] = 0
    grid[10:12, 10:12] = 1
    found = outline(grid, np.array([0, 0, 12, 12], np.float32), (12, 12))
    assert found is not None
    assert found[1].shape == (7, 7)
    assert found[1].all()


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 5], [5, 5, 4, 4], [0.6, 0.6, 1.4, 1.4], [50, 0, 60, 9], [-9, -9, -1, -1]]
)
def test_a_box_without_a_pixel_has_no_mask(box: list[float]) -> None:
    assert outline(np.ones((4, 4), np.float32), np.array(box, np.float32), (20, 20)) is None


def test_an_outline_that_would_touch_itself_is_made_simple() -> None:
    grid = np.ones((5, 5), np.float32)
    grid[2, 1:4] = 0
    grid[2, 4] = 0.5  # the outline meets itself in the centre of this pixel
    found = outline(grid, np.array([0, 0, 5, 5], np.float32), (5, 5))
    assert found is not None
    assert shapely.Polygon(found[2]).is_valid
    assert found[1][[0, 1, 3, 4]].all()


def test_low_probabilities_have_no_mask() -> None:
    assert outline(np.full((4, 4), 0.5, "f4"), np.array([0, 0, 9, 9], "f4"), (20, 20)) is None


@FAST
@given(st.lists(st.tuples(grids, boxes_in_view), max_size=9))
def test_an_object_looks_the_same_whoever_is_with_it(objects: list[tuple[np.ndarray, np.ndarray]]) -> None:
    boxes = np.array([box for _, box in objects], np.float32).reshape(-1, 4)
    masks = np.array([grid for grid, _ in objects], np.float32).reshape(-1, 6, 6)
    together = outline_probabilities(masks, boxes, (40, 45))
    for found, mask, box in zip(together, masks, boxes, strict=True):
        alone = outline(mask, box, (40, 45))
        assert (found is None) == (alone is None)
        if found is not None and alone is not None:
            assert np.array_equal(found[0], alone[0])
            assert np.array_equal(found[1], alone[1])
            assert np.array_equal(found[2], alone[2])


def test_wide_objects_and_narrow_ones_in_any_order_come_back_in_theirs() -> None:
    random = np.random.default_rng(3)
    sizes = random.integers(1, 90, (300, 2))
    origins = random.integers(0, 900, (300, 2))
    boxes = np.concatenate([origins, origins + sizes], axis=1).astype(np.float32)
    found = outline_probabilities(np.ones((300, 5, 5), np.float32), boxes, (1000, 1000))
    for one, origin, size in zip(found, origins, sizes, strict=True):
        assert one is not None
        assert one[0].tolist() == origin.tolist()
        assert one[1].all()
        assert one[1].shape == tuple(size[::-1])
    crops = [np.ones(size[::-1], bool) for size in sizes]
    for ring, origin, size in zip(outline_crops(crops, origins), origins, sizes, strict=True):
        assert shapely.Polygon(ring).bounds == pytest.approx((*origin, *(origin + size)))


def test_what_is_no_number_is_not_in_the_object() -> None:
    grid = np.ones((4, 4), np.float32)
    grid[:, 0] = np.nan
    found = outline(grid, np.array([0, 0, 4, 4], np.float32), (9, 9))
    assert found is not None
    assert found[0].tolist() == [1, 0]
    assert found[1].shape == (4, 3)


def test_no_objects_have_no_outlines() -> None:
    assert outline_probabilities(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4)), (9, 9)) == []
    assert outline_crops([], np.zeros((0, 2), np.int64)) == []
