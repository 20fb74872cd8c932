"""What every source of pixels offers: facts about it, and regions of any level."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.geometry import Grid, Level, Region

__all__ = ["Location", "Pixels", "Planes", "Reader", "SlideInfo"]

Location = Path | str  # of a file or folder; text is a URL
Pixels = NDArray[Any]  # (H, W, C), uint8, uint16 or float32, never transposed after the reader


@dataclass(frozen=True, slots=True)
class SlideInfo:
    """Facts about one plane of a slide, image or array.

    `mpp` is micrometres per pixel of level 0 (x, y), None where the file does not say; `mpp_source`
    tells where it came from ("openslide.mpp-x", "OME PhysicalSizeX", "--mpp", ...). `is_rgb` is True
    when the three channels are red, green and blue of one brightfield-like picture, False when they are
    separate (fluorescence) channels or a single grey one. `origin_px0` is the level-0 pixel (x, y) that
    QuPath shows in the upper left corner: it crops a slide to what the scanner says was scanned. `doubts`
    are what the reader had to decide and the user may have meant otherwise, a warning each.
    """

    path: Location | None
    name: str
    levels: tuple[Level, ...]
    channel_names: tuple[str, ...]
    dtype: np.dtype[Any]
    is_rgb: bool
    mpp: tuple[float, float] | None = None
    mpp_source: str | None = None
    doubts: tuple[str, ...] = ()
    origin_px0: tuple[int, int] = (0, 0)
    digest: str | None = None  # sha256 of the metadata of a source that is not one file
    image_name: str | None = None  # that one of several images has in its file
    grid: Grid | None = None  # where the pixels lie, y x, if the file tells it as OME-Zarr does

    @property
    def width_px0(self) -> int:
        """Width of level 0, pixels."""
        return self.levels[0].width_px

    @property
    def height_px0(self) -> int:
        """Height of level 0, pixels."""
        return self.levels[0].height_px

    @property
    def whole(self) -> Region:
        """All of level 0."""
        return Region(0, 0, self.width_px0, self.height_px0)


@dataclass(frozen=True, slots=True)
class Planes:
    """How many planes a file holds along z and t, and how far apart; a reader reads one of them."""

    n_z: int = 1
    n_t: int = 1
    n_lacking: int = 0  # further ones that the file announces, along t or else along z, and does not hold
    # from plane to plane along z, and from time point to time point; None: the file does not say
    section_um: float | None = field(default=None, compare=False)
    frame_interval_s: float | None = field(default=None, compare=False)

    def is_series(self, t: int | None) -> bool:
        """Tell whether these are time points of one plane, of which `t` chooses none: a volume along t."""
        return self.n_z == 1 and self.n_t > 1 and t is None


@runtime_checkable
class Reader(Protocol):
    """An open source of pixels; a context manager.

    `read` may be called from several threads at once. It returns a new array that the caller owns.
    """

    @property
    def info(self) -> SlideInfo:
        """Facts about the plane that `read` reads."""
        ...

    def read(self, region: Region, *, level: int) -> Pixels:
        """Return (H, W, C) pixels of `region`, which lies inside `level` (pixels of that level).

        Raises:
            DamagedPixelsError: the file is damaged there; other regions may be read.
            InputError: the file cannot be read any more.
            ShapeError: the region is empty or leaves the level.
        """
        ...

    def close(self) -> None:
        """Give the file back; reading afterwards is an error. Closing twice is allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
