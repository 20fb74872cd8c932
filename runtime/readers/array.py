"""A NumPy array as a source of pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import ShapeError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.readers.base import (
    PlaneReader,
    make_channel_names,
    pixel_type,
    settle_mpp,
    to_pixels,
)
from darcnn.runtime.readers.protocol import Pixels, SlideInfo

__all__ = ["ArrayReader"]


class ArrayReader(PlaneReader):
    """Pixels of an array in memory, one level; regions are copied, the array itself never is.

    Args:
        array: (H, W) or (H, W, C) real numbers of any type; channels come last, always. Types other
            than uint8 and uint16 are delivered as float32, bool as 0 and 255.
        name: what results and messages call it.
        mpp: micrometres per pixel, None where unknown.
        is_rgb: whether the channels are red, green, blue (and alpha, which is left out). By
            convention, three channels of uint8 are, and nothing else is unless you say so.
        channel_names: one a channel; not for RGB.
    Raises:
        ShapeError: another number of axes, no pixels, complex numbers or objects, `is_rgb` with
            neither 3 nor 4 channels, or a wrong number of names.
        UsageError: `mpp` is no pixel size.

    >>> with ArrayReader(np.arange(6).reshape(2, 3)) as reader:
    ...     reader.read(Region(1, 0, 3, 1), level=0).tolist()
    [[[1.0], [2.0]]]
    """

    def __init__(
        self,
        array: NDArray[Any],
        *,
        name: str = "array",
        mpp: float | None = None,
        is_rgb: bool | None = None,
        channel_names: Sequence[str] | None = None,
    ) -> None:
        if isinstance(array, (str, os.PathLike)):
            raise ShapeError(f"{os.fspath(array)!r} names a file, not an array; open it with open_source")
        values = np.asarray(array)
        if values.ndim not in (2, 3):
            raise ShapeError(f"an image is (H, W) or (H, W, C), channels last, not {values.shape}")
        if values.size == 0:
            raise ShapeError(f"an image of shape {values.shape} has no pixels")
        dtype = pixel_type(values.dtype)
        if dtype is None:
            raise ShapeError(f"pixels of type {values.dtype} are not real numbers")
        if values.ndim == 2:
            values = values[:, :, None]  # (H, W, 1)
        channels = values.shape[2]
        if is_rgb is None:
            is_rgb = channels == 3 and values.dtype == np.uint8
        if is_rgb:
            if channels not in (3, 4):
                raise ShapeError(f"RGB has 3 channels, or 4 with alpha, not {channels}")
            values = values[:, :, :3]
        if channel_names is not None and len(channel_names) != values.shape[2]:
            raise ShapeError(f"{len(channel_names)} names for {values.shape[2]} channels")
        size, source = settle_mpp(None, None, override=mpp)
        height, width, n_channels = values.shape
        super().__init__(
            SlideInfo(
                path=None,
                name=name,
                levels=(Level(0, width, height, 1.0),),
                channel_names=make_channel_names(channel_names or (), n_channels, is_rgb=is_rgb),
                dtype=dtype,
                is_rgb=is_rgb,
                mpp=size,
                mpp_source=source,
            )
        )
        self._values = values

    def _read(self, region: Region, level: Level) -> Pixels:
        return to_pixels(self._values[region.y0 : region.y1, region.x0 : region.x1])

    def _release(self) -> None:
        self._values = np.empty((0, 0, 0))  # lets go of the caller's memory
