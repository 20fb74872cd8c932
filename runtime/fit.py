"""Does a model fit a slide? Sizes and scores of what it found tell, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.manifest import ModelInput

__all__ = ["ModelFit", "warn_of_kind", "warn_of_noise", "warn_of_none", "warn_of_size"]

_MIN_OBJECTS = 10  # fewer tell nothing
_MAX_RATIO = 1.6  # of typical and nominal diameter; the shipped models learned from 1.4 either way
_MIN_TYPICAL_SCORE = 0.8  # half of the findings score below it: the model is guessing
_SMALLEST_PX = 7.0  # smoothed noise is as large
_SURE_SCORE = 0.9  # half of the specks in smoothed noise score below 0.83, half of small nuclei above 0.97
_STEPS_PER_OCTAVE = 64  # of the histogram of sizes
_OCTAVES = 8  # either way of the nominal diameter
_SCORE_BINS = 100


@dataclass(slots=True)
class ModelFit:
    """Takes the objects of a slide part by part; diameters in level-0 pixels, as areas are."""

    nominal_diameter_px: float
    measured_px: float | None = None  # where the model measured how large they are
    _sizes: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(2 * _OCTAVES * _STEPS_PER_OCTAVE + 1, np.int64)
    )
    _scores: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_SCORE_BINS, np.int64))

    def add(self, areas_px: NDArray[np.float64], scores: NDArray[np.float64]) -> None:
        """Take the areas (N,) px^2 and scores (N,) of some objects."""
        diameters = 2.0 * np.sqrt(np.maximum(areas_px, 1.0) / np.pi)
        octaves = np.log2(diameters / self.nominal_diameter_px)
        rows = np.rint((octaves + _OCTAVES) * _STEPS_PER_OCTAVE).astype(np.int64)
        self._sizes += np.bincount(rows.clip(0, len(self._sizes) - 1), minlength=len(self._sizes))
        bins = (scores * _SCORE_BINS).astype(np.int64).clip(0, _SCORE_BINS - 1)
        self._scores += np.bincount(bins, minlength=_SCORE_BINS)

    def warnings(self) -> Iterator[str]:
        """Yield one line for each sign that the model does not fit."""
        is_few = self._scores.sum() < _MIN_OBJECTS
        score = (_median_bin(self._scores) + 0.5) / _SCORE_BINS
        of_noise = None if self.measured_px is None else warn_of_noise(self.measured_px)
        if of_noise is not None and (is_few or score < _SURE_SCORE):
            yield of_noise
        if is_few:
            return
        typical = self.nominal_diameter_px * 2.0 ** (_median_bin(self._sizes) / _STEPS_PER_OCTAVE - _OCTAVES)
        ratio = typical / self.nominal_diameter_px
        if not 1.0 / _MAX_RATIO <= ratio <= _MAX_RATIO:
            yield (
                f"objects are typically {typical:.0f} px wide where the model looks for "
                f"{self.nominal_diameter_px:.0f} px; if they look right, pass --diameter {typical:.0f}"
            )
        if score < _MIN_TYPICAL_SCORE:
            yield (
                f"the model is unsure (half of the objects score below {score:.2f}): look at the overview; "
                f"another --diameter, channel or model may fit better"
            )


def warn_of_none(n_found: int) -> str:
    """Return what a user should know where no object is reported, though so many may have been found."""
    return f"--filter leaves out every object that was found ({n_found})" if n_found else "no objects found"


def warn_of_size(model: ModelInput, diameter_px: float | None, *, has_pixel_size: bool) -> str | None:
    """Return what a user should know of how a model measured the size of objects, None if nothing.

    Args:
        model: what it sees.
        diameter_px: what `choose_diameter` gave, level-0 pixels.
        has_pixel_size: the size of a pixel is known.
    """
    nominal_px = model.nominal_diameter_px
    if diameter_px is None or diameter_px == nominal_px:  # what is measured is not the very number
        if diameter_px is not None:
            instead = f"they were taken to be {nominal_px:.0f} px wide"
        elif has_pixel_size and model.mpp is not None:
            instead = "the pixel size was taken to tell the scale"
        else:
            instead = "pixels were taken as they are"
        return f"too few objects to measure their size, and {instead}: pass --diameter if there are any"
    return None


def warn_of_noise(diameter_px: float) -> str | None:
    """Return what a user should know of objects that were measured as small as noise is, None if larger."""
    if diameter_px < _SMALLEST_PX:
        return (
            f"the objects were measured as {diameter_px:.0f} px wide, which is what noise looks like: "
            "look at the overview; pass --diameter if they are larger"
        )
    return None


def warn_of_kind(model: ModelInput, rule: str | None) -> str | None:
    """Return what a user should know of an image that looks like none of the model's.

    Args:
        model: what it sees.
        rule: by which tissue was told from background (`TissueMask.rule`).
    """
    if model.channels == 1 and rule == "stain on glass":
        return "the image looks like stain on glass, and the model sees grey values: is it the right model?"
    if model.channels == 1 and rule == "colours on dark":
        return "the colours show different things, and the model sees their mean: --channel blue takes one"
    is_dark = rule in ("bright on dark", "colours on dark")
    if model.channels == 3 and model.intensity.kind == "full_range" and is_dark:
        return "the image is bright on dark, and the model sees the colours of stain: is it the right model?"
    return None


def _median_bin(counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(np.cumsum(counts), 0.5 * counts.sum()))
