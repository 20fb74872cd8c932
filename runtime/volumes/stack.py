"""The planes of a volume along one axis, as a model sees them: slabs, and one intensity window for all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.intensity import IntensityRule, Window, measure_window
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import (
    check_white,
    join_samples,
    needs_sample,
    sample_slide,
    spread_evenly,
)
from darcnn.runtime.slab import Slab, join_planes, smooth_plane
from darcnn.runtime.volumes.volume import AXES, Axis, Volume

__all__ = ["SAMPLED_PLANES", "Stack", "measure_stack"]

_MOST, _NEARLY_ALL = 25.0, 99.0  # percentiles: the range of a plane
_FAR, _FEW_FLASHES = 10.0, 0.25
SAMPLED_PLANES = 16  # of a volume stand for all: neighbours show the same objects


@dataclass(frozen=True, slots=True)
class Stack:
    """Planes across `axis`, each the smoothed mean of `n_joined` of the volume's."""

    volume: Volume
    axis: Axis
    n_joined: int = 1  # odd; fewer at the ends
    sigma_px: float = 0.0

    @classmethod
    def of(cls, volume: Volume, axis: Axis, slab: Slab | None, diameter_px: float) -> Stack:
        """Return the stack for objects of `diameter_px` pixels of a plane, as the model's rule wants it.

        Time points of a series are smoothed, but not averaged.
        """
        if slab is None:
            return cls(volume, axis)
        if volume.info.is_series:
            return cls(volume, axis, sigma_px=slab.sigma_px(diameter_px))
        n_joined = slab.count_planes(diameter_px / cls(volume, axis).plane_px)
        return cls(volume, axis, n_joined, slab.sigma_px(diameter_px))

    def __len__(self) -> int:
        return self.volume.info.shape[AXES.index(self.axis)]

    @property
    def plane_px(self) -> float:
        """Distance of two planes in pixels of a plane; 1 where the voxel size is not known."""
        voxel_nm, pixel_nm = self.volume.info.voxel_nm, self.volume.info.pixel_nm(self.axis)
        if voxel_nm is None or pixel_nm is None:
            return 1.0
        return voxel_nm[AXES.index(self.axis)] / pixel_nm

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of a plane."""
        return self.volume.info.plane_shape(self.axis)

    def plane(self, index: int) -> NDArray[np.float32]:
        """Return plane `index`, (rows, columns); a value is NaN where nothing near it was finite."""
        return next(self.planes(index, index + 1))

    def planes(self, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """Yield planes `start` to `stop` - 1; `n_joined` planes of the volume are in memory at once."""
        reach = self.n_joined // 2
        held: deque[NDArray[Any]] = deque()
        first = after = max(0, start - reach)
        for index in range(start, stop):
            while after < min(len(self), index + reach + 1):
                held.append(self.volume.read(self.axis, after))
                after += 1
            while first < index - reach:
                held.popleft()
                first += 1
            yield smooth_plane(join_planes(held), self.sigma_px)

    def read_ahead(self, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """Yield the same planes; a thread makes the next one meanwhile."""
        planes = self.planes(start, stop)
        with ThreadPoolExecutor(1, "darcnn-planes") as pool:
            ahead = deque(pool.submit(next, planes) for _ in range(min(1, stop - start)))
            for index in range(start, stop):
                plane = ahead.popleft().result()
                if index + 1 < stop:
                    ahead.append(pool.submit(next, planes))
                yield plane


def measure_stack(stack: Stack, rule: IntensityRule, *, scale: float) -> Window:
    """Return the one intensity window of all planes; read only if the rule needs statistics.

    Up to 16 planes at even steps stand for the volume: percentiles of many slabs are not moved by a bead, a
    hot voxel or planes without values. A few planes that are far brighter as a whole (a reflection, a flash)
    count for nothing.

    Args:
        stack: the planes.
        rule: of the model.
        scale: network pixels per voxel.
    Raises:
        InputError: the values are not those that the rule takes for granted (`check_white`).
    """
    info = stack.volume.info
    sample = np.empty((0, 1), info.dtype)
    if needs_sample(rule, info.dtype):
        parts = []
        for index in spread_evenly(range(len(stack)), SAMPLED_PLANES):
            with ArrayReader(stack.plane(index)) as reader:
                parts.append(sample_slide(reader, scale=scale, channels=1))
        sample = join_samples(_without_flashes(parts))
        check_white(sample, rule, info.dtype, info.path, name=info.name)
    return measure_window(rule, sample)


def _without_flashes(parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the samples of planes without the few that as a whole are far brighter than a typical one.

    Far: by ten times the range of the values in either. What shows objects has a range of its own, and planes
    without any are not typical.
    """
    finite = [part[np.isfinite(part)] for part in parts]
    low, high = (
        np.array([np.percentile(values, at) if values.size else 0.0 for values in finite])
        for at in (_MOST, _NEARLY_ALL)
    )
    span, has_span = high - low, high > low
    if not has_span.any():
        return list(parts)
    typical, usual = np.median(high[has_span]), np.median(span[has_span])
    is_flash = low - typical > _FAR * np.maximum(span, usual)
    if is_flash.mean() > _FEW_FLASHES:
        return list(parts)
    return [part for part, one in zip(parts, is_flash, strict=True) if not one]
