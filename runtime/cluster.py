"""Rows of tiles, blocks of planes and small pictures done by many processes (extra `cluster`).

They are those of a local Dask cluster, or of one that runs already. A worker gets the path of the slide and
a row's tiles, and gives back the row's part; the process that was given the command writes. A small picture
is a worker's as a whole, with its files. What a worker computes depends on nothing but the slide and the row,
so the result is that of a single process to the byte, in whatever order rows come back. A worker that dies
loses its row only: another does it. The same holds for a volume and its blocks.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar, cast

from distributed import Client, LocalCluster, WorkerPlugin, as_completed, get_worker
from distributed.scheduler import KilledWorker

from darcnn.runtime.batch import run_picture
from darcnn.runtime.errors import BundleError, DarcnnError, DeviceError, UsageError
from darcnn.runtime.pipeline import RunOptions, RunSummary
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.readers.protocol import Location, Reader
from darcnn.runtime.record import model_hash
from darcnn.runtime.rows import FoundRow, Row, SlideTask, find_row
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.volumes.find import Block, FoundBlock, find_block

__all__ = ["ClusterRunner", "SlideSource", "open_cluster"]

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")
_AHEAD = 2  # rows that each worker has in hand: the next one waits where the last ends
_CONNECT_SECONDS, _WORKER_SECONDS = 20, 60


@dataclass(frozen=True, slots=True)
class SlideSource:
    """What a worker opens."""

    path: Location
    z: int | None
    t: int | None


class _Model(WorkerPlugin):
    """The segmenter of a worker, loaded once, and the slide that it read last."""

    def __init__(self, make_segmenter: Callable[[], Segmenter], *, is_ours: bool) -> None:
        self._make = make_segmenter
        self._is_ours = is_ours
        self.segmenter: Segmenter | None = None
        self._opened: tuple[SlideSource, Reader] | None = None
        self.lock: Any = None  # one row at a time, however many threads the worker has

    def setup(self, worker: Any) -> None:
        if self._is_ours:  # Ctrl-C reaches every process of a terminal; the one that gave us work ends us
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.segmenter = self._make()
        self.lock = threading.Lock()

    def teardown(self, worker: Any) -> None:
        # a worker of our own ends with its process; another's goes on, after what it has begun
        with nullcontext() if self._is_ours or self.lock is None else self.lock:
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
class _Loaded:
    """The model that a command has brought to the workers."""

    plugin: str  # its name there, each command's own: several may share a scheduler
    sha256: str  # of its manifest


@contextmanager
def _own_model(model: _Loaded) -> Iterator[tuple[_Model, Segmenter]]:
    """Give a worker its plugin and segmenter, to one task at a time."""
    worker = get_worker()
    if model.plugin not in worker.plugins:
        raise DeviceError("has lost the model", where=worker.address, fix="run the command again")
    plugin = cast(_Model, worker.plugins[model.plugin])
    with plugin.lock:
        segmenter = plugin.segmenter
        assert segmenter is not None  # set up before the first task
        if model_hash(segmenter.manifest) != model.sha256:
            raise DeviceError("has another model of that name", where=get_worker().address, fix="update it")
        yield plugin, segmenter


def _find_row(model: _Loaded, source: SlideSource, task: SlideTask, row: Row) -> FoundRow:
    """Find a row, in a worker."""
    with _own_model(model) as (plugin, segmenter):
        return find_row(segmenter, plugin.open(source), task, row)


def _find_block(model: _Loaded, block: Block) -> FoundBlock:
    """Find a block, in a worker."""
    with _own_model(model) as (_, segmenter):
        return find_block(segmenter, block)


def _run_picture(
    model: _Loaded, out_dir: Path, options: RunOptions, picture: tuple[int, tuple[Location, Path]]
) -> tuple[int, RunSummary | DarcnnError]:
    """Run a whole picture, in a worker."""
    number, (path, below) = picture
    with _own_model(model) as (_, segmenter):
        try:
            return number, run_picture(segmenter, path, out_dir / below, options)
        except (BundleError, DeviceError):  # no other picture would fare better
            raise
        except DarcnnError as err:
            return number, err


class ClusterRunner:
    """Who finds rows and blocks in a cluster; made by `open_cluster`."""

    def __init__(self, client: Client, plugin: str, *, z: int | None, t: int | None) -> None:
        self._client = client
        self._plugin = plugin  # what the model is called on the workers
        self._z, self._t = z, t

    def find_rows(
        self,
        segmenter: Segmenter,
        reader: Reader,
        task: SlideTask,
        rows: Sequence[Row],
        advance: Callable[[int, int], None],
    ) -> Iterator[FoundRow]:
        """Yield the rows as workers finish them: a `RowRunner`.

        Raises:
            InputError: the slide cannot be read by a worker.
            UsageError: the slide lies in memory, where no worker sees it.
            DeviceError: a row killed several workers, or the scheduler is gone.
        """
        path = reader.info.path
        if path is None:
            raise UsageError("an image in memory has no workers", where="--workers", fix="leave it out")
        source = SlideSource(path if isinstance(path, str) else path.absolute(), self._z, self._t)
        # the tiles of all other rows need not travel
        common = replace(task, plan=replace(task.plan, tiles=()))
        n_tiles = {row.number: len(row.tiles) for row in rows}
        work = partial(_find_row, self._loaded(segmenter), source, common)
        for found in self._spread(work, rows):
            yield found
            advance(n_tiles[found.number], found.table.num_rows)

    def find_blocks(
        self, segmenter: Segmenter, blocks: Sequence[Block], advance: Callable[[int, int], None]
    ) -> Iterator[FoundBlock]:
        """Yield the blocks as workers finish them: a `BlockRunner`.

        Workers must see the volume, or what it was unpacked to in the folder of results, under the same path.

        Raises:
            InputError: the volume cannot be read by a worker.
            DeviceError: a block killed several workers, or the scheduler is gone.
        """
        n_planes = {block.number: block.stop - block.start for block in blocks}
        work = partial(_find_block, self._loaded(segmenter))
        for found in self._spread(work, [block.for_others() for block in blocks]):
            yield found
            advance(n_planes[found.number], found.table.num_rows)

    def run_pictures(
        self,
        segmenter: Segmenter,
        pictures: Sequence[tuple[Location, Path]],
        out_dir: Path,
        options: RunOptions,
    ) -> Iterator[tuple[int, RunSummary | DarcnnError]]:
        """Yield what came of each picture as workers finish them: a `SlideRunner`.

        Nothing comes of any where workers do not see `out_dir`.

        Raises:
            OutputError: there cannot be files in `out_dir`.
            BundleError, DeviceError: no picture would fare better, or one killed several workers.
        """
        with translated(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
            probe = NamedTemporaryFile(dir=out_dir, prefix=".", suffix=".seen")  # noqa: SIM115  # see below
        with probe:
            sees = self._client.run(os.path.exists, str(Path(probe.name).resolve()))
        if not all(sees.values()):
            return
        if options.roi is not None and Path(options.roi).is_file():
            options = replace(options, roi=str(Path(options.roi).resolve()))
        work = partial(_run_picture, self._loaded(segmenter), out_dir.resolve(), options)
        # not resolved: a link's own name is that of its result
        places = [(path if isinstance(path, str) else path.absolute(), below) for path, below in pictures]
        for number, result in self._spread(work, list(enumerate(places))):
            if isinstance(result, RunSummary):  # as the command was given it
                folder = out_dir / pictures[number][1] / result.folder.name
                result = replace(result, folder=folder, overview=folder / result.overview.name)
            yield number, result

    def _loaded(self, segmenter: Segmenter) -> _Loaded:
        return _Loaded(self._plugin, model_hash(segmenter.manifest))

    def _spread(self, work: Callable[[_Item], _Found], items: Sequence[_Item]) -> Iterator[_Found]:
        """Yield what workers make of `items`, as they finish; each has one more waiting."""
        waiting, run = iter(enumerate(items)), uuid.uuid4().hex

        def submit(number: int, item: _Item) -> Any:
            return self._client.submit(work, item, key=f"darcnn-{number}-{run}", pure=False)

        n_ahead = _AHEAD * max(1, len(self._client.nthreads()))
        first = [submit(*item) for item in islice(waiting, n_ahead)]
        running = as_completed(first, loop=self._client.loop)
        try:
            for future in running:
                found: _Found = _result(future)
                future.release()
                for item in islice(waiting, 1):
                    running.add(submit(*item))
                yield found
        finally:
            self._client.cancel(list(running.futures))


def _result(future: Any) -> Any:
    try:
        return future.result()
    except KilledWorker as err:
        raise DeviceError(
            f"a part of the work took {err.allowed_failures + 1} workers with it",
            where=err.last_worker.address,
            fix="give the workers more memory, or run fewer of them",
        ) from err
    except CancelledError as err:
        raise DeviceError(
            "the scheduler is gone", where="--scheduler", fix="start it again; the same command goes on"
        ) from err


def _load_model(client: Client, model: _Model, name: str) -> None:
    try:
        client.register_plugin(model, name=name)
    except DarcnnError:
        raise
    except Exception as err:  # Dask hands on what a worker said as a plain Exception: no module, old versions
        raise UsageError(
            f"a worker cannot load the model ({err})",
            where="--scheduler",
            fix="install the same darcnn where the workers run",
        ) from err


@contextmanager
def open_cluster(
    make_segmenter: Callable[[], Segmenter],
    *,
    n_workers: int | None = None,
    scheduler: str | None = None,
    z: int | None = None,
    t: int | None = None,
) -> Iterator[ClusterRunner]:
    """Give a runner whose workers have loaded a model each; they end, or forget it, when the block ends.

    Args:
        make_segmenter: how a worker loads the model; it is sent there.
        n_workers: so many processes are started on this machine ...
        scheduler: ... or those of this scheduler ("tcp://host:8786") are used. They must see the slides under
            the same paths and have darcnn installed.
        z: which plane the slides are opened at.
        t: which time point, likewise.
    Raises:
        UsageError: no scheduler answers, or it has no workers, or they lack darcnn.
        BundleError, DeviceError: a worker cannot load the model.
    """
    with ExitStack() as stack:
        if scheduler is None:
            address: Any = stack.enter_context(
                LocalCluster(
                    n_workers=n_workers,
                    threads_per_worker=1,
                    processes=True,
                    dashboard_address="127.0.0.1:0",  # a free port, seen on this machine only
                    memory_limit=0,  # slides are read in pieces: no worker need be stopped for what it holds
                    silence_logs=logging.CRITICAL,
                )
            )
        else:
            address = scheduler
        try:
            client = stack.enter_context(Client(address, timeout=_CONNECT_SECONDS, set_as_default=False))
            client.wait_for_workers(1, timeout=_WORKER_SECONDS)
        except (OSError, ValueError) as err:  # a timeout is an OSError
            raise UsageError(
                f"no scheduler with workers answers at {scheduler}",
                where="--scheduler",
                fix="start one with `dask scheduler` and `dask worker`, or pass --workers",
            ) from err
        plugin = f"darcnn-model-{uuid.uuid4().hex}"
        _load_model(client, _Model(make_segmenter, is_ours=scheduler is None), plugin)
        try:
            yield ClusterRunner(client, plugin, z=z, t=t)
        finally:
            if scheduler is not None:  # workers of our own end with their memory
                with suppress(KeyError, ValueError, OSError):  # some are gone, and nothing is left there
                    client.unregister_worker_plugin(plugin)
