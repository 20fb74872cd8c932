"""What a live segmenter knows of the camera's frames before it looks at them: brightness and scale."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from darcnn.runtime.diameter import estimate_diameter, finds_unasked
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

    What is None is learned from the first frame where the model needs it, and kept.
    """

    window: Window | None = None  # raw values that become 0 and 255; models with a percentile rule need it
    diameter_px: float | None = None  # of a typical object, pixels of the frame; else the pixel size decides
    pixel_size_um: float | None = None  # of the frame that `diameter_px` holds for; others are scaled by it
    dtype: np.dtype[Any] | None = None  # of the frames that `window` holds for; None: of any


class Calibrator:
    """Keeps the calibration of one live segmenter; used by its worker alone.

    Args:
        given: a calibration, "first" to learn one from the first frame, "each" from each frame.
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
        self._is_learned = False
        self.current = given if isinstance(given, Calibration) else None

    def settle(
        self, segmenter: Segmenter, reader: Reader, dtype: np.dtype[Any], *, renew: bool
    ) -> Calibration:
        """Return the calibration that the frame in `reader` is to be seen with.

        Args:
            segmenter: the model.
            reader: the frame.
            dtype: of the frame as it was pushed.
            renew: learn from this frame, in place of what was given or learned before.
        Raises:
            InputError: the frame is of another type than the calibration.
        """
        if renew or self._is_each:
            self.current = _learn(segmenter, reader, Calibration(), dtype)
        elif not self._is_learned:
            self.current = _learn(segmenter, reader, self._given, dtype)
        self._is_learned = True
        assert self.current is not None  # set above, once
        known = self.current.dtype
        if known is not None and known != dtype:
            raise InputError(
                f"holds {dtype}, the calibration was made for {known}",
                where="frame",
                fix="push frames of one type, or push this one with calibrate=True",
            )
        return self.current

    @staticmethod
    def plan(segmenter: Segmenter, reader: Reader, calibration: Calibration) -> SlidePlan:
        """Return how the frame goes through the model: by diameter, else by pixel size, else as it is."""
        size = reader.info.mpp[0] if reader.info.mpp is not None else None
        diameter = calibration.diameter_px
        if diameter is not None and size is not None and calibration.pixel_size_um is not None:
            diameter *= calibration.pixel_size_um / size
        return segmenter.plan(reader.info, diameter_px=diameter, pixels=size is None)


def _learn(segmenter: Segmenter, reader: Reader, given: Calibration, dtype: np.dtype[Any]) -> Calibration:
    """Return `given` with what the model needs and it lacks, measured on the frame."""
    model, learned = segmenter.manifest.input, given
    size = reader.info.mpp[0] if reader.info.mpp is not None else None
    if given.diameter_px is None and finds_unasked(model, size is not None):
        diameter = estimate_diameter(segmenter, reader)
        learned = replace(learned, diameter_px=diameter, pixel_size_um=size)
        if diameter is None:
            _log.warning(
                "too few objects on the first frame to tell their size: pixels are taken as they are "
                "until a frame is pushed with calibrate=True"
            )
    if given.window is None and model.intensity.needs_statistics:
        plan = Calibrator.plan(segmenter, reader, learned)
        learned = replace(learned, window=segmenter.measure(reader, plan), dtype=dtype)
    if learned != given:
        _log.info("calibrated on a frame: %s", learned)
    return learned
