"""What a worker of a cluster does: load the model once, find rows and blocks, pictures (extra `cluster`)."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from distributed import WorkerPlugin, get_worker

from darcnn.runtime.batch import run_picture
from darcnn.runtime.errors import DeviceError
from darcnn.runtime.pipeline import RunOptions, RunSummary
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.readers.protocol import Location, Reader
from darcnn.runtime.record import model_hash
from darcnn.runtime.rows import FoundRow, Row, SlideTask, find_row
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.find import Block, FoundBlock, find_block

__all__ = ["LoadedModel", "SlideSource", "WorkerModel", "work_on_block", "work_on_picture", "work_on_row"]


@dataclass(frozen=True, slots=True)
class SlideSource:
    """What a worker opens."""

    path: Location
    z: int | None
    t: int | None


class WorkerModel(WorkerPlugin):
    """The segmenter of a worker, loaded once, and the slide that it read last."""

    def __init__(
        self, make_segmenter: Callable[[], Segmenter], *, is_ours: bool, gpus: Sequence[str] = ()
    ) -> None:
        self._make = make_segmenter
        self._is_ours = is_ours
        self._gpus = gpus  # that workers of our own share out among them
        self.segmenter: Segmenter | None = None
        self._opened: tuple[SlideSource, Reader] | None = None
        self.lock: Any = None  # one row at a time, however many threads the worker has
        self.failure: Exception | None = None

    def setup(self, worker: Any) -> None:
        if self._is_ours:  # Ctrl-C reaches every process of a terminal; the one that gave us work ends us
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._gpus:  # before CUDA starts in this process; our workers are numbered from 0
            os.environ["CUDA_VISIBLE_DEVICES"] = self._gpus[worker.name % len(self._gpus)]
        self.lock = threading.Lock()
        try:
            self.segmenter = self._make()
        except Exception as err:
            self.failure = err  # Dask tells of it at the start; of a worker that comes later our tasks do
            raise

    async def teardown(self, worker: Any) -> None:
        await asyncio.to_thread(self._close)  # a worker that answers nobody for long is taken for dead

    def _close(self) -> None:
        # a worker of our own ends with its process; another's goes on, after what it has begun
        with nullcontext() if self._is_ours else self.lock:
            self._close_slide()
            if self.segmenter is not None:
                self.segmenter.close()

    def open(self, source: SlideSource) -> Reader:
        if self._opened is None or self._opened[0] != source:
            self._close_slide()
            self._opened = (source, open_source(source.path, z=source.z, t=source.t))
        return self._opened[1]

    def _close_slide(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The model that a command has brought to the workers."""

    plugin: str  # its name there, each command's own: several may share a scheduler
    sha256: str  # of its manifest


@contextmanager
def _own_model(model: LoadedModel) -> Iterator[tuple[WorkerModel, Segmenter]]:
    """Give a worker its plugin and segmenter, to one task at a time."""
    worker = get_worker()
    if model.plugin not in worker.plugins:
        raise DeviceError("has lost the model", where=worker.address, fix="run the command again")
    plugin = cast(WorkerModel, worker.plugins[model.plugin])
    with plugin.lock:
        segmenter = plugin.segmenter
        if segmenter is None:
            raise DeviceError(
                f"cannot load the model ({plugin.failure})",
                where=worker.address,
                fix="mend or leave out this worker; the same command goes on",
            )
        if model_hash(segmenter.manifest) != model.sha256:
            raise DeviceError("has another model of that name", where=worker.address, fix="update it")
        yield plugin, segmenter


def work_on_row(model: LoadedModel, source: SlideSource, task: SlideTask, row: Row) -> FoundRow:
    """Find a row, in a worker."""
    with _own_model(model) as (plugin, segmenter):
        return find_row(segmenter, plugin.open(source), task, row)


def work_on_block(model: LoadedModel, block: Block) -> FoundBlock:
    """Find a block, in a worker."""
    with _own_model(model) as (_, segmenter):
        return find_block(segmenter, block)


def work_on_picture(
    model: LoadedModel, out_dir: Path, options: RunOptions, picture: tuple[Location, Path]
) -> RunSummary:
    """Run a whole picture, in a worker."""
    path, below = picture
    with _own_model(model) as (_, segmenter):
        return run_picture(segmenter, path, out_dir / below, options)
