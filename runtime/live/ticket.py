"""What the caller holds of a frame that was pushed, and what became of the frame."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

from darcnn.runtime.errors import DarcnnError, UsageError
from darcnn.runtime.instances import Instances

__all__ = ["FrameDroppedError", "FrameTimes", "LiveResult", "Status", "Ticket", "check_process"]

Status = Literal["done", "late", "dropped", "failed"]


class FrameDroppedError(DarcnnError):
    """A frame was given up before the engine finished it."""


@dataclass(frozen=True, slots=True)
class FrameTimes:
    """How long a frame took, milliseconds; in an engine call that it shared, all of that call counts."""

    wait: float = 0.0  # from `push` until its turn: for room in the queue, and in it
    prepare: float = 0.0  # calibration, plan, pixels of the tiles
    detect: float = 0.0  # first graph
    masks: float = 0.0  # second graph
    place: float = 0.0  # outlines, pixels, seams
    total: float = 0.0  # from `push` until the result was there


@dataclass(frozen=True, slots=True, eq=False)
class LiveResult:
    """What became of one frame.

    - `done`: all objects.
    - `late`: the deadline came first; the objects of the `tiles_done` tiles that were finished.
    - `dropped`: given up, by the queue's policy or because the segmenter was closed; `error` says why.
    - `failed`: `error` says why.
    """

    key: Hashable
    number: int  # 0, 1, ... in the order of `push`
    status: Status
    instances: Instances | None  # pixels of the frame (of a mosaic: of the mosaic); None without a result
    error: Exception | None = None
    tiles_done: int = 0
    n_tiles: int = 0  # 0 if the deadline came before the frame was looked at
    pixel_size_um: float | None = None
    times_ms: FrameTimes = FrameTimes()  # frozen


class Ticket:
    """Stands for a frame that was pushed: `ticket.result()`, or `await ticket` in asyncio."""

    def __init__(self, key: Hashable, number: int, check_wait: Callable[[], None] = lambda: None) -> None:
        """Stand for frame `number`; `check_wait` raises where waiting for it would never end."""
        self.key = key
        self.number = number
        self._check_wait = check_wait
        self._pid = os.getpid()
        self._future: Future[LiveResult] = Future()
        self._future.set_running_or_notify_cancel()  # what waits may be cancelled, the frame may not

    def __repr__(self) -> str:
        state = self._future.result().status if self._future.done() else "pending"
        return f"Ticket(key={self.key!r}, number={self.number}, {state})"

    @property
    def is_ready(self) -> bool:
        """Whether `result` returns at once."""
        return self._future.done()

    def outcome(self, timeout: float | None = None) -> LiveResult:
        """Return what became of the frame, whatever that is; wait up to `timeout` seconds for it.

        Raises:
            TimeoutError: the time is up.
            UsageError: this process is a fork of the one that pushed; or it is not ready, and this is
                `on_result`, which keeps the thread that computes it.
        """
        check_process(self._pid)
        if not self.is_ready:
            self._check_wait()
        return self._future.result(timeout)

    def result(self, timeout: float | None = None) -> LiveResult:
        """Return the objects of the frame, status `done` or `late`; wait up to `timeout` seconds for them.

        Raises:
            TimeoutError: the time is up.
            FrameDroppedError: the frame was dropped.
            UsageError: as of `outcome`.
            Exception: the frame failed; what it failed with.
        """
        return _unwrap(self.outcome(timeout))

    def __await__(self) -> Generator[Any, None, LiveResult]:
        check_process(self._pid)
        result = yield from asyncio.wrap_future(self._future).__await__()
        return _unwrap(result)

    def resolve(self, result: LiveResult) -> None:
        """Hand the result to all who wait; for the segmenter."""
        self._future.set_result(result)


def check_process(pid: int) -> None:
    """Refuse to work in a fork of the process `pid`: threads and engines do not cross a fork.

    Raises:
        UsageError: this process has another number.
    """
    if os.getpid() != pid:
        raise UsageError(
            "was opened in another process, and its threads did not come along",
            where="LiveSegmenter",
            fix="open it in the process that uses it, or start processes with the method 'spawn'",
        )


def _unwrap(result: LiveResult) -> LiveResult:
    if result.error is not None:
        raise result.error.with_traceback(None)  # it may be asked for often: each would add its own frames
    return result
