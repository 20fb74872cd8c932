"""Many processes find what one finds, to the byte; a worker that dies loses its row only."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

cluster = pytest.importorskip("darcnn.runtime.cluster", reason="needs the extra cluster")

from darcnn.runtime import batch  # noqa: E402
from darcnn.runtime.cli import main  # noqa: E402
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest  # noqa: E402
from darcnn.runtime.errors import BundleError, DeviceError, InputError, OutputError, UsageError  # noqa: E402
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
def deadly(tmp_path, monkeypatch):
    """Return what makes a segmenter that kills so many processes."""
    here = str(Path(__file__).parent)
    monkeypatch.syspath_prepend(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
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


def test_a_row_that_kills_every_worker_is_one_line(slide, deadly, tmp_path):
    with pytest.raises(DeviceError, match="workers with it"):
        run_with(deadly(99), slide, tmp_path / "out", n_workers=1)


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


def test_a_picture_that_kills_every_worker_is_one_line(pictures, deadly, tmp_path):
    with (
        cluster.open_cluster(deadly(99), n_workers=1) as runner,
        oracle()() as segmenter,
        pytest.raises(DeviceError, match="workers with it"),
    ):
        list(runner.run_pictures(segmenter, here(pictures[:1]), tmp_path / "out", RunOptions(pixels=True)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheduler", "tcp://127.0.0.1:1"], "no scheduler with workers answers"),
        (["--scheduler", "tcp://127.0.0.1:1", "--workers", "2"], "pass one of them"),
    ],
)
def test_a_scheduler_that_does_not_answer_is_one_line(slide, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", 1)
    result = CliRunner().invoke(main, [str(slide), "--model", "nuclei-he", "--out", str(tmp_path), *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
