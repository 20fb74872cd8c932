"""Micro-Manager: frames of a pymmcore-plus acquisition are segmented while it runs, and may steer it.

Needs the extra `micromanager` (pymmcore-plus, useq-schema) in the program that acquires.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from numpy.typing import NDArray

from darcnn.runtime.errors import DarcnnError, UsageError
from darcnn.runtime.live.segmenter import LiveSegmenter
from darcnn.runtime.live.ticket import Ticket
from darcnn.runtime.live.visits import (
    CameraAxes,
    FoundObject,
    Rank,
    check_axes,
    choose_objects,
    locate_objects,
    order_visits,
)

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus
    from useq import MDAEvent

__all__ = ["CameraAxes", "FoundObject", "LiveAcquisition", "SmartAcquisition"]

_log = logging.getLogger(__name__)

_SURVEY = "darcnn_survey"  # marks events in their metadata
_PATIENCE_S = 60.0  # how long the visits wait for the survey's objects


class LiveAcquisition:
    """Pushes each frame that `frameReady` brings; a context manager that listens from enter to exit.

    The acquisition is never kept or stopped by it: what cannot be pushed is logged. Frames may come in one
    thread (with Qt in that of the windows) while another asks what was found.
    """

    def __init__(
        self,
        core: CMMCorePlus,
        live: LiveSegmenter,
        *,
        pixel_size_um: float | None = None,
        axes: CameraAxes | None = None,
    ) -> None:
        """Join a core and a segmenter; both stay the caller's. Its policy should be one that drops,
        unless the queue holds the whole survey.

        Args:
            core: whose acquisition engine (`core.mda`) runs.
            live: gets the frames.
            pixel_size_um: micrometres per pixel; None takes what the core says (its pixel size
                configurations), if it says anything.
            axes: how the camera sits on the stage; None: its columns and rows run along x and y.
        """
        self._core = core
        self._live = live
        self._pixel_size_um = pixel_size_um
        self._axes = check_axes(axes)
        self._changed = threading.Condition()
        self._n_arrived = 0  # frames that were accepted, also those that could not be pushed
        self._pending: deque[tuple[Ticket, tuple[float, float], float | None]] = deque()
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

    def _takes(self, event: MDAEvent) -> bool:
        return self.accepts(event)

    def found(self, timeout: float = _PATIENCE_S) -> list[FoundObject]:
        """Return the objects of all frames so far, in the order of the frames.

        Waits up to `timeout` seconds for frames that are being segmented; what takes longer is left out of
        this answer, and logged.
        """
        try:
            self._live.drain(timeout)
        except TimeoutError as err:
            _log.warning("the acquisition goes on without them: %s", err)
        with self._changed:
            self._digest()
            return list(self._found)

    def _on_frame(self, image: NDArray[Any], event: MDAEvent, meta: Mapping[str, Any]) -> None:
        if not self._takes(event):
            return
        size = self._pixel_size_um or float(meta.get("pixel_size_um") or 0.0) or None
        try:
            x, y, z = self._place(event, meta)
            ticket = self._live.push(image, key=_name_event(event), pixel_size_um=size)
        except (DarcnnError, RuntimeError) as err:  # the latter is the core's: there is no stage to ask
            _log.error("frame %s was not segmented: %s", _name_event(event), err)
            with self._changed:
                self.n_lost += 1
                self._arrive()
            return
        with self._changed:
            self._pending.append((ticket, (x, y), z))
            self._arrive()
            self._digest()

    def _place(self, event: MDAEvent, meta: Mapping[str, Any]) -> tuple[float, float, float | None]:
        """Return where the stage was: as planned, else as the frame says, else where it is now.

        The focus is as the frame says: an autofocus moves it away from the plan.
        """
        noted = meta.get("position") or {}
        x, y = (
            noted.get(axis) if planned is None else planned
            for axis, planned in (("x", event.x_pos), ("y", event.y_pos))
        )
        z = event.z_pos if noted.get("z") is None else noted["z"]
        if x is None or y is None:
            x, y = self._core.getXYPosition()
        return float(x), float(y), None if z is None else float(z)

    def _arrive(self) -> None:
        self._n_arrived += 1
        self._changed.notify_all()

    def _digest(self) -> None:
        """Turn results that are there into objects; nothing of a frame is kept but these."""
        while self._pending and self._pending[0][0].is_ready:
            ticket, stage_um, z_um = self._pending.popleft()
            result = ticket.outcome()
            if result.instances is None:
                self.n_lost += 1
                _log.warning("frame %s was lost: %s", result.key, result.error)
                continue
            self.n_frames += 1
            self._found.extend(locate_objects(result, stage_um, self._axes, z_um=z_um))


class SmartAcquisition(LiveAcquisition):
    """A survey, then a visit to each of the best objects that it found, in one acquisition.

    with SmartAcquisition(core, live, survey, visit=MDAEvent(channel="FITC"), best=20) as smart:
        core.mda.run(smart.events())

    Pass the iterator itself: of other sequences the engine takes events ahead, to run them in hardware.
    """

    def __init__(
        self,
        core: CMMCorePlus,
        live: LiveSegmenter,
        survey: Iterable[MDAEvent],
        *,
        visit: MDAEvent,
        best: int | None = None,
        rank: Rank = "score",
        pixel_size_um: float | None = None,
        axes: CameraAxes | None = None,
    ) -> None:
        """Plan the two parts; nothing moves before `events` is run.

        Args:
            core: whose acquisition engine runs.
            live: segments the frames of the survey.
            survey: events, such as a `useq.MDASequence`, with positions.
            visit: what is done at each object: channel, exposure, properties such as the objective; its
                position is filled in, and the focus of the frame that saw the object, if it has none.
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
        self._rank: Rank = rank
        self.visits: tuple[FoundObject, ...] = ()  # in the order of the visits, once the survey is done

    def _takes(self, event: MDAEvent) -> bool:
        return bool(event.metadata.get(_SURVEY)) and self.accepts(event)

    def events(self) -> Iterator[MDAEvent]:
        """Yield the survey's events, wait for the objects on its frames, then yield a visit to each.

        Raises:
            UsageError: the survey is a grid of fields of view, and nothing tells how large these are.
        """
        position, n_survey, n_frames = (0.0, 0.0), 0, 0
        with self._changed:  # it may be run again
            self._found, self._n_arrived, self.n_frames, self.n_lost = [], 0, 0, 0
            self.visits = ()
            self._pending.clear()
        for planned in self._survey_events():
            event = planned.model_copy(update={"metadata": {**planned.metadata, _SURVEY: True}})
            n_survey += 1
            n_frames += event.action.type == "acquire_image" and self._takes(event)
            position = (event.x_pos or 0.0, event.y_pos or 0.0)
            yield event
        left_s = self._await_frames(n_frames, _PATIENCE_S)
        chosen = choose_objects(self.found(left_s), best=self._best, rank=self._rank)
        self.visits = tuple(order_visits(chosen, start=position))
        _log.info("%d objects found, %d to visit", len(self._found), len(self.visits))
        for number, found in enumerate(self.visits):
            yield self._visit.model_copy(
                update={
                    "index": type(self._visit.index)({"p": n_survey + number}),
                    "pos_name": f"object {number}",
                    "x_pos": found.x_um,
                    "y_pos": found.y_um,
                    "z_pos": found.z_um if self._visit.z_pos is None else self._visit.z_pos,
                    "metadata": {**self._visit.metadata, "score": found.score, "found_on": found.frame},
                }
            )

    def _survey_events(self) -> Iterable[MDAEvent]:
        """Return the survey's events; the fields of a grid are as large as the camera sees them.

        The engine sees to that for a sequence that it runs itself, not for events that come one by one.
        """
        from useq import MDASequence

        if not isinstance(self._survey, MDASequence):
            return self._survey
        engine = self._core.mda.engine
        if self._survey.setup is not None and engine is not None:
            engine.setup_event(self._survey.setup)  # the region of the camera, say
        survey = self._survey.model_copy(deep=True)
        inner = (position.sequence for position in survey.stage_positions)
        grids = [one.grid_plan for one in (survey, *inner) if one is not None and one.grid_plan is not None]
        size = self._pixel_size_um or self._core.getPixelSizeUm()
        *_, width_px, height_px = self._core.getROI()
        for grid in grids:
            if size:
                grid.fov_width, grid.fov_height = width_px * size, height_px * size
            elif grid.fov_width is None or grid.fov_height is None:
                raise UsageError(
                    "is a grid of fields of view of unknown size",
                    where="survey",
                    fix="pass pixel_size_um, define the core's pixel size, or give fov_width and fov_height",
                )
        return survey

    def _await_frames(self, n_frames: int, timeout: float) -> float:
        """Wait until so many frames have come, and return the seconds that are left of `timeout`.

        Where another thread brings the frames (with Qt that of the windows), the last ones come late.
        """
        until = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: self._n_arrived >= n_frames, timeout):
                n_missing = n_frames - self._n_arrived
                _log.warning("the acquisition goes on: %d frames of the survey have not come", n_missing)
        return max(0.0, until - time.monotonic())


def _name_event(event: MDAEvent) -> str:
    """Return what results call the frame of an event: its index, such as "t0 p3 c1"."""
    return " ".join(f"{axis}{number}" for axis, number in event.index.items()) or "frame"
