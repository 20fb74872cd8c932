"""Masks and outlines: they agree, and they lie where the probabilities say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import draw_polygon, draw_polygons, drop_covered, label_instances, outline_mask

FAST = settings(deadline=None, max_examples=100)

# twentieths hit 0.5 exactly, where contours touch themselves
grids = hnp.arrays(np.float32, (6, 6), elements=st.integers(0, 20).map(lambda n: n / 20))
corners = st.floats(-20, 50, width=32)
sides = st.floats(0.125, 40, width=32)


@FAST
@given(grids, corners, corners, sides, sides)
def test_mask_and_outline_always_agree(grid: np.ndarray, x: float, y: float, w: float, h: float) -> None:
    found = outline_mask(grid, np.array([x, y, x + w, y + h], np.float32), (40, 45))
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
@given(grids, corners, corners, sides, sides)
def test_drawing_is_point_in_polygon(grid: np.ndarray, x: float, y: float, w: float, h: float) -> None:
    found = outline_mask(grid, np.array([x, y, x + w, y + h], np.float32), (40, 45))
    if found is None:
        return
    polygon = shapely.Polygon(found[2])
    xs, ys = np.meshgrid(np.arange(45) + 0.5, np.arange(40) + 0.5)
    is_clear = shapely.distance(polygon.exterior, shapely.points(xs, ys)) > 1e-9
    drawn = draw_polygon(found[2], Region(0, 0, 45, 40))
    assert np.array_equal(drawn[is_clear], shapely.contains_xy(polygon, xs, ys)[is_clear])


def test_drawing_holds_for_long_edges_and_crops() -> None:
    ring = np.array([[3.2, -4.0], [30.0, 11.0], [7.5, 25.3], [9.0, 9.0], [3.2, -4.0]])
    xs, ys = np.meshgrid(np.arange(5, 20) + 0.5, np.arange(2, 22) + 0.5)
    expected = shapely.contains_xy(shapely.Polygon(ring), xs, ys)
    assert expected.any()
    assert np.array_equal(draw_polygon(ring, Region(5, 2, 20, 22)), expected)
    assert np.array_equal(draw_polygon(ring[::-1], Region(5, 2, 20, 22)), expected)


def test_many_polygons_are_drawn_as_each_alone() -> None:
    generator = np.random.default_rng(8)
    rings, regions = [], []
    for number in range(40):
        angles = np.sort(generator.uniform(0, 2 * np.pi, 3 + number % 9))
        ring = generator.uniform(0, 40, 2) + generator.uniform(0.2, 12) * np.stack(
            [np.cos(angles), np.sin(angles)], axis=1
        )
        rings.append(np.concatenate([ring, ring[:1]]))
        low, high = np.floor(ring.min(axis=0)), np.ceil(ring.max(axis=0))
        regions.append([*(low + number % 2), *(np.maximum(high - number % 3, low + 2))])  # some are cropped
    owner = np.repeat(np.arange(40), [len(ring) for ring in rings])
    corners = np.array(regions, np.int64)
    polygon, y, x = draw_polygons(np.concatenate(rings), owner, corners)
    for number, ring in enumerate(rings):
        x0, y0, x1, y1 = corners[number].tolist()
        alone = np.argwhere(draw_polygon(ring, Region(x0, y0, x1, y1))) + np.array([y0, x0])
        mine = polygon == number
        assert np.array_equal(np.stack([y[mine], x[mine]], axis=1), alone)
    assert len(polygon) > 1000


def test_a_soft_disc_comes_back_at_its_size_and_place() -> None:
    at = (np.arange(28) + 0.5) / 28 - 0.5
    probabilities = 1 / (1 + np.exp((np.hypot(at[None], at[:, None]) - 0.4) * 40))
    box = np.array([100.3, 50.7, 160.3, 110.7], np.float32)
    found = outline_mask(probabilities.astype(np.float32), box, (300, 300))
    assert found is not None
    polygon = shapely.Polygon(found[2])
    assert polygon.area == pytest.approx(np.pi * 24**2, rel=0.01)
    assert polygon.centroid.distance(shapely.Point(130.3, 80.7)) < 0.1
    assert found[1].sum() == pytest.approx(polygon.area, rel=0.01)


def test_a_binary_mask_at_its_own_size_is_exact() -> None:
    grid = np.zeros((8, 8), np.float32)
    grid[1:5, 2:7] = 1
    grid[4, 2] = 0
    found = outline_mask(grid, np.array([10, 20, 18, 28], np.float32), (100, 100))
    assert found is not None
    assert found[0].tolist() == [12, 21]
    assert np.array_equal(found[1], grid[1:5, 2:7] > 0)


def test_the_largest_part_stays_and_holes_are_filled() -> None:
    grid = np.zeros((12, 12), np.float32)
    grid[1:8, 1:8] = 1
    grid[4, 4] = 0
    grid[10:12, 10:12] = 1
    found = outline_mask(grid, np.array([0, 0, 12, 12], np.float32), (12, 12))
    assert found is not None
    assert found[1].shape == (7, 7)
    assert found[1].all()


@pytest.mark.parametrize(
    "box", [[0, 0, 0, 5], [5, 5, 4, 4], [0.6, 0.6, 1.4, 1.4], [50, 0, 60, 9], [-9, -9, -1, -1]]
)
def test_a_box_without_a_pixel_has_no_mask(box: list[float]) -> None:
    assert outline_mask(np.ones((4, 4), np.float32), np.array(box, np.float32), (20, 20)) is None


def test_an_outline_that_would_touch_itself_is_made_simple() -> None:
    grid = np.ones((5, 5), np.float32)
    grid[2, 1:4] = 0
    grid[2, 4] = 0.5  # the outline meets itself in the centre of this pixel
    found = outline_mask(grid, np.array([0, 0, 5, 5], np.float32), (5, 5))
    assert found is not None
    assert shapely.Polygon(found[2]).is_valid
    assert found[1][[0, 1, 3, 4]].all()


def test_low_probabilities_have_no_mask() -> None:
    assert outline_mask(np.full((4, 4), 0.5, "f4"), np.array([0, 0, 9, 9], "f4"), (20, 20)) is None


def grow(random: np.random.Generator, n_pixels: int) -> np.ndarray:
    """Return a 12 x 12 object that hangs together by sides, without holes."""
    grid = np.zeros((12, 12), bool)
    grid[6, 6] = True
    while grid.sum() < n_pixels:
        y, x = random.integers(1, 11, 2)
        if grid[y - 1 : y + 2, x].any() or grid[y, x - 1 : x + 2].any():
            grid[y, x] = True
    outside = np.zeros((14, 14), bool)
    outside[0, 0] = True
    free = ~np.pad(grid, 1)
    for _ in range(200):  # the ground spreads over sides and corners
        near = np.pad(outside, 1)
        outside = free & np.max([near[i : i + 14, j : j + 14] for i in range(3) for j in range(3)], axis=0)
    return ~outside[1:-1, 1:-1]


@pytest.mark.parametrize("seed", range(20))
def test_the_outline_of_a_label_redraws_its_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = np.zeros((24, 36), np.int32)
    for label, (y, x) in zip((5, 2, 900), ((0, 0), (12, 11), (3, 24)), strict=True):
        labels[y : y + 12, x : x + 12][grow(random, int(random.integers(1, 60)))] = label
    instances = label_instances(labels)
    assert len(instances) == 3
    for label, ring in zip((2, 5, 900), instances.outlines, strict=True):
        assert shapely.Polygon(ring).is_valid
        assert np.array_equal(draw_polygon(ring, Region(0, 0, 36, 24)), labels == label)
    assert np.array_equal(instances.labels() > 0, labels > 0)
    assert [int((instances.labels() == k).sum()) for k in (1, 2, 3)] == [
        int((labels == name).sum()) for name in (2, 5, 900)
    ]


def test_labels_need_two_axes_and_may_be_absent() -> None:
    assert len(label_instances(np.zeros((4, 5), int))) == 0
    with pytest.raises(ShapeError, match="label image"):
        label_instances(np.zeros((4, 5, 1), int))


def squares(*placed: tuple[int, int, int, float]) -> Instances:
    """Return squares (x, y, side, score) on a 40 x 40 image, one object each."""
    parts = []
    for x, y, side, score in placed:
        labels = np.zeros((40, 40), np.int32)
        labels[y : y + side, x : x + side] = 1
        one = label_instances(labels)
        parts.append(replace(one, scores=np.array([score], np.float32)))
    return Instances.concatenate((40, 40), parts)


@pytest.mark.parametrize(
    ("placed", "kept"),
    [
        ([(0, 0, 10, 0.6), (2, 2, 4, 0.9)], [0, 1]),  # the whole keeps most of itself
        ([(0, 0, 10, 0.9), (2, 2, 4, 0.6)], [0]),  # a part of what was found already
        ([(0, 0, 10, 0.9), (5, 0, 10, 0.8)], [0, 1]),  # exactly half is not more than half
        ([(0, 0, 10, 0.9), (4, 0, 10, 0.8)], [0]),
        ([(0, 0, 10, 0.9), (4, 0, 10, 0.8), (9, 0, 10, 0.7)], [0, 2]),  # what is dropped covers nothing
        ([(4, 0, 10, 0.8), (0, 0, 10, 0.8)], [0]),  # of equal scores the earlier
        ([(30, 30, 5, 0.9), (1, 2, 5, 0.8)], [0, 1]),
    ],
)
def test_what_lies_mostly_in_better_objects_is_dropped(
    placed: list[tuple[int, int, int, float]], kept: list[int]
) -> None:
    given_objects = squares(*placed)
    found = drop_covered(given_objects)
    assert found.boxes.tolist() == given_objects.boxes[kept].tolist()


@FAST
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 10), st.floats(0.1, 1))))
def test_dropping_what_is_covered_leaves_nothing_more_to_drop(
    placed: list[tuple[int, int, int, float]],
) -> None:
    once = drop_covered(squares(*placed))
    assert drop_covered(once).boxes.tolist() == once.boxes.tolist()
    # a pixel of anything dropped for the most part still belongs to an object
    assert len(once) == len(np.unique(once.labels())) - 1
