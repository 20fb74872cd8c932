"""Fit pseudo-masks to their image: where between an object and its surroundings does the outline run?

Not in the paper. The network proposes every object; the image only says where the outline of it runs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops

from darcnn.runtime.instances import Instances

__all__ = ["contrast_of", "fit_masks", "stain_of"]

_MARGIN = 0.25  # surroundings reach this share of the object's diameter beyond its mask
_MIN_AGREEMENT = 0.6  # IoU with the predicted mask below which the fitted one is not believed
_MIN_SOLIDITY = 0.85  # share of its convex hull that a fitted mask fills; ragged ones are not believed
_MIN_CONTRAST = 4.0  # grey levels between inside and outside below which there is nothing to fit

Box = tuple[int, int, int, int]


def contrast_of(image: NDArray[np.uint8], instances: Instances) -> NDArray[np.float32]:
    """Return how many grey levels each object is brighter than its surroundings, (N,); negative if darker.

    NaN where others surround it on all sides.
    """
    return _above_surroundings(image.mean(axis=2), instances)


def stain_of(image: NDArray[np.uint8], instances: Instances) -> NDArray[np.float32]:
    """Return how much denser in red light each object is than its surroundings, (N,), optical density (ln).

    NaN where others surround it on all sides.
    Haematoxylin and DAB absorb red light, eosin hardly does (Ruifrok and Johnston 2001).
    """
    return _above_surroundings(-np.log((image[..., 0] + 1.0) / 256.0), instances)


def _above_surroundings(values: NDArray[np.floating], instances: Instances) -> NDArray[np.float32]:
    """Return the median of `values` (H, W) in each object less that near it, (N,)."""
    predicted = instances.labels()
    differences = np.zeros(len(instances), np.float32)
    for row in range(len(instances)):
        x0, y0, x1, y1 = _window(instances, row)
        own, outside = _own_and_surroundings(predicted[y0:y1, x0:x1], row)
        if own.any():
            near = values[y0:y1, x0:x1]
            surroundings = np.median(near[outside]) if outside.any() else np.nan
            differences[row] = np.median(near[own]) - surroundings
    return differences


def fit_masks(image: NDArray[np.uint8], instances: Instances) -> NDArray[np.int32]:
    """Return the (H, W) label image of `instances` with outlines fitted to `image`, (H, W, C) uint8.

    Where the fitted mask and the predicted one disagree, the predicted one stays. No pixel goes to two
    objects.
    """
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0.0))
    predicted = instances.labels()
    labels = np.zeros_like(predicted)
    for row in np.argsort(instances.scores, kind="stable"):  # ascending: the best is drawn last
        x0, y0, x1, y1 = _window(instances, int(row))
        own, outside = _own_and_surroundings(predicted[y0:y1, x0:x1], int(row))
        if own.any():
            mask = _fit(smooth[y0:y1, x0:x1], own, outside)
            labels[y0:y1, x0:x1][mask] = row + 1
    return labels


def _window(instances: Instances, row: int) -> Box:
    """Return x0 y0 x1 y1 of the mask with room for its surroundings, inside the image."""
    height, width = instances.shape
    (x, y), (h, w) = instances.origins[row], instances.masks[row].shape
    room = 2 + math.ceil(_MARGIN * max(h, w))
    return max(0, x - room), max(0, y - room), min(width, x + w + room), min(height, y + h + room)


def _own_and_surroundings(
    predicted: NDArray[np.int32], row: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the object's pixels in its window, and those near it that belong to no object."""
    own = predicted == row + 1
    reach = 1.0 + _MARGIN * 2.0 * math.sqrt(own.sum() / math.pi)
    near: NDArray[np.bool_] = ndimage.distance_transform_edt(~own) <= reach
    return own, near & (predicted == 0)


def _fit(
    window: NDArray[np.float32], own: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return the object's mask in its window: what is nearer to its own brightness than to the outside's."""
    if not outside.any():
        return own
    inner, outer = np.median(window[own], axis=0), np.median(window[outside], axis=0)  # (C,)
    spread = window[own].std(axis=0) + window[outside].std(axis=0) + 1.0
    channel = int(np.argmax(np.abs(inner - outer) / spread))  # the colour that tells them apart best
    if abs(inner[channel] - outer[channel]) < _MIN_CONTRAST:
        return own
    middle = (inner[channel] + outer[channel]) / 2.0
    values = window[:, :, channel]
    foreground = (values > middle if inner[channel] > outer[channel] else values < middle) & (own | outside)
    pieces, _ = ndimage.label(ndimage.binary_opening(foreground))
    inside = np.bincount(pieces[own], minlength=1)
    inside[0] = 0
    if inside.max(initial=0) == 0:
        return own
    fitted: NDArray[np.bool_] = ndimage.binary_fill_holes(pieces == inside.argmax()) & (own | outside)
    agreement = (fitted & own).sum() / (fitted | own).sum()
    if agreement < _MIN_AGREEMENT:
        return own
    (region,) = regionprops(fitted.astype(np.uint8))  # type: ignore[no-untyped-call]  # untyped
    return fitted if region.solidity >= _MIN_SOLIDITY else own
