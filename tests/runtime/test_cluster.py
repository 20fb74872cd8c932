"""Many processes find what one finds, to the byte; what fails in one of them stops no other work."""

import asyncio
import errno
import multiprocessing
import os
import signal
import threading
from functools import partial
from multiprocessing.spawn import get_executable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

cluster = pytest.importorskip("darcnn.runtime.cluster", reason="needs the extra cluster")

from darcnn.runtime import batch  # noqa: E402
from darcnn.runtime.cli import main  # noqa: E402
from darcnn.runtime.cluster_worker import WorkerModel  # noqa: E402
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest  # noqa: E402
from darcnn.runtime.errors import BundleError, DeviceError, InputError, OutputError, UsageError  # noqa: E402
from darcnn.runtime.interrupts import without_interrupts  # noqa: E402
from darcnn.runtime.load import load  # noqa: E402
from darcnn.runtime.pipeline import RunOptions, run_slide  # noqa: E402
from darcnn.runtime.readers.array import ArrayReader  # noqa: E402
from darcnn.runtime.readers.open import open_source  # noqa: E402
from darcnn.runtime.segmenter import Segmenter  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    labels = np.zeros((400, 330), np.int32)
    generator = np.random.default_rng(4)
    rows, columns = np.ogrid[:400, :330]
    for _ in range(120):
        y, x = generator.uniform((0, 0), (400, 330))
        disk = (rows - y) ** 2 + (columns - x) ** 2 < generator.uniform(4, 9) ** 2
        if disk.sum() > 12 and not labels[(rows - y) ** 2 + (columns - x) ** 2 < 12**2].any():
            labels[disk] = labels.max() + 1
    path = tmp_path_factory.mktemp("slides") / "disks.png"
    Image.fromarray(encode_labels(labels)).save(path)
    return path


def oracle(engine=OracleEngine, **options):
    """Return what makes a segmenter; it can be sent to other processes."""
    made = engine(tile_px=128, batch=2, mask_px=48, **options)
    return partial(Segmenter, made, make_oracle_manifest(made, halo_px=32))


@pytest.fixture
def importable(monkeypatch):
    """Let workers import what lies beside this file."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture
def deadly(importable, tmp_path):
    """Return what makes a segmenter that kills so many processes."""
    from deadly_engine import DeadlyEngine

    (tmp_path / "tombs").mkdir()
    return lambda deaths: oracle(DeadlyEngine, tombs=str(tmp_path / "tombs"), deaths=deaths)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


@pytest.fixture(scope="module")
def alone(slide, tmp_path_factory):
    with oracle()() as segmenter, open_source(slide) as reader:
        return contents(run_slide(segmenter, reader, tmp_path_factory.mktemp("alone")).folder)


def run_with(make, slide, out, **options):
    steps = []
    with (
        cluster.open_cluster(make, **options) as runner,
        oracle()() as segmenter,
        open_source(slide) as reader,
    ):
        summary = run_slide(
            segmenter,
            reader,
            out,
            find_rows=runner.find_rows,
            progress=lambda done, total, **_: steps.append((done, total)),
        )
    assert [total for _, total in steps] == [steps[-1][0]] * len(steps)
    return contents(summary.folder)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_workers_find_what_one_process_finds_to_the_byte(slide, alone, tmp_path, n_workers):
    assert run_with(oracle(), slide, tmp_path, n_workers=n_workers) == alone


def test_a_worker_that_dies_loses_its_row_only(slide, alone, deadly, tmp_path):
    assert run_with(deadly(2), slide, tmp_path / "out", n_workers=2) == alone
    assert len(list((tmp_path / "tombs").iterdir())) == 2


def test_two_commands_share_a_scheduler(slide, alone, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as shared:
        address = shared.scheduler_address
        with (
            cluster.open_cluster(oracle(), scheduler=address) as first,
            oracle()() as segmenter,
            open_source(slide) as reader,
        ):
            assert run_with(oracle(), slide, tmp_path / "second", scheduler=address) == alone
            summary = run_slide(segmenter, reader, tmp_path / "first", find_rows=first.find_rows)
        assert contents(summary.folder) == alone


def test_a_worker_that_cannot_load_the_model_is_one_line():
    with (
        pytest.raises(UsageError, match="a worker cannot load the model"),
        cluster.open_cluster(partial(int, "x"), n_workers=1),
    ):
        pass
    with (
        pytest.raises(BundleError, match="no such model"),
        cluster.open_cluster(partial(load, "nowhere"), n_workers=1),
    ):
        pass


def test_what_a_worker_cannot_read_is_told_as_here(slide, tmp_path):
    vanishing = tmp_path / "gone.png"
    vanishing.write_bytes(slide.read_bytes())
    with (
        cluster.open_cluster(oracle(), n_workers=1) as runner,
        oracle()() as segmenter,
        open_source(vanishing) as reader,
        ArrayReader(np.zeros((9, 9, 3), np.uint8)) as in_memory,
    ):
        vanishing.unlink()
        plan = segmenter.plan(reader.info)
        from darcnn.runtime.rows import Row, SlideTask

        task = SlideTask(plan, segmenter.measure(reader, plan), None)
        with pytest.raises(InputError, match="no such file"):
            list(runner.find_rows(segmenter, reader, task, [Row(0, plan.tiles[:1])], lambda *_: None))
        with pytest.raises(UsageError, match="in memory"):
            run_slide(segmenter, in_memory, tmp_path / "out", find_rows=runner.find_rows)


class Told:
    """Notes what a batch tells."""

    def __init__(self):
        self.begun, self.done, self.failed, self.told = [], [], [], []

    def tell(self, words):
        self.told.append(words)

    def begin(self, path, number, total):
        self.begun.append((path.name, number, total))

    def advance(self, done, total, /, **how_far):
        pass

    def finish(self, summary):
        self.done.append(summary)

    def fail(self, message):
        self.failed.append(message)


@pytest.fixture
def pictures(slide, tmp_path):
    """Five pictures, one of them broken."""
    with Image.open(slide) as picture:
        for number in range(4):
            picture.crop((10 * number, 0, 250, 300)).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(slide.read_bytes()[:400])
    return [tmp_path / f"{name}.png" for name in (0, "broken", 1, 2, 3)]


def here(pictures):
    return [(path, Path()) for path in pictures]


def test_small_pictures_are_spread_as_wholes_and_one_that_fails_stops_no_other(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    told, alone = Told(), Told()
    with oracle()() as segmenter:
        batch.run_batch(segmenter, pictures, Path("alone"), options=RunOptions(pixels=True), listener=alone)
        with cluster.open_cluster(oracle(), n_workers=2) as runner:
            finders = batch.Finders(runner.find_rows, runner.find_blocks, runner.run_pictures)
            outcome = batch.run_batch(
                segmenter, pictures, Path("out"),
                options=RunOptions(pixels=True, roi="0,0,200,300"), listener=told, finders=finders,
            )  # fmt: skip
            assert (outcome.n_done, outcome.n_failed, outcome.exit_code) == (4, 1, 1)
            again = batch.run_batch(
                segmenter, pictures, Path("again"),
                options=RunOptions(pixels=True), listener=Told(), finders=finders,
            )  # fmt: skip
            assert again.n_done == 4
    for number in "0123":
        expected = contents(Path("alone") / number)
        assert contents(Path("again") / number) == expected
        assert contents(Path("out") / number) != expected  # options reach the workers
    assert (told.told, alone.told) == (["5 small pictures, several at once"], [])
    assert len(told.failed) == 1
    assert "broken.png" in told.failed[0]
    assert sorted(summary.name for summary in told.done) == ["0", "1", "2", "3"]
    assert all(summary.folder == Path("out") / summary.name for summary in told.done)
    assert [(number, total) for _, number, total in told.begun] == [(n, 5) for n in range(1, 6)]
    assert sorted(name for name, *_ in told.begun) == sorted(path.name for path in pictures)
    lines = (tmp_path / "again" / "summary.csv").read_text().splitlines()
    assert [Path(line.split(",")[0]).name for line in lines[1:]] == [path.stem for path in pictures]


def test_pictures_of_one_name_are_spread_into_the_folders_that_they_came_from(pictures, tmp_path):
    wells = [tmp_path / "plate" / well / "field.png" for well in ("A1", "A2")]
    for path, picture in zip(wells, (pictures[0], pictures[2]), strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(picture.read_bytes())
    told = Told()
    with oracle()() as segmenter, cluster.open_cluster(oracle(), n_workers=1) as runner:
        finders = batch.Finders(runner.find_rows, runner.find_blocks, runner.run_pictures)
        options = RunOptions(pixels=True)
        batch.run_batch(segmenter, wells, tmp_path / "out", options=options, listener=told, finders=finders)
    assert sorted(summary.folder for summary in told.done) == [
        tmp_path / "out" / well / "field" for well in ("A1", "A2")
    ]
    assert all(summary.overview.is_file() for summary in told.done)


def test_a_link_has_its_own_name(pictures, tmp_path):
    for name, target in (("a", pictures[0]), ("b", pictures[2])):
        (tmp_path / f"link-{name}.png").symlink_to(target)
    links = [tmp_path / f"link-{name}.png" for name in "ab"]
    with cluster.open_cluster(oracle(), n_workers=1) as runner, oracle()() as segmenter:
        found = dict(runner.run_pictures(segmenter, here(links), tmp_path / "out", RunOptions(pixels=True)))
    assert [found[number].name for number in (0, 1)] == ["link-a", "link-b"]
    assert all((tmp_path / "out" / name / "run.json").is_file() for name in ("link-a", "link-b"))


def test_pictures_are_not_spread_where_workers_do_not_see_the_folder_of_results(
    pictures, tmp_path, monkeypatch
):
    with cluster.open_cluster(oracle(), n_workers=1) as runner, oracle()() as segmenter:
        monkeypatch.setattr(runner._client, "run", lambda seen, path: {"worker": False})
        assert (
            list(runner.run_pictures(segmenter, here(pictures), tmp_path / "out", RunOptions(pixels=True)))
            == []
        )
        monkeypatch.undo()
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="a file stands where a folder is needed"):
            list(
                runner.run_pictures(
                    segmenter, here(pictures), tmp_path / "file" / "out", RunOptions(pixels=True)
                )
            )


@pytest.mark.parametrize("as_wholes", [False, True])
def test_a_picture_that_kills_its_workers_fails_alone(importable, tmp_path, as_wholes):
    import dask
    from deadly_engine import DEADLY, OneDeadlyPicture

    labels = np.zeros((200, 200), np.int32)
    labels[50:60, 50:60] = 1
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        pixels = encode_labels(labels)
        pixels[:2, :2] = DEADLY if path.stem == "b" else 0
        Image.fromarray(pixels).save(path)
    told = Told()
    with (
        dask.config.set(
            {"distributed.scheduler.allowed-failures": 0}
        ),  # of the default, 3, each takes seconds
        cluster.open_cluster(oracle(OneDeadlyPicture), n_workers=1) as runner,
        oracle()() as segmenter,
    ):
        wholes = runner.run_pictures if as_wholes else None
        finders = batch.Finders(runner.find_rows, runner.find_blocks, wholes)
        options = RunOptions(pixels=True)
        outcome = batch.run_batch(
            segmenter, paths, tmp_path / "out", options=options, listener=told, finders=finders
        )
    assert (outcome.n_done, outcome.n_failed) == (2, 1)
    assert sorted(summary.name for summary in told.done) == ["a", "c"]
    assert told.failed == [
        f"{paths[1]}: took 1 workers with it; give the workers more memory, or run fewer of them"
    ]


def find_all(runner, slide, out):
    """Run a slide by rows on a cluster that is open."""
    with oracle()() as segmenter, open_source(slide) as reader:
        return run_slide(segmenter, reader, out, find_rows=runner.find_rows)


def test_workers_that_all_go_are_told_of(slide, tmp_path, monkeypatch):
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as shared,
        cluster.open_cluster(oracle(), scheduler=shared.scheduler_address) as runner,
    ):
        shared.scale(0)
        monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.2)
        monkeypatch.setattr(cluster, "_WORKER_SECONDS", 2)
        with pytest.raises(DeviceError, match="no workers are left"):
            find_all(runner, slide, tmp_path)


def test_a_worker_that_comes_back_without_the_model_says_why(importable, slide, tmp_path):
    from deadly_engine import make_once

    with cluster.open_cluster(partial(make_once, oracle(), tmp_path / "marker"), n_workers=1) as runner:
        [pid] = runner._client.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceError, match=r"cannot load the model \(cuda:0: no memory left; wait\)"):
            find_all(runner, slide, tmp_path / "out")


def test_a_model_that_one_worker_cannot_load_stays_on_no_other(importable, tmp_path):
    from deadly_engine import make_once
    from distributed import Client, LocalCluster

    def models(dask_worker):
        return [name for name in dask_worker.plugins if name.startswith("darcnn")]

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as shared:
        make = partial(make_once, oracle(), tmp_path / "marker")
        with (
            pytest.raises(DeviceError, match="no memory left"),
            cluster.open_cluster(make, scheduler=shared.scheduler_address),
        ):
            pass
        with Client(shared.scheduler_address, set_as_default=False) as client:
            assert list(client.run(models).values()) == [[], []]


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="systems without it have no way")
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_is_for_the_command_not_for_its_workers():
    was_ready = []

    def start():
        with without_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            was_ready.append(True)

    with pytest.raises(KeyboardInterrupt):
        start()
    assert was_ready
    with cluster.open_cluster(oracle(), n_workers=1) as runner:
        [blocked] = runner._client.run(signal.pthread_sigmask, signal.SIG_BLOCK, []).values()
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_worker_answers_while_a_model_waits_for_its_last_task():
    model = WorkerModel(oracle(), is_ours=False)
    model.setup(None)

    async def leave():
        leaving = asyncio.create_task(model.teardown(None))
        await asyncio.sleep(0.1)
        was_at_work = model.lock.locked()
        await leaving
        return was_at_work

    model.lock.acquire()
    threading.Timer(1, model.lock.release).start()
    assert asyncio.run(leave())


def test_workers_share_out_the_gpus(monkeypatch):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: ["0", "GPU-7"])
    with cluster.open_cluster(oracle(), n_workers=3) as runner:
        seen = runner._client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    assert sorted(seen.values()) == ["0", "0", "GPU-7"]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_folder_that_cannot_be_written_to_spreads_no_pictures(pictures, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cluster, "NamedTemporaryFile", refuse)  # root may write anywhere
    runner = cluster.ClusterRunner(None, "model", z=None, t=None)
    assert list(runner.run_pictures(None, here(pictures), tmp_path, RunOptions())) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "tcp://127.0.0.1:1"], "no scheduler with workers answers"),
        (["--scheduler", "tls://127.0.0.1:1"], "tls:// needs certificates"),
        (["--scheduler", "127.0.0.1"], "'127.0.0.1' is no address; give tcp://host:8786"),
        (["--scheduler", "tcp://127.0.0.1:1", "--workers", "2"], "pass one of them"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_one_line(slide, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    result = CliRunner().invoke(main, [str(slide), "--model", "nuclei-he", "--out", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_processes_that_do_not_start_are_one_line():
    spawning = multiprocessing.get_context("spawn")
    python = get_executable()
    spawning.set_executable("/bin/false")
    try:
        with (
            pytest.raises(DeviceError, match=r"--workers: processes do not start .*; ask for fewer"),
            cluster.open_cluster(oracle(), n_workers=1),
        ):
            pass
    finally:
        spawning.set_executable(python)
