"""How long frames take, stage by stage, and what became of them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.engines.protocol import Detections, Engine, EngineSpec, UploadsTiles
from darcnn.runtime.live.ticket import FrameTimes

__all__ = ["LiveStats", "StageTimes", "Stopwatch", "TimedEngine"]

_KEPT = 1024  # the newest times of each stage that percentiles are taken of


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Percentiles of one stage over the newest 1,024 frames, milliseconds."""

    n: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class LiveStats:
    """One look at a live segmenter. Once nothing is pending, pushed = done + late + dropped + failed."""

    pushed: int
    done: int
    late: int
    dropped: int
    failed: int
    waiting: int  # in the queue now
    max_waiting: int  # the most at once since the start
    callback_errors: int  # `on_result` raised; the log has the traceback
    unread: int  # results that left the iteration, or went untold, because nobody took them in time
    stages: Mapping[str, StageTimes]  # "push", and the fields of `FrameTimes`

    @property
    def delivered(self) -> int:
        """Frames whose objects were returned, in time or late."""
        return self.done + self.late

    @property
    def pending(self) -> int:
        """Frames that wait or are being computed."""
        return self.pushed - self.done - self.late - self.dropped - self.failed


class Stopwatch:
    """Collects times by stage; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        names = ["push", *(field.name for field in fields(FrameTimes))]
        self._times: dict[str, deque[float]] = {name: deque(maxlen=_KEPT) for name in names}

    def add_push(self, milliseconds: float) -> None:
        """Note how long `push` kept its caller."""
        with self._lock:
            self._times["push"].append(milliseconds)

    def add_frame(self, times: FrameTimes) -> None:
        """Note the times of a frame that was computed to its end."""
        with self._lock:
            for field in fields(times):
                self._times[field.name].append(getattr(times, field.name))

    def summary(self) -> dict[str, StageTimes]:
        """Return the percentiles of every stage that was seen."""
        with self._lock:
            seen = {name: np.array(times) for name, times in self._times.items() if times}
        return {
            name: StageTimes(len(times), *(float(p) for p in np.percentile(times, (50, 95, 99))))
            for name, times in seen.items()
        }


class StoppedError(Exception):
    """The segmenter was closed before this engine call."""


class TimedEngine:
    """An engine that says how long its calls took and which one runs, and that can be stopped."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_stopped = False
        self.running: str | None = None  # the graph that runs now
        self.seconds = {"detect": 0.0, "masks": 0.0}  # summed until `reset`

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._engine.spec

    def stop(self) -> None:
        """Let the call that runs be the last; the next raises `StoppedError`."""
        self._is_stopped = True

    def reset(self) -> None:
        """Start counting at nothing."""
        self.seconds = {"detect": 0.0, "masks": 0.0}

    def upload(self, tiles: NDArray[np.uint8]) -> Any:
        """Start to copy `tiles` to the device, if the engine is on one."""
        return self._engine.upload(tiles) if isinstance(self._engine, UploadsTiles) else tiles

    def detect(self, tiles: Any) -> Detections:
        """Find objects on `tiles`, as the engine does."""
        self._check()
        self.running, start = "detect", time.perf_counter()
        try:
            return self._engine.detect(tiles)
        finally:
            self.running = None
            self.seconds["detect"] += time.perf_counter() - start

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return mask probabilities for `boxes`, as the engine does."""
        self._check()
        self.running, start = "masks", time.perf_counter()
        try:
            return self._engine.masks(detections, boxes, tile_index)
        finally:
            self.running = None
            self.seconds["masks"] += time.perf_counter() - start

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def _check(self) -> None:
        if self._is_stopped:
            raise StoppedError
