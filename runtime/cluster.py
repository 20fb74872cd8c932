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
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

from distributed import Client, LocalCluster, Security, wait
from distributed.scheduler import KilledWorker

from darcnn.runtime.cluster_worker import (
    LoadedModel,
    SlideSource,
    WorkerModel,
    work_on_block,
    work_on_picture,
    work_on_row,
)
from darcnn.runtime.engines.cuda import visible_gpus
from darcnn.runtime.engines.graphs import first_line
from darcnn.runtime.errors import BundleError, DarcnnError, DeviceError, InputError, UsageError
from darcnn.runtime.interrupts import without_interrupts
from darcnn.runtime.pipeline import RunOptions, RunSummary
from darcnn.runtime.readers.protocol import Location, Reader
from darcnn.runtime.record import model_hash
from darcnn.runtime.rows import FoundRow, Row, SlideTask
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import translated
from darcnn.runtime.volumes.find import Block, FoundBlock

__all__ = ["ClusterRunner", "open_cluster"]

_Item = TypeVar("_Item")
_AHEAD = 2  # rows that each worker has in hand: the next one waits where the last ends
_CONNECT_SECONDS, _WORKER_SECONDS = 20, 60
_LOOK_SECONDS = 5  # between looks at whether there are workers


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
            InputError: the slide cannot be read by a worker, or a row of it killed several.
            UsageError: the slide lies in memory, where no worker sees it.
            DeviceError: the scheduler or all workers are gone, or one cannot load the model.
        """
        path = reader.info.path
        if path is None:
            raise UsageError("an image in memory has no workers", where="--workers", fix="leave it out")
        source = SlideSource(path if isinstance(path, str) else path.absolute(), self._z, self._t)
        # the tiles of all other rows need not travel
        common = replace(task, plan=replace(task.plan, tiles=()))
        n_tiles = {row.number: len(row.tiles) for row in rows}
        work = partial(work_on_row, self._loaded(segmenter), source, common)
        for _, future in self._spread(work, rows):
            found: FoundRow = self._result(future, path)
            yield found
            advance(n_tiles[found.number], found.table.num_rows)

    def find_blocks(
        self, segmenter: Segmenter, blocks: Sequence[Block], advance: Callable[[int, int], None]
    ) -> Iterator[FoundBlock]:
        """Yield the blocks as workers finish them: a `BlockRunner`.

        Workers must see the volume, or what it was unpacked to in the folder of results, under the same path.

        Raises:
            InputError: the volume cannot be read by a worker, or a block of it killed several.
            DeviceError: the scheduler or all workers are gone, or one cannot load the model.
        """
        n_planes = {block.number: block.stop - block.start for block in blocks}
        work = partial(work_on_block, self._loaded(segmenter))
        for number, future in self._spread(work, [block.for_others() for block in blocks]):
            found: FoundBlock = self._result(future, blocks[number].view.stack.volume.info.path)
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

        Nothing comes of any where workers do not see `out_dir`, or nothing can be written there.

        Raises:
            OutputError: `out_dir` cannot be made.
            BundleError, DeviceError: no picture would fare better.
        """
        with translated(out_dir):
            out_dir.mkdir(parents=True, exist_ok=True)
        try:
            probe = NamedTemporaryFile(dir=out_dir, prefix=".", suffix=".seen")  # noqa: SIM115  # see below
        except OSError:  # those that are done need no worker, the others say it
            return
        with probe:
            sees = self._client.run(os.path.exists, str(Path(probe.name).resolve()))
        if not all(sees.values()):
            return
        if options.roi is not None and Path(options.roi).is_file():
            options = replace(options, roi=str(Path(options.roi).resolve()))
        work = partial(work_on_picture, self._loaded(segmenter), out_dir.resolve(), options)
        # not resolved: a link's own name is that of its result
        places = [(path if isinstance(path, str) else path.absolute(), below) for path, below in pictures]
        for number, future in self._spread_surely(work, places):
            path, below = pictures[number]
            try:
                summary: RunSummary = self._result(future, path)
            except (BundleError, DeviceError):
                raise
            except DarcnnError as err:
                yield number, err
                continue
            folder = out_dir / below / summary.folder.name  # as the command was given it
            yield number, replace(summary, folder=folder, overview=folder / summary.overview.name)

    def _loaded(self, segmenter: Segmenter) -> LoadedModel:
        return LoadedModel(self._plugin, model_hash(segmenter.manifest))

    def _spread_surely(
        self, work: Callable[[_Item], object], items: Sequence[_Item]
    ) -> Iterator[tuple[int, Any]]:
        """Spread items each of which may fail: those that seem to kill workers are tried again, alone.

        An item that waits at a worker is held to have killed it as well.
        """
        suspects = []
        for number, future in self._spread(work, items):
            if future.status == "error" and isinstance(future.exception(), KilledWorker):
                suspects.append(number)
            else:
                yield number, future
        for number in suspects:
            for _, future in self._spread(work, items[number : number + 1]):
                yield number, future

    def _spread(self, work: Callable[[_Item], object], items: Sequence[_Item]) -> Iterator[tuple[int, Any]]:
        """Yield the number of each item and the future of its result as it is finished.

        Each worker has one more waiting.
        """
        waiting, run = iter(enumerate(items)), uuid.uuid4().hex
        running: dict[Any, int] = {}

        def submit(n_items: int) -> None:
            for number, item in islice(waiting, n_items):
                future = self._client.submit(work, item, key=f"darcnn-{number}-{run}", pure=False)
                running[future] = number

        self._revive()
        submit(_AHEAD * max(1, len(self._client.nthreads())))
        try:
            while running:
                for future in self._wait(list(running)):
                    number = running.pop(future)
                    submit(1)
                    yield number, future
        finally:
            self._client.cancel(list(running))

    def _wait(self, running: Sequence[Any]) -> Collection[Any]:
        """Return which are finished, one at least.

        Raises:
            DeviceError: the scheduler is gone, or all workers for a minute.
        """
        seen = time.monotonic()
        while time.monotonic() - seen < _WORKER_SECONDS:
            try:
                with self._client.as_current():
                    done: Collection[Any] = wait(running, _LOOK_SECONDS, return_when="FIRST_COMPLETED").done
                return done
            except TimeoutError:
                self._revive()
                with suppress(OSError):  # no answer: if the scheduler is gone, all is cancelled soon
                    seen = time.monotonic() if self._client.nthreads() else seen
            except CancelledError as err:
                raise _lost_scheduler() from err
        raise DeviceError(
            "no workers are left",
            where="the cluster",
            fix="see why they ended, and start them again; the same command goes on",
        )

    def _revive(self) -> None:
        """Have workers of our own started again that Dask has given up: those that died as they began."""
        if isinstance(own := self._client.cluster, LocalCluster):
            own.scale(len(own.worker_spec))

    def _result(self, future: Any, where: Location) -> Any:
        """Return what a worker has made of the slide `where` or a part of it; what it raised is raised."""
        while True:
            self._wait([future])
            try:
                result = future.result(timeout=_WORKER_SECONDS)
            except TimeoutError:
                if future.status == "error":
                    raise
                continue  # it has gone with the worker that had it: another does the work again
            except KilledWorker as err:
                raise InputError(
                    f"took {err.allowed_failures + 1} workers with it",
                    where=where,
                    fix="give the workers more memory, or run fewer of them",
                ) from err
            except CancelledError as err:
                raise _lost_scheduler() from err
            future.release()
            return result


def _lost_scheduler() -> DeviceError:
    return DeviceError(
        "the scheduler is gone", where="--scheduler", fix="start it again; the same command goes on"
    )


def _check_address(scheduler: str) -> None:
    """Raise what a Dask client would tell in pages, and wait for."""
    protocol = scheduler.partition("://")[0]
    if protocol not in ("tcp", "tls"):
        raise UsageError(f"{scheduler!r} is no address", where="--scheduler", fix="give tcp://host:8786")
    if protocol == "tls" and Security().get_connection_args("client").get("ssl_context") is None:
        raise UsageError(
            "tls:// needs certificates",
            where="--scheduler",
            fix="name them in Dask's settings, distributed.comm.tls, or give a tcp:// address",
        )


def _load_model(client: Client, model: WorkerModel, name: str) -> None:
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


def _start_workers(n_workers: int | None) -> LocalCluster:
    try:
        return LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # a free port, seen on this machine only
            memory_limit=0,  # slides are read in pieces: no worker is stopped for what it holds
            silence_logs=logging.CRITICAL,
        )
    except (OSError, RuntimeError) as err:  # no process may be started, say, or no port opened
        raise DeviceError(
            f"processes do not start ({first_line(err)})",
            where="--workers",
            fix="ask for fewer, or leave it out",
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
            with without_interrupts():
                address: Any = stack.enter_context(_start_workers(n_workers))
        else:
            _check_address(scheduler)
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
        try:
            gpus = visible_gpus() if scheduler is None else []
            _load_model(client, WorkerModel(make_segmenter, is_ours=scheduler is None, gpus=gpus), plugin)
            yield ClusterRunner(client, plugin, z=z, t=t)
        finally:
            if scheduler is not None:  # workers of our own end with their memory
                with suppress(KeyError, ValueError, OSError):  # some are gone, and nothing is left there
                    client.unregister_worker_plugin(plugin)
