"""The intensity rule: raw pixels to the bytes a model sees; one implementation for training and running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError

__all__ = ["IntensityRule", "Window", "apply_window", "measure_window", "select_channels"]


@dataclass(frozen=True, slots=True)
class IntensityRule:
    """How raw values become 0..255.

    - `full_range`: the range of the integer type (0..1 for float) maps to 0..255; 8-bit stays as it is.
    - `percentile`: the `low` and `high` percentiles of the whole image or slide map to 0 and 255.
    - `range`: the raw values `low` and `high` map to 0 and 255.

    Statistics are never taken from a tile, else brightness would jump at every seam.
    """

    kind: Literal["full_range", "percentile", "range"]
    low: float = 0.0
    high: float = 0.0

    @property
    def needs_statistics(self) -> bool:
        """Tell whether the whole image must be looked at before the first tile."""
        return self.kind == "percentile"


@dataclass(frozen=True, slots=True)
class Window:
    """The raw values that become 0 and 255."""

    low: float
    high: float


def measure_window(rule: IntensityRule, sample: NDArray[Any]) -> Window:
    """Return the window of `rule` for an image of which `sample` (any shape) holds the pixels.

    Non-finite values are left out. An image without contrast gets a window of width 1, so that it
    maps to black instead of to amplified noise.

    >>> measure_window(IntensityRule("percentile", 0, 100), np.array([3, 7, 11], np.uint16))
    Window(low=3.0, high=11.0)
    """
    if rule.kind == "range":
        return Window(rule.low, rule.high)
    if rule.kind == "full_range":
        if np.issubdtype(sample.dtype, np.integer):
            limits = np.iinfo(sample.dtype)
            return Window(float(limits.min), float(limits.max))
        return Window(0.0, 1.0)
    finite = sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample.reshape(-1)
    if finite.size == 0:
        return Window(0.0, 1.0)
    low, high = (float(v) for v in np.percentile(finite, (rule.low, rule.high)))
    return Window(low, high if high > low else low + 1.0)


def apply_window(pixels: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Return `pixels` as bytes: `window.low` and below is 0, `window.high` and above 255, NaN 0.

    >>> apply_window(np.array([0, 50, 100, 200], np.uint16), Window(0, 100))
    array([  0, 128, 255, 255], dtype=uint8)
    """
    if pixels.dtype == np.uint8 and window == Window(0.0, 255.0):
        return pixels
    scaled = (pixels.astype(np.float32) - window.low) * (255.0 / (window.high - window.low))
    bytes_: NDArray[np.uint8] = np.rint(np.clip(np.nan_to_num(scaled, nan=0.0), 0.0, 255.0)).astype(np.uint8)
    return bytes_


def select_channels(
    pixels: NDArray[Any], *, is_rgb: bool, channels: int, channel: int | None = None
) -> NDArray[Any]:
    """Return (H, W, `channels`) of the (H, W, C) `pixels`, in their own type.

    A one-channel model sees the mean of red, green and blue, or channel number `channel` of a
    fluorescence image (0 if it has only one). A three-channel model sees the colours, or one grey
    channel three times.

    Raises:
        ShapeError: several channels that are not RGB, and `channel` does not choose; or it is out of range.
    """
    available = pixels.shape[2]
    if channel is not None:
        if not 0 <= channel < available:
            raise ShapeError(f"channel {channel} of an image with {available} channels")
        chosen = pixels[:, :, channel : channel + 1]
    elif available == 1:
        chosen = pixels
    elif is_rgb and channels == 3:
        return pixels[:, :, :3]
    elif is_rgb:
        mean = pixels[:, :, :3].mean(axis=2, keepdims=True, dtype=np.float32)
        chosen = np.rint(mean).astype(pixels.dtype) if pixels.dtype.kind in "iu" else mean
    else:
        raise ShapeError(f"{available} channels, and none was chosen")
    return chosen if channels == 1 else np.repeat(chosen, channels, axis=2)
