"""Masks of many objects: label images, and what is covered by better objects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Region
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import drop_covered, label_instances
from darcnn.runtime.polygons import draw_polygon

FAST = settings(deadline=None, max_examples=100)


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


def test_a_label_in_the_box_of_another_is_no_part_of_it() -> None:
    found = label_instances(np.array([[1, 1, 1], [1, 2, 1], [1, 1, 1]]))
    assert [int(mask.sum()) for mask in found.masks] == [8, 1]


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
        ([(0, 0, 10, 0.9), (4, 0, 10, 0.8), (7, 0, 10, 0.7)], [0, 2]),  # what is dropped covers nothing
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
