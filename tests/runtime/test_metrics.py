"""The metrics against a literal reading of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.metrics import aggregate_scores, mean_scores, score_labels

FAST = settings(deadline=None, max_examples=150)

label_maps = hnp.arrays(np.int32, (5, 6), elements=st.sampled_from([0, 0, 1, 2, 3, 7]))


def objects(labels: np.ndarray) -> list[set[int]]:
    flat = labels.reshape(-1)
    return [set(np.flatnonzero(flat == name).tolist()) for name in np.unique(flat) if name != 0]


def literal_aji(truth: np.ndarray, prediction: np.ndarray) -> float:
    found = objects(prediction)
    shared = union = 0
    taken: set[int] = set()
    for true in objects(truth):
        iou = [len(true & other) / len(true | other) for other in found]
        if not iou or max(iou) == 0:
            union += len(true)
            continue
        best = iou.index(max(iou))
        taken.add(best)
        shared += len(true & found[best])
        union += len(true | found[best])
    union += sum(len(other) for index, other in enumerate(found) if index not in taken)
    return shared / union if union else 1.0


def literal_object_f1(truth: np.ndarray, prediction: np.ndarray) -> float:
    true, found = objects(truth), objects(prediction)
    hits = sum(len(a & b) / len(a | b) > 0.5 for a in true for b in found)
    return 2 * hits / (len(true) + len(found)) if true or found else 1.0


def literal_max_iou(truth: np.ndarray, prediction: np.ndarray) -> float:
    true, found = objects(truth), objects(prediction)
    if not true:
        return 0.0 if found else 1.0
    return float(np.mean([max((len(a & b) / len(a | b) for b in found), default=0.0) for a in true]))


def literal_pixel_f1(truth: np.ndarray, prediction: np.ndarray) -> float:
    a, b = truth > 0, prediction > 0
    return 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1.0


@FAST
@given(label_maps, label_maps)
def test_scores_are_those_of_a_literal_reading(truth: np.ndarray, prediction: np.ndarray) -> None:
    scores = score_labels(truth, prediction)
    assert scores.aji == pytest.approx(literal_aji(truth, prediction))
    assert scores.object_f1 == pytest.approx(literal_object_f1(truth, prediction))
    assert scores.max_iou == pytest.approx(literal_max_iou(truth, prediction))
    assert scores.pixel_f1 == pytest.approx(literal_pixel_f1(truth, prediction))


@FAST
@given(label_maps, label_maps)
def test_the_numbering_does_not_matter(truth: np.ndarray, prediction: np.ndarray) -> None:
    # keeps the order of the labels, which breaks ties, and forces the slow way of counting
    huge = np.where(prediction > 0, prediction.astype(np.int64) * 1_000_000_007, 0)
    assert score_labels(truth, prediction) == score_labels(truth, huge)


def test_two_true_objects_may_take_one_prediction() -> None:
    truth = np.array([[1, 1, 2, 2]])
    scores = score_labels(truth, np.array([[9, 9, 9, 9]]))
    assert (scores.counts.aji_intersection_px, scores.counts.aji_union_px) == (4, 8)


def test_a_split_object_pays_for_the_part_not_taken() -> None:
    scores = score_labels(np.array([[1, 1, 1, 1]]), np.array([[1, 1, 1, 2]]))
    assert scores.aji == pytest.approx(3 / (4 + 1))


def test_a_match_needs_more_than_half() -> None:
    assert score_labels(np.array([[1, 1]]), np.array([[1, 0]])).object_f1 == 0.0


@pytest.mark.parametrize(("truth", "prediction", "value"), [(0, 0, 1.0), (1, 0, 0.0), (0, 1, 0.0)])
def test_empty_maps_have_defined_scores(truth: int, prediction: int, value: float) -> None:
    scores = score_labels(np.full((2, 3), truth), np.full((2, 3), prediction))
    assert (scores.aji, scores.pixel_f1, scores.object_f1, scores.max_iou) == (value,) * 4


@FAST
@given(st.lists(st.tuples(label_maps, label_maps), min_size=1, max_size=3))
def test_the_aggregate_is_the_score_of_all_images_as_one(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    def join(maps: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.where(m > 0, m + 10 * k, 0) for k, m in enumerate(maps)])

    pooled = aggregate_scores([score_labels(t, p) for t, p in pairs])
    whole = score_labels(join([t for t, _ in pairs]), join([p for _, p in pairs]))
    assert pooled.aji == pytest.approx(whole.aji)
    assert pooled.pixel_f1 == pytest.approx(whole.pixel_f1)
    assert pooled.object_f1 == pytest.approx(whole.object_f1)
    assert pooled.max_iou == pytest.approx(whole.max_iou)


def test_the_mean_weighs_images_alike() -> None:
    perfect = score_labels(np.ones((9, 9), int), np.ones((9, 9), int))
    missed = score_labels(np.ones((1, 1), int), np.zeros((1, 1), int))
    assert mean_scores([perfect, missed]).aji == 0.5
    assert aggregate_scores([perfect, missed]).aji == pytest.approx(81 / 82)
    assert mean_scores([perfect, missed]).counts == aggregate_scores([perfect, missed]).counts


def test_nothing_has_no_mean_and_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="no scores"):
        mean_scores([])
    with pytest.raises(ValueError, match="no scores"):
        aggregate_scores([])
    with pytest.raises(ShapeError, match="shape"):
        score_labels(np.zeros((2, 2), int), np.zeros((2, 3), int))
