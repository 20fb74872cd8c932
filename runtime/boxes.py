"""Box arithmetic in NumPy: the reference that the graphs and the host share."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError

__all__ = ["MAX_LOG_SCALE", "clip_boxes", "decode_deltas", "non_maximum_suppression", "pairwise_iou"]

MAX_LOG_SCALE = math.log(1000 / 16)  # one step grows an anchor at most 62.5-fold, as torchvision

_HALF = np.float32(0.5)


def pairwise_iou(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the intersection over union of every box of `a` with every box of `b`.

    Args:
        a: (N, 4) x0 y0 x1 y1, pixels.
        b: (M, 4) x0 y0 x1 y1, pixels.
    Returns:
        (N, M) float32; 0 where both boxes are empty.
    Raises:
        ShapeError: an array is not (n, 4).

    >>> pairwise_iou(np.array([[0, 0, 2, 2]], "f4"), np.array([[1, 0, 3, 2], [5, 5, 6, 6]], "f4"))
    array([[0.33333334, 0.        ]], dtype=float32)
    """
    a, b = _boxes(a), _boxes(b)
    corner_low = np.maximum(a[:, None, :2], b[None, :, :2])  # (N, M, 2)
    corner_high = np.minimum(a[:, None, 2:], b[None, :, 2:])  # (N, M, 2)
    sides = np.maximum(corner_high - corner_low, np.float32(0))
    shared = sides[..., 0] * sides[..., 1]  # (N, M)
    union = _areas(a)[:, None] + _areas(b)[None, :] - shared
    iou: NDArray[np.float32] = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return iou


def non_maximum_suppression(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], threshold: float
) -> NDArray[np.int64]:
    """Return the indices of the boxes that greedy suppression keeps, by descending score.

    A box goes if its IoU with a kept box of higher score is above `threshold`. Of equal scores the
    lower index comes first.

    Args:
        boxes: (N, 4) x0 y0 x1 y1, pixels.
        scores: (N,).
        threshold: IoU, 0..1.
    Raises:
        ShapeError: the arrays differ in length.

    >>> boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]], "f4")
    >>> non_maximum_suppression(boxes, np.array([0.5, 0.9, 0.7], "f4"), 0.5)
    array([1, 2])
    """
    boxes = _boxes(boxes)
    if scores.shape != (len(boxes),):
        raise ShapeError(f"{len(boxes)} boxes, scores of shape {scores.shape}")
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size:
        best, left = left[0], left[1:]
        kept.append(int(best))
        left = left[pairwise_iou(boxes[best : best + 1], boxes[left])[0] <= threshold]
    return np.array(kept, np.int64)


def decode_deltas(
    deltas: NDArray[np.float32],
    anchors: NDArray[np.float32],
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> NDArray[np.float32]:
    """Return the boxes that `deltas` make of `anchors`.

    Faster R-CNN (arXiv:1506.01497), eq. 2, solved for the box.
    Deviation: the log scales are capped at log(1000/16), so that no untrained head overflows.

    Args:
        deltas: (N, 4) dx dy dw dh, no unit, each multiplied by its weight.
        anchors: (N, 4) x0 y0 x1 y1, pixels; x1 > x0 and y1 > y0.
        weights: what the four deltas were multiplied by in training.
    Returns:
        (N, 4) float32 x0 y0 x1 y1, pixels; not clipped to the image.
    Raises:
        ShapeError: the arrays differ in length or are not (n, 4).

    >>> decode_deltas(np.zeros((1, 4), "f4"), np.array([[0, 0, 8, 4]], "f4"))
    array([[0., 0., 8., 4.]], dtype=float32)
    """
    deltas, anchors = _boxes(deltas), _boxes(anchors)
    if len(deltas) != len(anchors):
        raise ShapeError(f"{len(deltas)} deltas for {len(anchors)} anchors")
    steps = deltas / np.asarray(weights, np.float32)
    size = anchors[:, 2:] - anchors[:, :2]  # (N, 2) width height
    centre = anchors[:, :2] + _HALF * size
    centre = centre + steps[:, :2] * size
    size = size * np.exp(np.minimum(steps[:, 2:], np.float32(MAX_LOG_SCALE)))
    return np.concatenate([centre - _HALF * size, centre + _HALF * size], axis=1)


def clip_boxes(boxes: NDArray[np.float32], width: float, height: float) -> NDArray[np.float32]:
    """Return (N, 4) `boxes` cut to `[0, width] x [0, height]`; a box outside becomes empty.

    >>> clip_boxes(np.array([[-2, 3, 5, 99]], "f4"), 4, 8)
    array([[0., 3., 4., 8.]], dtype=float32)
    """
    upper = np.array([width, height, width, height], np.float32)
    return np.clip(_boxes(boxes), np.float32(0), upper)


def _boxes(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ShapeError(f"boxes of shape {boxes.shape}, not (n, 4)")
    return np.asarray(boxes, np.float32)


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], np.float32(0))
    areas: NDArray[np.float32] = sides[:, 0] * sides[:, 1]
    return areas
