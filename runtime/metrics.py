"""How well a label map agrees with the truth: AJI, pixel F1, object F1 and max IoU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError

__all__ = ["Counts", "Scores", "aggregate_scores", "mean_scores", "score_labels"]

MATCH_IOU = 0.5  # above it two objects of flattened maps match, and then at most one each way
MAX_TABLE = 1 << 24  # entries of a table of counts; beyond it, sorting is the smaller evil


@dataclass(frozen=True, slots=True)
class Counts:
    """What the scores are ratios of; counts of several images add up."""

    aji_intersection_px: int  # of each true object with its best prediction
    aji_union_px: int  # the same, and the area of predictions that were never the best
    true_positives: int  # objects matched with IoU > 0.5
    false_positives: int
    false_negatives: int
    pixel_intersection: int  # pixels in the foreground of both
    pixel_truth: int  # foreground pixels of the truth
    pixel_prediction: int  # foreground pixels of the prediction
    iou_sum: float  # over the true objects, of the largest IoU


@dataclass(frozen=True, slots=True)
class Scores:
    """Four figures, 0 to 1, and the counts behind them.

    Where truth and prediction are both empty every figure is 1; where only one is, 0.
    """

    aji: float
    pixel_f1: float
    object_f1: float
    max_iou: float
    counts: Counts


def score_labels(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> Scores:
    """Return how well `prediction` agrees with `truth`.

    AJI is that of Kumar et al. 2017 (doi:10.1109/TMI.2017.2677499), algorithm 1: each true object takes
    the prediction with the largest IoU, which may be taken more than once (of equals the lowest label);
    a true object that meets none adds its area to the union, and so does each prediction never taken.

    Args:
        truth: (H, W) labels, any numbering, 0 is background.
        prediction: (H, W) labels, any numbering, 0 is background.
    Raises:
        ShapeError: the maps differ in shape.

    >>> truth = np.array([[1, 1, 0, 2]])
    >>> scores = score_labels(truth, np.array([[5, 5, 5, 0]]))
    >>> round(scores.aji, 3), round(scores.pixel_f1, 3), round(scores.object_f1, 3), round(scores.max_iou, 3)
    (0.5, 0.667, 0.667, 0.333)
    """
    if truth.shape != prediction.shape:
        raise ShapeError(f"truth of shape {truth.shape}, prediction of shape {prediction.shape}")
    true_rows, true_areas = _number(truth)
    found_rows, found_areas = _number(prediction)
    n_true, n_found = len(true_areas), len(found_areas)
    both = (true_rows >= 0) & (found_rows >= 0)
    pairs, shared = _count(true_rows[both] * n_found + found_rows[both], n_true * n_found)
    i, j = np.divmod(pairs, max(n_found, 1))
    union = true_areas[i] + found_areas[j] - shared
    iou = shared / union
    # the best prediction of each true object: sorted by object, then IoU downward, then label
    order = np.lexsort((j, -iou, i))
    i, j, shared, union, iou = i[order], j[order], shared[order], union[order], iou[order]
    best = np.flatnonzero(np.r_[True, i[1:] != i[:-1]]) if i.size else np.zeros(0, np.int64)
    is_met, is_taken = np.zeros(n_true, np.bool_), np.zeros(n_found, np.bool_)
    is_met[i[best]], is_taken[j[best]] = True, True
    n_matched = int(np.count_nonzero(iou > MATCH_IOU))
    return _scores(
        Counts(
            aji_intersection_px=int(shared[best].sum()),
            aji_union_px=int(union[best].sum() + true_areas[~is_met].sum() + found_areas[~is_taken].sum()),
            true_positives=n_matched,
            false_positives=n_found - n_matched,
            false_negatives=n_true - n_matched,
            pixel_intersection=int(np.count_nonzero(both)),
            pixel_truth=int(true_areas.sum()),
            pixel_prediction=int(found_areas.sum()),
            iou_sum=float(iou[best].sum()),
        )
    )


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Return the mean of each figure over images (the paper's way), with the counts added up.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("the mean of no scores")
    return Scores(
        aji=float(np.mean([s.aji for s in scores])),
        pixel_f1=float(np.mean([s.pixel_f1 for s in scores])),
        object_f1=float(np.mean([s.object_f1 for s in scores])),
        max_iou=float(np.mean([s.max_iou for s in scores])),
        counts=_add([s.counts for s in scores]),
    )


def aggregate_scores(scores: Sequence[Scores]) -> Scores:
    """Return the figures of all images taken as one, from the counts added up.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("the aggregate of no scores")
    return _scores(_add([s.counts for s in scores]))


def _scores(counts: Counts) -> Scores:
    n_true = counts.true_positives + counts.false_negatives
    n_found = counts.true_positives + counts.false_positives
    if n_true == 0 and n_found == 0:
        return Scores(aji=1.0, pixel_f1=1.0, object_f1=1.0, max_iou=1.0, counts=counts)
    return Scores(
        aji=counts.aji_intersection_px / counts.aji_union_px,
        pixel_f1=2 * counts.pixel_intersection / (counts.pixel_truth + counts.pixel_prediction),
        object_f1=2 * counts.true_positives / (n_true + n_found),
        max_iou=counts.iou_sum / n_true if n_true else 0.0,
        counts=counts,
    )


def _add(counts: Sequence[Counts]) -> Counts:
    return Counts(**{field.name: sum(getattr(c, field.name) for c in counts) for field in fields(Counts)})


def _number(labels: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each pixel's object as a row number (background -1), flat, and the area of each row."""
    flat = labels.reshape(-1).astype(np.int64)
    names, areas = _count(flat[flat != 0], 4 * flat.size)
    if not names.size:
        return np.full(flat.size, -1, np.int64), areas
    rows = np.searchsorted(names, flat).clip(0, len(names) - 1)
    return np.where(flat == 0, -1, rows), areas


def _count(values: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct `values`, ascending, with their counts; fast if all are below a small n."""
    if n <= MAX_TABLE and values.size and values.min() >= 0 and values.max() < n:
        counts = np.bincount(values)
        names = np.flatnonzero(counts)
        return names, counts[names]
    names, counts = np.unique(values, return_counts=True)
    return names, counts
