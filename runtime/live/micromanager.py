"""Micro-Manager: frames of a pymmcore-plus acquisition are segmented while it runs, and may steer it.

Needs the extra `micromanager` (pymmcore-plus, useq-schema) in the program that acquires.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import DarcnnError, UsageError
from darcnn.runtime.live.segmenter import LiveSegmenter
from darcnn.runtime.live.ticket import LiveResult, Ticket

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus
    from useq import MDAEvent

__all__ = [
    "FoundObject",
    "LiveAcquisition",
    "SmartAcquisition",
    "choose_objects",
    "locate_objects",
    "order_visits",
]

_log = logging.getLogger(__name__)

_SURVEY = "darcnn_survey"  # marks events in their metadata


@dataclass(frozen=True, slots=True)
class FoundObject:
    """One object and where the stage must go to see it in the middle."""

    x_um: float
    y_um: float
    score: float
    area_um2: float
    frame: str  # where it was found: the index of the event, such as "p3 c0"

    @property
    def diameter_um(self) -> float:
        """Of the circle of the same area."""
        return 2 * math.sqrt(self.area_um2 / math.pi)


class LiveAcquisition:
    """Pushes each frame that `frameReady` brings; a context manager that listens from enter to exit.

    The acquisition is never kept or stopped by it: what cannot be pushed is logged.
    """

    def __init__(
        self,
        core: CMMCorePlus,
        live: LiveSegmenter,
        *,
        pixel_size_um: float | None = None,
        axes: tuple[int, int] = (1, 1),
    ) -> None:
        """Join a core and a segmenter; both stay the caller's. Its policy should be one that drops.

        Args:
            core: whose acquisition engine (`core.mda`) runs.
            live: gets the frames.
            pixel_size_um: micrometres per pixel; None takes what the core says (its pixel size
                configurations), if it says anything.
            axes: what way the picture runs where the stage's x and y grow: 1 to the right and down, -1 to
                the left and up.
        """
        self._core = core
        self._live = live
        self._pixel_size_um = pixel_size_um
        self._axes = axes
        self._pending: deque[tuple[Ticket, tuple[float, float]]] = deque()
        self._found: list[FoundObject] = []
        self.n_frames = 0  # segmented
        self.n_lost = 0  # dropped or failed; the log says which

    def __enter__(self) -> Self:
        self._core.mda.events.frameReady.connect(self._on_frame)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._core.mda.events.frameReady.disconnect(self._on_frame)

    def accepts(self, event: MDAEvent) -> bool:
        """Tell whether the frame of this event is to be segmented; here all are."""
        return True

    def found(self, timeout: float = 60.0) -> list[FoundObject]:
        """Return the objects of all frames so far, in the order of the frames.

        Waits up to `timeout` seconds for frames that are being segmented; what takes longer is left out of
        this answer, and logged.
        """
        try:
            self._live.drain(timeout)
        except TimeoutError as err:
            _log.warning("the acquisition goes on without them: %s", err)
        self._digest()
        return list(self._found)

    def _on_frame(self, image: NDArray[Any], event: MDAEvent, meta: Mapping[str, Any]) -> None:
        if not self.accepts(event):
            return
        size = self._pixel_size_um or float(meta.get("pixel_size_um") or 0.0) or None
        x, y = event.x_pos, event.y_pos
        if x is None or y is None:
            x, y = self._core.getXYPosition()
        try:
            ticket = self._live.push(image, key=_name_event(event), pixel_size_um=size)
        except DarcnnError as err:
            self.n_lost += 1
            _log.error("frame %s was not segmented: %s", _name_event(event), err)
            return
        self._pending.append((ticket, (float(x), float(y))))
        self._digest()

    def _digest(self) -> None:
        """Turn results that are there into objects; nothing of a frame is kept but these."""
        while self._pending and self._pending[0][0].is_ready:
            ticket, stage_um = self._pending.popleft()
            result = ticket.outcome()
            if result.instances is None:
                self.n_lost += 1
                _log.warning("frame %s was lost: %s", result.key, result.error)
                continue
            self.n_frames += 1
            self._found.extend(locate_objects(result, stage_um, self._axes))


class SmartAcquisition(LiveAcquisition):
    """A survey, then a visit to each of the best objects that it found, in one acquisition.

    with SmartAcquisition(core, live, survey, visit=MDAEvent(channel="FITC"), best=20) as smart:
        core.mda.run(smart.events())
    """

    def __init__(
        self,
        core: CMMCorePlus,
        live: LiveSegmenter,
        survey: Iterable[MDAEvent],
        *,
        visit: MDAEvent,
        best: int | None = None,
        rank: Literal["score", "size"] = "score",
        pixel_size_um: float | None = None,
        axes: tuple[int, int] = (1, 1),
    ) -> None:
        """Plan the two parts; nothing moves before `events` is run.

        Args:
            core: whose acquisition engine runs.
            live: segments the frames of the survey.
            survey: events, such as a `useq.MDASequence`, with positions.
            visit: what is done at each object: channel, exposure, properties such as the objective; its
                position is filled in.
            best: how many objects at most; None for all.
            rank: what makes an object better: its score or its area.
            pixel_size_um: of the survey's frames, see `LiveAcquisition`.
            axes: see `LiveAcquisition`.
        Raises:
            UsageError: `best` is below 1, or there is no such rank.
        """
        if best is not None and best < 1:
            raise UsageError(f"{best} objects", where="best", fix="give 1 or more, or None for all")
        if rank not in ("score", "size"):
            raise UsageError(f"no rank {rank!r}", where="rank", fix="choose one of score, size")
        super().__init__(core, live, pixel_size_um=pixel_size_um, axes=axes)
        self._survey = survey
        self._visit = visit
        self._best = best
        self._rank: Literal["score", "size"] = rank
        self.visits: tuple[FoundObject, ...] = ()  # in the order of the visits, once the survey is done

    def accepts(self, event: MDAEvent) -> bool:
        """Tell whether the event is one of the survey."""
        return bool(event.metadata.get(_SURVEY))

    def events(self) -> Iterator[MDAEvent]:
        """Yield the survey's events, wait for the objects on its frames, then yield a visit to each."""
        position, n_survey = (0.0, 0.0), 0
        for event in self._survey:
            n_survey += 1
            position = (event.x_pos or 0.0, event.y_pos or 0.0)
            yield event.model_copy(update={"metadata": {**event.metadata, _SURVEY: True}})
        chosen = choose_objects(self.found(), best=self._best, rank=self._rank)
        self.visits = tuple(order_visits(chosen, start=position))
        _log.info("%d objects found, %d to visit", len(self._found), len(self.visits))
        for number, found in enumerate(self.visits):
            yield self._visit.model_copy(
                update={
                    "index": type(self._visit.index)({"p": n_survey + number}),
                    "pos_name": f"object {number}",
                    "x_pos": found.x_um,
                    "y_pos": found.y_um,
                    "metadata": {**self._visit.metadata, "score": found.score, "found_on": found.frame},
                }
            )


def locate_objects(
    result: LiveResult, stage_um: tuple[float, float], axes: tuple[int, int] = (1, 1)
) -> list[FoundObject]:
    """Return the objects of a frame by where the stage sees them in the middle.

    Args:
        result: of the frame, with instances; without a pixel size there are no objects to go to.
        stage_um: where the stage was: the middle of the frame.
        axes: see `LiveAcquisition`.
    """
    instances, size = result.instances, result.pixel_size_um
    if instances is None or size is None:
        if instances is not None and len(instances):
            _log.warning("frame %s has no pixel size: its objects have no place on the stage", result.key)
        return []
    middle = np.array(instances.shape[::-1]) / 2  # x y
    found = []
    for score, origin, mask in zip(instances.scores, instances.origins, instances.masks, strict=True):
        rows, columns = np.nonzero(mask)
        centre = origin + 0.5 + [columns.mean(), rows.mean()]
        x, y = np.asarray(stage_um) + np.asarray(axes) * size * (centre - middle)
        area = float(np.count_nonzero(mask)) * size**2
        found.append(FoundObject(float(x), float(y), float(score), area, str(result.key)))
    return found


def choose_objects(
    found: Iterable[FoundObject], *, best: int | None, rank: Literal["score", "size"]
) -> list[FoundObject]:
    """Return the best objects, best first; one that overlapping fields both saw counts once."""
    chosen: list[FoundObject] = []
    for candidate in sorted(found, key=lambda one: -(one.score if rank == "score" else one.area_um2)):
        if best is not None and len(chosen) == best:
            break
        is_new = all(
            math.hypot(candidate.x_um - other.x_um, candidate.y_um - other.y_um)
            > max(candidate.diameter_um, other.diameter_um) / 2
            for other in chosen
        )
        if is_new:
            chosen.append(candidate)
    return chosen


def order_visits(found: Iterable[FoundObject], *, start: tuple[float, float]) -> Iterator[FoundObject]:
    """Yield the objects so that the stage travels little: always the nearest next."""
    left, at = list(found), start
    while left:
        nearest = min(left, key=lambda one: math.hypot(one.x_um - at[0], one.y_um - at[1]))
        left.remove(nearest)
        at = (nearest.x_um, nearest.y_um)
        yield nearest


def _name_event(event: MDAEvent) -> str:
    """Return what results call the frame of an event: its index, such as "t0 p3 c1"."""
    return " ".join(f"{axis}{number}" for axis, number in event.index.items()) or "frame"
