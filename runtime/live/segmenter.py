"""Frames in, objects out, beside a running acquisition."""

from __future__ import annotations

import contextlib
import logging
import math
import numbers
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from darcnn.runtime.closing import Closing
from darcnn.runtime.errors import DarcnnError, DeviceError, UsageError
from darcnn.runtime.live.calibration import Calibration, Calibrator
from darcnn.runtime.live.frames import BufferPool, check_frame, view_frame
from darcnn.runtime.live.ledger import Ledger
from darcnn.runtime.live.mosaic import Mosaic
from darcnn.runtime.live.mosaic_grid import MosaicGrid
from darcnn.runtime.live.queue import BoundedQueue, Policy, QueueClosedError
from darcnn.runtime.live.stats import LiveStats
from darcnn.runtime.live.ticket import LiveResult, Ticket, check_process
from darcnn.runtime.live.work import FrameWork, Work, name_frame
from darcnn.runtime.live.worker import Worker, drop, dropped, failed, give_up
from darcnn.runtime.load import load
from darcnn.runtime.segmenter import Segmenter

__all__ = ["LiveSegmenter"]

_log = logging.getLogger(__name__)

_CLOSE_S = 1.0  # how long `close` waits for an engine call that runs


class LiveSegmenter(Closing):
    """Finds the objects of frames as they come; a context manager. Any thread may push.

    Each frame that is pushed has one result, in its ticket, in the iteration over the segmenter, and as an
    argument of `on_result`: see `LiveResult`. Results come in the order in which frames are settled: those
    that are computed in the order of `push`, what is given up or fails beforehand at once. One thread
    owns the engine and also calls `on_result`: a slow callback slows it down, and must not wait for frames.
    Iteration and callback may lag behind by 64 results with objects and 1,024 in all; what is older is left
    out of them (not of its ticket) and counted in `stats().unread`.

    Brightness and scale come from the model's rule, and where that asks for statistics, from `calibration`:
    the statistics are given, or learned from the first frame with objects (which takes longer for it) and
    kept, or, with "each", taken from each frame. `push(calibrate=True)` learns anew from that frame.
    """

    def __init__(
        self,
        model: str | Path | Segmenter,
        *,
        queue: int = 8,
        policy: Policy = "block",
        device: str = "auto",
        calibration: Calibration | Literal["first", "each"] = "first",
        on_result: Callable[[LiveResult], None] | None = None,
    ) -> None:
        """Load the model and warm it up; returns when the first frame would be as fast as the hundredth.

        Args:
            model: the name of a shipped model, the path of a bundle, or a segmenter of `load` (backend,
                minimum score), which is taken over. A bundle is read whole: its file may be replaced.
            queue: frames that may wait.
            policy: what happens to a frame that finds the queue full: `block` waits for room, `drop_oldest`
                gives up the frame that waits longest, `drop_newest` the new one.
            device: "cpu", "cuda" or "auto"; of a segmenter its own counts.
            calibration: brightness and scale, or where they are learned.
            on_result: called with each result, by the segmenter's own thread. What it raises is logged. It
                may call `close`, and with a policy that drops `push`. While the segmenter is open it holds
                the callback, and what that holds.
        Raises:
            BundleError: no such model, or the file cannot be used.
            DeviceError: the device does not serve.
            UsageError: an option is wrong.
        """
        frames: BoundedQueue[Work] = BoundedQueue(queue, policy)
        calibrator = Calibrator(calibration)
        segmenter = model if isinstance(model, Segmenter) else load(model, device=device)
        self._pid = os.getpid()
        self._queue = frames
        self._ledger = Ledger(on_result)
        self._pool = BufferPool(queue + 2)  # those that wait, the one computed, the one coming
        self._push_gate = threading.Lock()  # one push after another: order is that of the numbers
        self._worker = Worker(segmenter, frames, self._ledger, calibrator)
        # also when it is forgotten open, or the program ends
        self._finalizer = weakref.finalize(self, _shut, self._worker)

    def push(
        self,
        frame: Any,
        *,
        key: Hashable = None,
        pixel_size_um: float | None = None,
        deadline_ms: float | None = None,
        copy: bool = True,
        calibrate: bool = False,
    ) -> Ticket:
        """Queue a frame and return its ticket; a frame that does not serve fails by its ticket, not here.

        Args:
            frame: (H, W) or (H, W, C) of any real type and strides; a NumPy array, or anything with DLPack
                or `__cuda_array_interface__` (fetched from a GPU by one copy). May be read-only. Values that
                are not finite are seen as black.
            key: what the result calls it; None for its number.
            pixel_size_um: micrometres per pixel. None: the pixels are taken as they are, or as the
                calibration says.
            deadline_ms: from now; checked between engine calls, also while the frame waits. What is finished
                by then is returned, with status `late`. 0 returns at once without objects.
            copy: False reads the frame in place: it must not change until the ticket is ready.
            calibrate: learn brightness and scale from this frame, if it is neither dropped nor late.
        Raises:
            UsageError: closed, ended, or opened in another process; a number that does not serve; or
                called by `on_result` with the policy `block`.
        """
        start = time.perf_counter()
        _check_number("pixel_size_um", pixel_size_um, lowest=math.ulp(0.0))
        _check_number("deadline_ms", deadline_ms, lowest=0.0)

        def make(ticket: Ticket) -> Work:
            array, is_copy = view_frame(frame)
            check_frame(array)
            is_pooled = copy and not is_copy
            return FrameWork(
                ticket,
                self._pool.copy(array) if is_pooled else array,
                pixel_size_um=pixel_size_um,
                calibrates=calibrate,
                give_back=self._pool.give_back if is_pooled else None,
                pushed_at=start,
                deadline_ms=deadline_ms,
            )

        ticket = self._put(make, key, at_once=deadline_ms == 0)
        self._ledger.stopwatch.add_push(1e3 * (time.perf_counter() - start))
        return ticket

    def __iter__(self) -> Iterator[LiveResult]:
        """Yield each result as it is settled, dropped and failed frames too; ends after `end` or `close`."""
        while (result := self._ledger.read()) is not None:
            yield result

    def mosaic(self, grid: MosaicGrid) -> Mosaic:
        """Return what takes the fields of view of `grid` in any order and reports each object once."""
        return Mosaic(grid, self._put)

    def stats(self) -> LiveStats:
        """Return what was pushed, what became of it, and percentiles of the times by stage."""
        check_process(self._pid)
        return self._ledger.summary(waiting=len(self._queue), max_waiting=self._queue.max_length)

    @property
    def calibration(self) -> Calibration | None:
        """What was given or learned; None before a frame was learned from."""
        return self._worker.calibration

    def drain(self, timeout: float | None = None) -> None:
        """Wait until every frame that was pushed has its result, and `on_result` was called with it.

        Raises:
            TimeoutError: the time, seconds, is up.
            UsageError: called by `on_result`.
        """
        check_process(self._pid)
        self._ledger.check_wait()
        if not self._ledger.wait_settled(timeout):
            pending = self.stats().pending
            what = (
                f"{pending} frames have no result" if pending else "on_result was not called with all results"
            )
            raise TimeoutError(f"{what} after {timeout:g} s")

    def end(self) -> None:
        """Take no more frames; those that wait are computed, then the iteration ends."""
        check_process(self._pid)
        self._queue.end()

    def close(self, timeout: float = _CLOSE_S) -> None:
        """Drop what waits, give up what is being computed, and end the thread.

        Allowed twice, and in `on_result`.

        Raises:
            DeviceError: a call did not return within `timeout` seconds; the message names it. The thread ends
                when it returns, or with the process.
        """
        self._worker.stop()
        self._worker.join(timeout)
        self._finalizer.detach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except DeviceError as err:
            if kind is None:
                raise
            _log.error("%s", err)  # what went wrong in the block is what the caller must see

    def _put(self, make: Callable[[Ticket], Work], key: Hashable, *, at_once: bool = False) -> Ticket:
        """Return the ticket of one push; whoever listens is told if it did not get into the queue."""
        check_process(self._pid)
        ticket = self._settle_at_once(make, key) if at_once else self._enqueue(make, key)
        if ticket.is_ready:
            self._queue.wake()  # `on_result` is the worker's to call
            if self._ledger.is_ended:
                self._ledger.tell()
        return ticket

    def _settle_at_once(self, make: Callable[[Ticket], Work], key: Hashable) -> Ticket:
        """Return the ticket of a push whose time is up as it comes: it takes no room from others."""
        if self._queue.is_ended:
            raise _closed()
        ticket = self._ledger.issue(key)
        with self._settling(ticket):
            self._ledger.settle(ticket, give_up(make(ticket)))
        return ticket

    def _enqueue(self, make: Callable[[Ticket], Work], key: Hashable) -> Ticket:
        """Make the work of one push, if there is room for it, and queue it."""
        if self._queue.may_block:
            self._ledger.check_wait()
        with self._push_gate:
            try:
                has_room, victim = self._queue.make_room()
            except QueueClosedError as err:
                raise _closed() from err
            ticket = self._ledger.issue(key)
            if victim is not None:
                drop(victim, self._ledger, "newer frames came before the engine was free")
            if not has_room:
                self._ledger.settle(ticket, dropped(ticket, "the queue was full"))
                return ticket
            with self._settling(ticket):
                work = make(ticket)
                if work.is_overdue(time.perf_counter()):  # it waited for room
                    self._ledger.settle(ticket, give_up(work))
                else:
                    self._queue.put(work)
            return ticket

    @contextlib.contextmanager
    def _settling(self, ticket: Ticket) -> Iterator[None]:
        """Give the frame its result where making or queueing its work fails."""
        try:
            yield
        except QueueClosedError:
            self._ledger.settle(ticket, dropped(ticket, "the segmenter was closed"))
        except DarcnnError as err:
            error = type(err)(err.problem, where=name_frame(ticket), fix=err.fix)
            self._ledger.settle(ticket, failed(ticket, error))
        except Exception as err:  # of the array's library, or no memory: this frame's
            self._ledger.settle(ticket, failed(ticket, err))
        except BaseException:  # Ctrl-C: whoever waits for the frame must not wait for ever
            self._ledger.settle(ticket, dropped(ticket, "the push was interrupted"))
            raise


def _shut(worker: Worker) -> None:
    """End the thread of a segmenter that was left open; there is nobody left to tell of a call that hangs."""
    worker.stop()
    with contextlib.suppress(DeviceError):
        worker.join(_CLOSE_S)


def _closed() -> UsageError:
    return UsageError("takes no more frames", where="LiveSegmenter", fix="push before it is ended or closed")


def _check_number(name: str, value: float | None, *, lowest: float) -> None:
    if value is None:
        return
    if not isinstance(value, numbers.Real) or not (math.isfinite(value) and value >= lowest):
        raise UsageError(
            f"{value!r} does not serve",
            where=name,
            fix="give a number above 0" if lowest else "give 0 or more",
        )
