"""The one thread that owns the engine: takes frames from the queue, fills batches, hands out results."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque

import numpy as np

from darcnn.runtime.engines.protocol import UploadsTiles
from darcnn.runtime.errors import DeviceError
from darcnn.runtime.live.calibration import Calibration, Calibrator
from darcnn.runtime.live.ledger import Ledger
from darcnn.runtime.live.queue import BoundedQueue
from darcnn.runtime.live.stats import TimedEngine
from darcnn.runtime.live.ticket import FrameDroppedError, LiveResult, Ticket
from darcnn.runtime.live.work import Work, name_frame, without_frames
from darcnn.runtime.sampling import SampledTile
from darcnn.runtime.segmenter import Segmenter

__all__ = ["Worker", "drop", "dropped", "failed", "give_up"]

_log = logging.getLogger(__name__)

_RUNS_ON_A_DEVICE = 3  # until a graph is recorded (`darcnn.runtime.engines.tensorrt_graph`)

Batch = list[tuple[Work, SampledTile]]


class Worker:
    """Runs what waits in a queue through one segmenter, in order, until the queue is ended and empty.

    Tiles of several frames share an engine call where they wait and a batch has room. Between calls it
    looks at deadlines and at `stop`.
    """

    def __init__(
        self, segmenter: Segmenter, queue: BoundedQueue[Work], ledger: Ledger, calibrator: Calibrator
    ) -> None:
        """Take over the segmenter, start the thread, and wait until the engine is warm.

        Raises:
            Exception: what the engine raised on its first call.
        """
        self._is_on_device = isinstance(segmenter.engine, UploadsTiles)
        self._engine = TimedEngine(segmenter.engine)
        self._segmenter = Segmenter(self._engine, segmenter.manifest, min_score=segmenter.min_score)
        self._queue = queue
        self._ledger = ledger
        self._calibrator = calibrator
        self._open: deque[Work] = deque()  # oldest first; delivered in this order
        self._is_stopped = False
        self._leaving, self._is_leaving = threading.Lock(), False
        self._doing = "the warm-up"
        self._pid = os.getpid()
        self._is_warm = threading.Event()
        self._cold: BaseException | None = None
        # a daemon: an engine call that hangs must not keep the whole program from ending
        self._thread = threading.Thread(target=self._run, name="darcnn-live", daemon=True)
        self._thread.start()
        try:
            self._is_warm.wait()
        except KeyboardInterrupt:
            self.stop()
            raise
        if self._cold is not None:
            self._thread.join()
            raise self._cold

    @property
    def calibration(self) -> Calibration | None:
        """What was given or learned, None until a frame was learned from."""
        return self._calibrator.known

    def stop(self) -> None:
        """Drop what waits at once, and what is being computed after the engine call that runs."""
        if os.getpid() != self._pid:
            return  # a fork: the thread is not here, and locks may be held for ever
        self._is_stopped = True
        self._engine.stop()
        with self._leaving:  # not while the thread hands out its last results
            waiting = self._queue.clear()
            if not self._is_leaving:
                for work in waiting:
                    drop(work, self._ledger, "the segmenter was closed")

    def join(self, timeout: float) -> None:
        """Wait for the thread's end; returns at once in the thread itself, or in a fork.

        Raises:
            DeviceError: it did not end in time; the message names the call that hangs.
        """
        if threading.current_thread() is self._thread or os.getpid() != self._pid:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            call = f"the engine call `{self._engine.running}`" if self._engine.running else self._doing
            raise DeviceError(
                f"{call} has not returned {timeout:g} s after closing",
                where="LiveSegmenter",
                fix="wait and close again; the thread ends with the call, or with the process",
            )

    def _run(self) -> None:
        try:
            self._warm_up()
        except BaseException as err:  # handed to the thread that opens
            self._cold = err
            self._segmenter.close()
            self._is_warm.set()
            return
        self._is_warm.set()
        reason = "the segmenter was closed"
        try:
            self._serve()
        except BaseException:
            reason = "the worker of the segmenter failed, see the log"
            _log.exception("the worker of a live segmenter failed")
        finally:
            with self._leaving:
                self._is_leaving = True
                for work in (*self._open, *self._queue.clear()):
                    drop(work, self._ledger, reason)
            self._open.clear()
            try:
                self._ledger.tell()
            finally:  # whatever a callback does, whoever waits is let go
                self._ledger.end()
                self._segmenter.close()
                self._ledger.tell()  # what a push that was under way has settled meanwhile

    def _warm_up(self) -> None:
        """Call both graphs: the first call allocates what later ones use, on a GPU the third records."""
        spec = self._engine.spec
        tiles = np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
        for _ in range(_RUNS_ON_A_DEVICE if self._is_on_device else 1):
            found = self._engine.detect(tiles)
            self._engine.masks(found, found.boxes[0, :1], np.zeros(1, np.int64))

    def _serve(self) -> None:
        while not self._is_stopped:
            self._give_up_overdue()
            self._deliver()  # also what was just given up: there may be nothing else to wake up for
            if not self._open:
                self._doing = "nothing"
                work = self._queue.take()
                if work is None:
                    if self._queue.is_ended and not len(self._queue):
                        return
                    continue  # woken to tell of a frame that never came here
                self._begin(work)
            batch = self._gather()
            if batch and not self._is_stopped:
                self._compute(batch)

    def _give_up_overdue(self) -> None:
        """Settle the frames that wait and whose deadline is over: nobody waits for them any more."""
        now = time.perf_counter()
        for work in self._queue.take_if(lambda one: one.is_overdue(now)):
            work.seconds["wait"] = now - work.pushed_at
            self._ledger.settle(work.ticket, give_up(work))

    def _begin(self, work: Work) -> None:
        """Open a frame: calibration, plan, tiles."""
        start = time.perf_counter()
        self._doing = f"the preparation of {name_frame(work.ticket)}"
        work.seconds["wait"] = start - work.pushed_at
        self._open.append(work)
        work.check_deadline(start)
        if work.is_late:
            return
        try:
            work.open(self._segmenter, self._calibrator)
        except Exception as err:  # this frame's: the next one goes on
            work.fail(err)
        work.seconds["prepare"] += time.perf_counter() - start

    def _gather(self) -> Batch:
        """Return up to a batch of tiles of the oldest frames; opens those that wait while there is room."""
        now, size = time.perf_counter(), self._engine.spec.batch
        for work in self._open:
            work.check_deadline(now)
        batch: Batch = []
        turn = 0
        while len(batch) < size:
            if turn == len(self._open):
                waiting = self._queue.take(wait=False)
                if waiting is None:
                    break
                self._begin(waiting)
                if not waiting.tiles:
                    break  # late or failed: its result goes out before more is opened
            work = self._open[turn]
            if not work.tiles:
                turn += 1
                continue
            start = time.perf_counter()
            try:
                batch.append((work, work.read(work.tiles.popleft())))
                work.n_flying += 1
            except Exception as err:  # this frame's
                work.fail(err)
            work.seconds["prepare"] += time.perf_counter() - start
        return batch

    def _compute(self, batch: Batch) -> None:
        """Run one engine call; if it fails for several frames together, one for each."""
        self._doing = "the engine call for " + ", ".join(sorted({name_frame(w.ticket) for w, _ in batch}))
        works = list(dict.fromkeys(work for work, _ in batch))
        self._engine.reset()
        start = time.perf_counter()
        try:
            found = self._segmenter.segment_tiles([sampled for _, sampled in batch])
        except Exception as err:  # of these frames: the next ones go on
            if len(works) > 1:
                for work in works:
                    self._compute([pair for pair in batch if pair[0] is work])
                return
            works[0].fail(err)
            works[0].n_flying -= len(batch)
            return
        spent = time.perf_counter() - start
        for work in works:
            for graph, seconds in self._engine.seconds.items():
                work.seconds[graph] += seconds
            work.seconds["place"] += spent - sum(self._engine.seconds.values())
        for (work, sampled), instances in zip(batch, found, strict=True):
            work.found.append((sampled.tile, instances))
            work.n_flying -= 1

    def _deliver(self) -> None:
        """Hand out the results of the oldest frames that are settled, and what was dropped meanwhile."""
        while self._open and self._open[0].is_settled:
            work = self._open.popleft()
            result = work.conclude()
            work.release()
            if result.status in ("done", "late"):
                self._ledger.stopwatch.add_frame(result.times_ms)
            self._doing = f"on_result for {name_frame(work.ticket)}"
            self._ledger.settle(work.ticket, result)
        self._ledger.tell()


def give_up(work: Work) -> LiveResult:
    """Return the result of a frame whose deadline was over before it was looked at."""
    work.check_deadline(time.perf_counter())
    result = work.conclude()
    work.release()
    return result


def drop(work: Work, ledger: Ledger, reason: str) -> None:
    """Give up a frame before it is done, and say so."""
    work.release()
    ledger.settle(work.ticket, dropped(work.ticket, reason))


def dropped(ticket: Ticket, reason: str) -> LiveResult:
    """Return the result of a frame that was given up."""
    error = FrameDroppedError(
        reason,
        where=name_frame(ticket),
        fix="push more slowly, choose another policy, or push it again",
    )
    return LiveResult(key=ticket.key, number=ticket.number, status="dropped", instances=None, error=error)


def failed(ticket: Ticket, error: Exception) -> LiveResult:
    """Return the result of a frame that could not be queued."""
    known = without_frames(error)
    return LiveResult(key=ticket.key, number=ticket.number, status="failed", instances=None, error=known)
