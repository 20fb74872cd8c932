"""Objects by where the stage sees them, which of them are worth a visit, and in what order."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import UsageError
from darcnn.runtime.live.ticket import LiveResult

__all__ = [
    "CameraAxes",
    "FoundObject",
    "Rank",
    "check_axes",
    "choose_objects",
    "locate_objects",
    "order_visits",
]

_log = logging.getLogger(__name__)

Rank = Literal["score", "size"]


@dataclass(frozen=True, slots=True)
class CameraAxes:
    """What way the picture runs where the stage's x and y grow.

    Raises:
        UsageError: a direction that is neither 1 nor -1.

    >>> CameraAxes(-1, 1, is_turned=True).to_stage(np.array([3.0, 4.0])).tolist()
    [-4.0, 3.0]
    """

    x: int = 1  # 1: to the right, -1: to the left (of a turned camera: down, up)
    y: int = 1  # 1: down, -1: up (of a turned camera: to the right, to the left)
    is_turned: bool = False  # by a quarter: the picture's columns run along the stage's y

    def __post_init__(self) -> None:
        if {self.x, self.y} - {1, -1}:
            raise UsageError(f"axes {self.x}, {self.y}", where="axes", fix="give 1 or -1 for x and for y")

    def to_stage(self, offsets: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (..., 2) of the stage, x y, for (..., 2) of the picture, in the same unit."""
        along = offsets[..., ::-1] if self.is_turned else offsets
        return along * np.array([self.x, self.y], np.float64)

    def to_picture(self, offsets: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (..., 2) of the picture, x y, for (..., 2) of the stage, in the same unit."""
        along = offsets * np.array([self.x, self.y], np.float64)
        return along[..., ::-1] if self.is_turned else along


def check_axes(axes: CameraAxes | None) -> CameraAxes:
    """Return how the camera sits, by default as the stage's axes run.

    Raises:
        UsageError: it is something else.
    """
    if axes is not None and not isinstance(axes, CameraAxes):
        raise UsageError(f"{axes!r} is no CameraAxes", where="axes", fix="give CameraAxes(-1, 1), say")
    return axes or CameraAxes()


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object and where the stage must go to see it in the middle."""

    x_um: float
    y_um: float
    score: float
    area_um2: float
    frame: str  # where it was found: the index of the event, such as "p3 c0"
    number: int = 0  # of that frame, in the order of the acquisition
    z_um: float | None = None  # the focus of that frame
    is_cut: bool = False  # by the edge of that frame: the stage sees the middle of what is visible there

    @property
    def diameter_um(self) -> float:
        """Of the circle of the same area."""
        return 2 * math.sqrt(self.area_um2 / math.pi)


def locate_objects(
    result: LiveResult,
    stage_um: tuple[float, float],
    axes: CameraAxes | None = None,
    *,
    z_um: float | None = None,
) -> list[FoundObject]:
    """Return the objects of a frame by where the stage sees them in the middle.

    Args:
        result: of the frame, with instances; without a pixel size there are no objects to go to.
        stage_um: where the stage was: the middle of the frame.
        axes: of the camera; None: as the stage's.
        z_um: the focus.
    """
    instances, size = result.instances, result.pixel_size_um
    if instances is None or size is None:
        if instances is not None and len(instances):
            _log.warning("frame %s has no pixel size: its objects have no place on the stage", result.key)
        return []
    axes = check_axes(axes)
    extent = np.array(instances.shape[::-1])  # x y
    found = []
    for score, origin, mask in zip(instances.scores, instances.origins, instances.masks, strict=True):
        pixels = origin + np.argwhere(mask)[:, ::-1]  # (K, 2) x y
        centre = pixels.mean(axis=0) + 0.5
        x, y = np.asarray(stage_um) + axes.to_stage(size * (centre - extent / 2))
        found.append(
            FoundObject(
                float(x),
                float(y),
                float(score),
                area_um2=len(pixels) * size**2,
                frame=str(result.key),
                number=result.number,
                z_um=z_um,
                is_cut=bool((pixels <= 0).any() or (pixels >= extent - 1).any()),
            )
        )
    return found


def choose_objects(found: Iterable[FoundObject], *, best: int | None, rank: Rank) -> list[FoundObject]:
    """Return the best objects, best first; one that several frames saw counts once, as it was seen best.

    A frame's own objects are never taken for one another. Of several frames that see one the object is taken
    from one that sees it whole, if there is such.
    """

    def worth(one: FoundObject) -> float:
        return one.score if rank == "score" else one.area_um2

    ordered = sorted(found, key=lambda one: (one.is_cut, -worth(one)))
    chosen = [one for one, is_new in zip(ordered, _are_new(ordered), strict=True) if is_new]
    return sorted(chosen, key=lambda one: -worth(one))[:best]


def _are_new(ordered: Sequence[FoundObject]) -> list[bool]:
    """Tell of each object whether none before it, of another frame, lies within half a diameter."""
    is_new = [True] * len(ordered)
    if not ordered:
        return is_new
    radii = np.array([one.diameter_um / 2 for one in ordered])
    points = shapely.points([(one.x_um, one.y_um) for one in ordered])
    pairs = shapely.STRtree(points).query(points, predicate="dwithin", distance=float(radii.max()))
    before: list[list[int]] = [[] for _ in ordered]
    for later, earlier in pairs.T[pairs[0] > pairs[1]].tolist():
        one, other = ordered[later], ordered[earlier]
        apart = math.hypot(one.x_um - other.x_um, one.y_um - other.y_um)
        if one.number != other.number and apart <= max(radii[later], radii[earlier]):
            before[later].append(earlier)
    for later, earlier_ones in enumerate(before):
        is_new[later] = not any(is_new[earlier] for earlier in earlier_ones)
    return is_new


def order_visits(found: Iterable[FoundObject], *, start: tuple[float, float]) -> Iterator[FoundObject]:
    """Yield the objects so that the stage travels little: always the nearest next."""
    left = list(found)
    places = np.array([(one.x_um, one.y_um) for one in left]).reshape(-1, 2)
    at = np.asarray(start, np.float64)
    for _ in left:
        nearest = int(np.hypot(*(places - at).T).argmin())
        at = places[nearest].copy()
        places[nearest] = np.inf
        yield left[nearest]
