"""Masks of many objects: what hides what, and what a label image holds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.instances import Instances
from darcnn.runtime.outlines import outline_crops

__all__ = ["drop_covered", "label_instances"]

_MAX_COVERED = 0.5  # share of its pixels that an object may lose to better ones


def drop_covered(instances: Instances) -> Instances:
    """Return `instances` without those that lie for more than half in better ones: they are the same object.

    Non-maximum suppression compares boxes; a part found inside a whole passes it. Of equal scores the
    earlier object is the better one, as in `Instances.labels`.
    """
    if len(instances) < 2:
        return instances
    begin, end = instances.origins, instances.ends  # (N, 2) x y
    meet = (begin[:, None] < end[None]).all(axis=2)  # (N, N)
    kept = (meet & meet.T).sum(axis=1) == 1  # these meet none but themselves
    low = begin.min(axis=0)
    width, height = end.max(axis=0) - low
    taken = np.zeros((height, width), np.bool_)
    order = np.argsort(-instances.scores, kind="stable")
    for row in order[~kept[order]]:
        (x, y), mask = begin[row] - low, instances.masks[row]
        place = taken[y : y + mask.shape[0], x : x + mask.shape[1]]
        kept[row] = np.count_nonzero(place & mask) <= _MAX_COVERED * np.count_nonzero(mask)
        if kept[row]:
            place |= mask
    return instances.select(kept)


def label_instances(labels: NDArray[np.integer]) -> Instances:
    """Return the objects of a label image, in order of their label, each with score 1.

    The mask is the label's pixels. The outline redraws them exactly if they hang together by
    sides and have no hole; else it goes round the largest part, without its holes.

    Args:
        labels: (H, W), 0 is background.
    Raises:
        ShapeError: not two axes.

    >>> label_instances(np.array([[0, 7, 7], [3, 0, 0]])).boxes
    array([[0., 1., 1., 2.],
           [1., 0., 3., 1.]], dtype=float32)
    """
    if labels.ndim != 2:
        raise ShapeError(f"a label image of shape {labels.shape}, not (H, W)")
    shape = (labels.shape[0], labels.shape[1])
    ys, xs = np.nonzero(labels)
    if not ys.size:
        return Instances.empty(shape)
    ids = labels[ys, xs]
    order = np.argsort(ids, kind="stable")
    ids, ys, xs = ids[order], ys[order], xs[order]
    starts = np.flatnonzero(np.r_[True, ids[1:] != ids[:-1]])
    low = np.stack([np.minimum.reduceat(xs, starts), np.minimum.reduceat(ys, starts)], axis=1)  # (N, 2)
    high = np.stack([np.maximum.reduceat(xs, starts), np.maximum.reduceat(ys, starts)], axis=1) + 1
    masks = [
        labels[y0:y1, x0:x1] == label
        for label, (x0, y0), (x1, y1) in zip(ids[starts], low.tolist(), high.tolist(), strict=True)
    ]
    return Instances(
        shape=shape,
        boxes=np.concatenate([low, high], axis=1).astype(np.float32),
        scores=np.ones(len(starts), np.float32),
        origins=low.astype(np.int64),
        masks=tuple(masks),
        outlines=tuple(outline_crops(masks, low)),
        truncated=np.zeros(len(starts), np.bool_),
    )
