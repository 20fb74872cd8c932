"""How well the labels of a volume agree with the truth: plane by plane, and object by object in space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.metrics import Scores, mean_scores, score_labels

__all__ = ["VolumeScores", "score_volume"]

MATCH_IOU = (
    0.3  # above it two objects in space may be one: particles of few voxels across are hard to outline
)


@dataclass(frozen=True, slots=True)
class VolumeScores:
    """Figures of a volume, 0 to 1."""

    planes: Scores  # mean over the planes along z: the paper's figures for tomograms
    object_f1: float  # objects matched one to one with IoU > 0.3
    hit_f1: float  # objects whose centroid lies in a true object, one to one
    n_true: int
    n_found: int


def score_volume(truth: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]]) -> VolumeScores:
    """Return how well `prediction` agrees with `truth`.

    Planes are scored as the paper scores SHREC's (DARCNN, Table 2), hits as SHREC counts them (Gubins et al.
    2020, doi:10.1016/j.cag.2020.07.010): a hit lies inside a particle, which may be hit once.

    Args:
        truth: (Z, Y, X) labels, 0 is background.
        prediction: (Z, Y, X) labels, 0 is background.
    Raises:
        ShapeError: the volumes differ in shape.
    """
    if truth.shape != prediction.shape:
        raise ShapeError(f"truth of shape {truth.shape}, prediction of shape {prediction.shape}")
    planes = [score_labels(one, other) for one, other in zip(truth, prediction, strict=True)]
    true_ids, true_sizes = np.unique(truth[truth > 0], return_counts=True)
    found_ids, found_sizes = np.unique(prediction[prediction > 0], return_counts=True)
    n_true, n_found = len(true_ids), len(found_ids)
    both = (truth > 0) & (prediction > 0)
    i = np.searchsorted(true_ids, truth[both]).astype(np.int64)
    j = np.searchsorted(found_ids, prediction[both]).astype(np.int64)
    pairs, shared = np.unique(i * max(n_found, 1) + j, return_counts=True)
    i, j = np.divmod(pairs, max(n_found, 1))
    iou = shared / (true_sizes[i] + found_sizes[j] - shared)
    candidates = np.flatnonzero(iou > MATCH_IOU)
    candidates = candidates[np.argsort(-iou[candidates], kind="stable")]
    n_matched = _match(i[candidates], j[candidates])
    hit = _hit_objects(truth, prediction, true_ids, found_ids)
    return VolumeScores(
        planes=mean_scores(planes),
        object_f1=_f1(n_matched, n_true, n_found),
        hit_f1=_f1(len(np.unique(hit[hit >= 0])), n_true, n_found),
        n_true=n_true,
        n_found=n_found,
    )


def _match(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Return how many of the pairs, taken in order, join what no earlier one has joined."""
    used: tuple[set[int], set[int]] = (set(), set())
    count = 0
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        if a not in used[0] and b not in used[1]:
            used[0].add(a)
            used[1].add(b)
            count += 1
    return count


def _hit_objects(
    truth: NDArray[Any], prediction: NDArray[Any], true_ids: NDArray[Any], found_ids: NDArray[Any]
) -> NDArray[np.int64]:
    """Return for each found object the true one (index) in which its centroid lies, -1 for none."""
    places = np.argwhere(prediction > 0)
    rows = np.searchsorted(found_ids, prediction[tuple(places.T)])
    counts = np.maximum(np.bincount(rows, minlength=len(found_ids)), 1)
    centroids = np.stack(
        [np.bincount(rows, places[:, axis], minlength=len(found_ids)) / counts for axis in range(3)], axis=1
    )
    at = truth[tuple(np.rint(centroids).astype(np.int64).T)]
    hit = np.where(at > 0, np.searchsorted(true_ids, at), -1)
    return hit.astype(np.int64)


def _f1(n_matched: int, n_true: int, n_found: int) -> float:
    return 2.0 * n_matched / (n_true + n_found) if n_true + n_found else 1.0
