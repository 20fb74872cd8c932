"""What a live segmenter knows of the camera's frames before it looks at them: brightness and scale."""

from __future__ import annotations

import logging
import math
import numbers
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from darcnn.runtime.diameter import estimate_diameter, finds_unasked, look_for_sizes
from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.intensity import Window
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.protocol import Reader
from darcnn.runtime.segmenter import Segmenter

__all__ = ["Calibration", "Calibrator"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Brightness and scale of the frames of one camera and stain.

    What is None is learned from the first frame with objects where the model needs it, and kept.

    Raises:
        UsageError: a window that does not rise, or a size that is none.
    """

    window: Window | None = None  # raw values that become 0 and 255; models with a percentile rule need it
    diameter_px: float | None = None  # of a typical object, pixels of the frame; else the pixel size decides
    pixel_size_um: float | None = None  # of the frame that `diameter_px` holds for; others are scaled by it
    dtype: np.dtype[Any] | None = None  # of the frames that `window` holds for; None: of any

    def __post_init__(self) -> None:
        if self.window is not None and not _rises(self.window):
            raise UsageError(
                f"{self.window} is no window",
                where="calibration",
                fix="give Window(low, high) with low < high",
            )
        for name, size in (("diameter_px", self.diameter_px), ("pixel_size_um", self.pixel_size_um)):
            if size is not None and not (isinstance(size, numbers.Real) and 0 < size < math.inf):
                raise UsageError(f"{name} is {size!r}", where="calibration", fix="give a number above 0")


class Calibrator:
    """Keeps the calibration of one live segmenter; used by its worker alone.

    Args:
        given: a calibration, "first" to learn one from the first frame with objects, "each" from each frame.
    Raises:
        UsageError: neither a calibration nor one of the two words.
    """

    def __init__(self, given: Calibration | Literal["first", "each"]) -> None:
        if not isinstance(given, Calibration) and given not in ("first", "each"):
            raise UsageError(
                f"{given!r} is no calibration",
                where="calibration",
                fix="give a Calibration, or one of first, each",
            )
        self._is_each = given == "each"
        self._given = given if isinstance(given, Calibration) else Calibration()
        self.known = given if isinstance(given, Calibration) else None
        self._is_learned = False
        self._windows: dict[np.dtype[Any], Window] = {}  # of rules that need no statistics

    def settle(
        self, segmenter: Segmenter, reader: Reader, dtype: np.dtype[Any], *, renew: bool
    ) -> tuple[Calibration, bool]:
        """Return the calibration that the frame in `reader` is to be seen with, and whether it tells enough.

        What is learned from a frame without objects (a dark one, an empty corner) holds for that frame only:
        the next one teaches anew.

        Args:
            segmenter: the model.
            reader: the frame.
            dtype: of the frame as it was pushed.
            renew: learn from this frame, in place of what was given or learned before.
        Raises:
            InputError: the frame is of another type than the calibration.
        """
        if self._is_learned and not (renew or self._is_each):
            assert self.known is not None  # learned
            current, is_sure = self.known, True
        else:
            given = Calibration() if renew or self._is_each else self._given
            current, is_sure = _learn(segmenter, reader, given, dtype)
            if is_sure:  # what is known stays known
                self.known, self._is_learned = current, True
        if current.dtype is not None and not _is_same_type(current.dtype, dtype):
            raise InputError(
                f"holds {dtype}, the calibration was made for {current.dtype}",
                where="frame",
                fix="push frames of one type, or push this one with calibrate=True",
            )
        return current, is_sure

    def window(
        self, segmenter: Segmenter, reader: Reader, plan: SlidePlan, calibration: Calibration
    ) -> Window:
        """Return the raw values that become black and white; a rule without statistics is asked once a type.

        Raises:
            InputError: the values of the frame are not those that the rule takes for granted.
        """
        if calibration.window is not None:
            return calibration.window
        info = reader.info
        if info.dtype in self._windows:
            return self._windows[info.dtype]
        window = segmenter.measure(reader, plan)
        if reader.read(info.whole, level=0).any():  # a dark one tells nothing
            self._windows[info.dtype] = window
        return window

    @staticmethod
    def plan(segmenter: Segmenter, reader: Reader, calibration: Calibration) -> SlidePlan:
        """Return how the frame goes through the model: by diameter, else by pixel size, else as it is."""
        size = reader.info.mpp[0] if reader.info.mpp is not None else None
        diameter = calibration.diameter_px
        if diameter is not None and size is not None and calibration.pixel_size_um is not None:
            diameter *= calibration.pixel_size_um / size
        return segmenter.plan(reader.info, diameter_px=diameter, pixels=size is None)


def _learn(
    segmenter: Segmenter, reader: Reader, given: Calibration, dtype: np.dtype[Any]
) -> tuple[Calibration, bool]:
    """Return `given` with what it lacks and the model needs, from the frame; and whether to keep it."""
    model, learned, is_sure = segmenter.manifest.input, given, True
    looks_for_size = False
    size = reader.info.mpp[0] if reader.info.mpp is not None else None
    if given.diameter_px is None and finds_unasked(model, size is not None):
        looks_for_size = True
        diameter = estimate_diameter(segmenter, reader, window=given.window)
        learned = replace(learned, diameter_px=diameter, pixel_size_um=size)
        is_sure = diameter is not None
    if given.window is None and model.intensity.needs_statistics:
        plan = Calibrator.plan(segmenter, reader, learned)
        window = segmenter.measure(reader, plan)
        learned = replace(learned, window=window, dtype=dtype)
        if not looks_for_size:
            sizes, _ = look_for_sizes(segmenter, reader, plan.scale, window=window)
            is_sure = len(sizes) > 0
    if learned != given:
        _log.info("calibrated on a frame: %s", learned)
    if not is_sure:
        _log.warning("no objects to learn brightness and size from: the next frame is tried")
    return learned, is_sure


def _is_same_type(one: np.dtype[Any], other: np.dtype[Any]) -> bool:
    return one.newbyteorder("=") == other.newbyteorder("=")


def _rises(window: object) -> bool:
    if not isinstance(window, Window):
        return False
    low, high = np.atleast_1d(window.low), np.atleast_1d(window.high)
    return bool(np.isfinite([*low, *high]).all() and len(low) == len(high) and (low < high).all())
