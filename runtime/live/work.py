"""What the worker does for one push: open it, read its tiles, put together what was found."""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from darcnn.runtime.errors import InputError, ShapeError, UsageError
from darcnn.runtime.instances import Instances
from darcnn.runtime.live.calibration import Calibrator
from darcnn.runtime.live.ticket import FrameTimes, LiveResult, Status, Ticket
from darcnn.runtime.planning import SlidePlan
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import SampledTile, TileSampler
from darcnn.runtime.seams import join_tiles
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import Tile

__all__ = ["FrameWork", "Work", "in_words_of_push", "name_frame", "without_frames"]

_log = logging.getLogger(__name__)


class Work(ABC):
    """One push on its way; the worker alone calls all but `release`."""

    def __init__(self, ticket: Ticket, *, pushed_at: float, deadline_ms: float | None = None) -> None:
        """Note when `push` was called (`time.perf_counter`) and how long the caller waits for the result."""
        self.ticket = ticket
        self.pushed_at = pushed_at
        self.deadline_at = None if deadline_ms is None else pushed_at + deadline_ms / 1e3
        self.error: Exception | None = None
        self.is_late = False
        self.tiles: deque[Tile] = deque()  # still to be read
        self.n_flying = 0  # read and handed to the engine
        self.n_tiles = 0
        self.found: list[tuple[Tile, Instances]] = []
        self.seconds = dict.fromkeys(("wait", "prepare", "detect", "masks", "place"), 0.0)

    @abstractmethod
    def open(self, segmenter: Segmenter, calibrator: Calibrator) -> None:
        """Fill `tiles`.

        Raises:
            DarcnnError: the frame does not serve.
        """

    @abstractmethod
    def read(self, tile: Tile) -> SampledTile:
        """Return one of `tiles` with its pixels."""

    @abstractmethod
    def join(self) -> Instances:
        """Return the objects of `found`."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the frame."""

    @property
    def pixel_size_um(self) -> float | None:
        """Micrometres per pixel of the result, None where unknown."""
        return None

    @property
    def is_settled(self) -> bool:
        """Whether the engine has no more to do for it."""
        return self.n_flying == 0 and (self.error is not None or not self.tiles)

    def is_overdue(self, now: float) -> bool:
        """Whether the deadline is over."""
        return self.deadline_at is not None and now >= self.deadline_at

    def check_deadline(self, now: float) -> None:
        """Give up what is not yet read once the deadline is over."""
        if self.is_overdue(now) and not self.is_late:
            self.is_late = True
            self.tiles.clear()

    def fail(self, error: Exception) -> None:
        """Give up the frame for `error`; the first one counts."""
        self.error = self.error or error
        self.tiles.clear()

    def conclude(self) -> LiveResult:
        """Return the result once all is settled."""
        instances: Instances | None = None
        start = time.perf_counter()
        if self.error is None:
            try:
                instances = self.join()
            except Exception as err:  # the frame's, never the worker's
                self.error = err
        now = time.perf_counter()
        self.seconds["place"] += now - start
        self.is_late = self.is_late or self.is_overdue(now)
        status: Status = "failed" if self.error is not None else "late" if self.is_late else "done"
        return LiveResult(
            key=self.ticket.key,
            number=self.ticket.number,
            status=status,
            instances=instances,
            error=None if self.error is None else without_frames(self.error),
            tiles_done=len(self.found),
            n_tiles=self.n_tiles,
            pixel_size_um=self.pixel_size_um,
            times_ms=FrameTimes(
                **{stage: 1e3 * seconds for stage, seconds in self.seconds.items()},
                total=1e3 * (now - self.pushed_at),
            ),
        )


class FrameWork(Work):
    """A frame that stands for itself."""

    def __init__(
        self,
        ticket: Ticket,
        frame: NDArray[Any],
        *,
        pixel_size_um: float | None,
        calibrates: bool,
        give_back: Callable[[NDArray[Any]], None] | None,
        pushed_at: float,
        deadline_ms: float | None,
    ) -> None:
        """Hold the frame until `release`, which hands it to `give_back`."""
        super().__init__(ticket, pushed_at=pushed_at, deadline_ms=deadline_ms)
        self._frame: NDArray[Any] | None = frame
        self._shape = (int(frame.shape[0]), int(frame.shape[1]))
        self._pixel_size_um = pixel_size_um
        self._calibrates = calibrates
        self._give_back = give_back
        self._plan: SlidePlan | None = None
        self._sampler: TileSampler | None = None

    @property
    def pixel_size_um(self) -> float | None:
        """As it was pushed."""
        return self._pixel_size_um

    def open(self, segmenter: Segmenter, calibrator: Calibrator) -> None:
        """Plan the frame; calibrate on it if it is the one to learn from."""
        assert self._frame is not None  # until `release`
        with in_words_of_push(self.ticket):
            reader = ArrayReader(self._frame, mpp=self._pixel_size_um)
            channels = len(reader.info.channel_names)
            if 1 < channels != segmenter.manifest.input.channels and not reader.info.is_rgb:
                raise InputError(
                    f"has {channels} channels (they come last)", where="frame", fix="push one: frame[..., 0]"
                )
            calibration, _ = calibrator.settle(segmenter, reader, self._frame.dtype, renew=self._calibrates)
            self._plan = calibrator.plan(segmenter, reader, calibration)
            window = calibrator.window(segmenter, reader, self._plan, calibration)
        self._sampler = segmenter.sampler(reader, self._plan, window)
        self.tiles.extend(self._plan.tiles)
        self.n_tiles = len(self.tiles)

    def read(self, tile: Tile) -> SampledTile:
        """Return one of the frame's tiles with its pixels."""
        assert self._plan is not None  # since `open`
        assert self._sampler is not None
        return SampledTile(self._plan, self._shape, tile, self._sampler.read(tile), self._sampler)

    def join(self) -> Instances:
        """Return the frame's objects, each once; those of its first tiles if it is late."""
        if self._plan is None:
            return Instances.empty(self._shape)
        return join_tiles(self._plan, self._shape, self.found)

    def release(self) -> None:
        """Let go of the frame; allowed twice."""
        frame, self._frame, self._sampler = self._frame, None, None
        if frame is not None and self._give_back is not None:
            self._give_back(frame)


def name_frame(ticket: Ticket) -> str:
    """Return what messages call a frame."""
    return f"frame {ticket.key}"


def without_frames(error: Exception) -> Exception:
    """Return the error without its traceback, which keeps the frame in memory; the log has it (debug)."""
    _log.debug("a frame failed", exc_info=error)
    links: list[BaseException | None] = [error]
    seen: set[int] = set()
    while links:
        link = links.pop()
        if link is not None and id(link) not in seen:  # an error may be its own cause
            seen.add(id(link))
            link.__traceback__ = None
            links += [link.__cause__, link.__context__]
    return error


@contextmanager
def in_words_of_push(ticket: Ticket) -> Iterator[None]:
    """Turn errors about an image into errors about this frame, and options into arguments.

    Raises:
        InputError: in place of one of another kind, or without the frame's name.
    """
    try:
        yield
    except ShapeError as err:
        raise InputError(str(err), where=name_frame(ticket), fix="push an image that fits the model") from err
    except (InputError, UsageError) as err:
        fix = err.fix.replace(" (--mpp, of volumes --voxel-size)", " (pixel_size_um)")
        fix = re.sub(r"window=(Window\(.*?\))", r"calibration=Calibration(window=\1)", fix)
        fix = fix.replace("--mpp", "pixel_size_um").replace("--diameter", "Calibration(diameter_px=...)")
        raise InputError(err.problem, where=name_frame(ticket), fix=fix) from err
