"""Box arithmetic against slow, literal twins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.boxes import clip_boxes, decode_deltas, non_maximum_suppression, pairwise_iou
from darcnn.runtime.errors import ShapeError

FAST = settings(deadline=None, max_examples=60)


@st.composite
def integer_boxes(draw: st.DrawFn, most: int = 12) -> np.ndarray:
    corner = st.integers(0, 12)
    side = st.integers(0, 8)
    rows = draw(st.lists(st.tuples(corner, corner, side, side), max_size=most))
    return np.array([(x, y, x + w, y + h) for x, y, w, h in rows], np.float32).reshape(-1, 4)


def pixel_set(box: np.ndarray) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = (int(v) for v in box)
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


@FAST
@given(integer_boxes(), integer_boxes())
def test_iou_is_that_of_the_pixels(a: np.ndarray, b: np.ndarray) -> None:
    found = pairwise_iou(a, b)
    assert found.shape == (len(a), len(b))
    assert found.dtype == np.float32
    for i, box in enumerate(a):
        for j, other in enumerate(b):
            one, two = pixel_set(box), pixel_set(other)
            expected = len(one & two) / len(one | two) if one | two else 0.0
            assert found[i, j] == pytest.approx(expected, abs=1e-6)


@FAST
@given(integer_boxes(), st.data())
def test_suppression_is_greedy(boxes: np.ndarray, data: st.DataObject) -> None:
    scores = np.array(
        data.draw(st.lists(st.integers(0, 4), min_size=len(boxes), max_size=len(boxes))), np.float32
    )
    threshold = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    expected: list[int] = []
    for index in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        iou = pairwise_iou(boxes[[index]], boxes[expected])
        if not (iou > threshold).any():
            expected.append(index)
    assert non_maximum_suppression(boxes, scores, threshold).tolist() == expected


def test_equal_scores_keep_the_lower_index() -> None:
    boxes = np.array([[0, 0, 4, 4]] * 3, np.float32)
    assert non_maximum_suppression(boxes, np.ones(3, np.float32), 0.5).tolist() == [0]


def test_deltas_that_encode_a_box_decode_to_it() -> None:
    rng = np.random.default_rng(3)
    anchors = np.concatenate([c := rng.uniform(0, 50, (20, 2)), c + rng.uniform(4, 40, (20, 2))], axis=1)
    boxes = np.concatenate([c := rng.uniform(0, 50, (20, 2)), c + rng.uniform(4, 40, (20, 2))], axis=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    size, target = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / size
    deltas = np.concatenate([shift, np.log(target / size)], axis=1) * weights
    decoded = decode_deltas(deltas.astype(np.float32), anchors.astype(np.float32), weights)
    np.testing.assert_allclose(decoded, boxes, atol=1e-4)


def test_a_wild_scale_is_capped() -> None:
    decoded = decode_deltas(np.array([[0, 0, 99, 0]], "f4"), np.array([[0, 0, 16, 16]], "f4"))
    assert decoded[0, 2] - decoded[0, 0] == pytest.approx(1000, rel=1e-5)
    assert math.isclose(decoded[0, 3] - decoded[0, 1], 16)


def test_clipped_boxes_lie_on_the_image() -> None:
    boxes = np.array([[-3, -3, 4, 5], [8, 8, 20, 9], [30, 30, 40, 40]], np.float32)
    expected = [[0, 0, 4, 5], [8, 7, 10, 7], [10, 7, 10, 7]]
    assert clip_boxes(boxes, 10, 7).tolist() == expected


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        pairwise_iou(np.zeros(3, "f4"), np.zeros((1, 4), "f4"))
    with pytest.raises(ShapeError, match="2 boxes"):
        non_maximum_suppression(np.zeros((2, 4), "f4"), np.zeros(3, "f4"), 0.5)
    with pytest.raises(ShapeError, match="1 deltas for 2 anchors"):
        decode_deltas(np.zeros((1, 4), "f4"), np.zeros((2, 4), "f4"))
