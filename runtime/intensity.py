"""The intensity rule: raw pixels to the bytes a model sees; one implementation for training and running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError

__all__ = [
    "IntensityRule",
    "Window",
    "apply_window",
    "looks_like_noise",
    "measure_window",
    "sees_separate_channels",
    "select_channels",
]

# Of values spread like a Gaussian: 0.5 to 99.8 % by 25 to 75 %, and 50 to 99.8 % by 0.5 to 50 %.
_GAUSSIAN_WIDTH, _GAUSSIAN_SKEW = 4.043, 1.117
_NEAR_GAUSSIAN = (
    0.18  # sum of the logarithms by which both are off; grey tissue has more, nuclei 1.9 and more
)
_FEW_VALUES = 1000
_MAX_FACTOR = 1e38  # grey levels a raw value: the largest that float32 holds, for the narrowest windows


@dataclass(frozen=True, slots=True)
class IntensityRule:
    """How raw values become 0..255.

    - `full_range`: the range of the integer type (0..1 for float) maps to 0..255; 8-bit stays as it is.
    - `percentile`: the `low` and `high` percentiles of the whole image or slide map to 0 and 255; of
      each channel its own where a model sees several separate ones, of all together for colours.
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
    """The raw values that become 0 and 255: one for all channels, or one for each."""

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]


def measure_window(rule: IntensityRule, sample: NDArray[Any], *, by_channel: bool = False) -> Window:
    """Return the window of `rule` for an image of which `sample` holds the pixels.

    Values that are not finite are left out. An image without contrast gets a window of width 1 or
    more, so that it maps to black instead of to amplified noise.

    Args:
        rule: what to do.
        sample: any shape; (..., C) if measured by channel.
        by_channel: whether each channel gets limits of its own (`sees_separate_channels`).

    >>> measure_window(IntensityRule("percentile", 0, 100), np.array([3, 7, 11], np.uint16))
    Window(low=3.0, high=11.0)
    """
    if by_channel:
        each = [_limits(rule, sample[..., channel]) for channel in range(sample.shape[-1])]
        return Window(tuple(low for low, _ in each), tuple(high for _, high in each))
    return Window(*_limits(rule, sample))


def _limits(rule: IntensityRule, sample: NDArray[Any]) -> tuple[float, float]:
    if rule.kind == "range":
        return rule.low, rule.high
    if rule.kind == "full_range":
        if np.issubdtype(sample.dtype, np.integer):
            span = np.iinfo(sample.dtype)
            return float(span.min), float(span.max)
        return 0.0, 1.0
    finite = sample[np.isfinite(sample)] if sample.dtype.kind == "f" else sample.reshape(-1)
    if finite.size == 0:
        return 0.0, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        limits = np.percentile(finite, (rule.low, rule.high))
        if not np.isfinite(limits).all():  # the difference of two values went beyond float32
            limits = np.percentile(finite.astype(np.float64), (rule.low, rule.high))
    low, high = float(limits[0]), float(limits[1])
    # beyond 2**53 a step of 1 is lost
    return low, high if high > low else low + max(1.0, abs(low) * 1e-6)


def apply_window(pixels: NDArray[Any], window: Window) -> NDArray[np.uint8]:
    """Return `pixels` as bytes: `window.low` and below is 0, `window.high` and above 255.

    What is not finite (NaN, infinite) is 0: such values mark where nothing was measured.

    Args:
        pixels: any shape; (..., C) where the window has limits for each channel.
        window: of `measure_window`.

    >>> apply_window(np.array([0, 50, 100, 200], np.uint16), Window(0, 100))
    array([  0, 128, 255, 255], dtype=uint8)
    >>> apply_window(np.array([[50, 50]], np.uint16), Window((0, 0), (100, 50)))
    array([[128, 255]], dtype=uint8)
    """
    low, high = window.low, window.high
    if pixels.dtype == np.uint8 and (_all_equal(low, 0.0) and _all_equal(high, 255.0)):
        return pixels
    width = np.asarray(high, np.float64) - np.asarray(low, np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        # far beyond the window it does not matter how far
        factor = np.minimum(255.0 / width, _MAX_FACTOR).astype(np.float32)
        scaled = (pixels.astype(np.float32) - np.asarray(low, np.float32)) * factor
    if pixels.dtype.kind == "f":
        scaled = np.where(np.isfinite(pixels), scaled, np.float32(0.0))
    bytes_: NDArray[np.uint8] = np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)
    return bytes_


def _all_equal(limits: float | tuple[float, ...], value: float) -> bool:
    return all(limit == value for limit in limits) if isinstance(limits, tuple) else limits == value


def sees_separate_channels(*, available: int, is_rgb: bool, channels: int, channel: int | None) -> bool:
    """Tell whether a model of `channels` channels sees several separate ones of an image with `available`.

    It sees the first of them, in their order in the file. A model of three wants exactly three: it is
    one of colours, as a rule, and of more channels none are red, green and blue.

    >>> asked = [(5, 2), (4, 4), (2, 4), (3, 3), (4, 3), (2, 1)]
    >>> [sees_separate_channels(available=n, is_rgb=False, channels=c, channel=None) for n, c in asked]
    [True, True, False, True, False, False]
    """
    if is_rgb or channel is not None or channels == 1:
        return False
    return available == 3 if channels == 3 else available >= channels


def select_channels(
    pixels: NDArray[Any], *, is_rgb: bool, channels: int, channel: int | None = None
) -> NDArray[Any]:
    """Return (H, W, `channels`) of the (H, W, C) `pixels`, in their own type.

    A one-channel model sees the mean of red, green and blue, or channel number `channel` of a
    fluorescence image (0 if it has only one). A three-channel model sees the colours, the three channels
    of an image that has just three, or one grey channel three times. A model of two or four channels sees
    the first two or four of an image with separate channels.

    Raises:
        ShapeError: several channels that are not RGB, and `channel` does not choose; or it is out of range;
            or a model of two or four channels is shown colours, or fewer channels.
    """
    available = pixels.shape[2]
    if sees_separate_channels(available=available, is_rgb=is_rgb, channels=channels, channel=channel):
        return pixels[:, :, :channels]
    if channels not in (1, 3):
        kind = "red, green and blue" if is_rgb else "one channel" if channel is not None else f"{available}"
        raise ShapeError(f"{kind} for a model of {channels} separate channels")
    if channel is not None:
        if not 0 <= channel < available:
            raise ShapeError(f"channel {channel} of an image with {available} channels")
        chosen = pixels[:, :, channel : channel + 1]
    elif available == 1:
        chosen = pixels
    elif is_rgb and channels == 3:
        return pixels[:, :, :3]
    elif is_rgb:
        with np.errstate(invalid="ignore"):  # infinite and its opposite
            mean = pixels[:, :, :3].mean(axis=2, keepdims=True, dtype=np.float32)
        chosen = np.rint(mean).astype(pixels.dtype) if pixels.dtype.kind in "iu" else mean
    else:
        raise ShapeError(f"{available} channels, and none was chosen")
    return chosen if channels == 1 else np.repeat(chosen, channels, axis=2)


def looks_like_noise(sample: NDArray[Any]) -> bool:
    """Tell whether values are spread like noise alone: objects, bright or dark, would pull one tail out.

    Args:
        sample: (N, C) raw values of an image; each channel must look so.

    >>> looks_like_noise(np.random.default_rng(0).normal(100, 9, (5000, 1)))
    True
    """
    for values in sample.T:
        finite = values[np.isfinite(values)]
        if finite.size < _FEW_VALUES:
            return False
        lowest, low, middle, high, highest = np.percentile(finite.astype(np.float64), (0.5, 25, 50, 75, 99.8))
        if not lowest < low < middle < high < highest:
            return False
        width = (highest - lowest) / (high - low) / _GAUSSIAN_WIDTH
        skew = (highest - middle) / (middle - lowest) / _GAUSSIAN_SKEW
        if abs(np.log(width)) + abs(np.log(skew)) > _NEAR_GAUSSIAN:
            return False
    return True
