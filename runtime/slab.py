"""The slab rule: neighbouring planes of a noisy volume to the one plane that a model sees.

One implementation for training and running, as of the intensity rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Slab", "join_planes", "smooth_plane"]

_REACH = 3.0  # standard deviations at which the Gaussian ends
_MIN_SIGMA_PX = 0.2  # below it the neighbours' weight is lost in the noise


@dataclass(frozen=True, slots=True)
class Slab:
    """How much of a volume one plane stands for, in diameters of a typical object.

    Of white noise the mean of n planes has 1/sqrt(n), and an object half a diameter thick is on all of them.
    """

    depth: float  # planes within so much are averaged
    smoothing: float = 0.0  # standard deviation of a Gaussian in the plane

    def count_planes(self, diameter_px: float) -> int:
        """Return how many planes are averaged: an odd number, so that there is one in the middle.

        >>> [Slab(0.5).count_planes(d) for d in (1.0, 6.0, 10.5, 20.0)]
        [1, 3, 5, 11]
        """
        return 1 + 2 * max(0, math.floor((self.depth * diameter_px - 1) / 2 + 0.5))

    def sigma_px(self, diameter_px: float) -> float:
        """Return the standard deviation of the Gaussian, pixels."""
        return self.smoothing * diameter_px


def join_planes(planes: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the mean (H, W) of planes; of a pixel that is not finite on some, the mean of the others.

    Where no plane has a value there is none: NaN.

    >>> join_planes([np.array([[1, 5]]), np.array([[3.0, np.nan]])])
    array([[2., 5.]], dtype=float32)
    """
    if all(plane.dtype.kind in "iub" for plane in planes):
        total = np.zeros(planes[0].shape, np.float32)
        for plane in planes:
            total += plane
        return total / np.float32(len(planes))
    total = np.zeros(planes[0].shape, np.float64)
    count = np.zeros(planes[0].shape, np.int32)
    for plane in planes:
        is_there = np.isfinite(plane)
        np.add(total, plane, out=total, where=is_there)
        count += is_there
    with np.errstate(invalid="ignore", over="ignore"):
        mean: NDArray[np.float32] = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(
            np.float32
        )
    return mean


def smooth_plane(plane: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    """Return (H, W) convolved with a Gaussian; the edges are mirrored.

    Pixels that are not finite take no part and get the mean of those round them; far from any other they
    stay without a value.

    >>> round(float(smooth_plane(np.eye(9, dtype=np.float32), 1.0)[4, 4]), 3)
    0.282
    """
    if sigma_px < _MIN_SIGMA_PX:
        return plane
    is_there = np.isfinite(plane)
    if is_there.all():
        return _convolve(plane, sigma_px)
    weight = _convolve(is_there.astype(np.float32), sigma_px)
    total = _convolve(np.where(is_there, plane, np.float32(0.0)), sigma_px)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 1e-3, total / weight, np.float32(np.nan)).astype(np.float32)


def _convolve(plane: NDArray[np.float32], sigma_px: float) -> NDArray[np.float32]:
    reach = max(1, math.ceil(_REACH * sigma_px))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        n = plane.shape[axis]
        margins = [(0, 0), (0, 0)]
        margins[axis] = (reach, reach)
        padded = np.pad(plane, margins, mode="symmetric")
        total = np.zeros(plane.shape, np.float32)
        for start, weight in enumerate(kernel.tolist()):
            part = padded[start : start + n] if axis == 0 else padded[:, start : start + n]
            total += np.float32(weight) * part
        plane = total
    return plane
