"""Many processes find what one finds, to the byte; a worker that dies loses its row only."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

cluster = pytest.importorskip("darcnn.runtime.cluster", reason="needs the extra cluster")

from darcnn.runtime.cli import main  # noqa: E402
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest  # noqa: E402
from darcnn.runtime.errors import BundleError, DeviceError, InputError, UsageError  # noqa: E402
from darcnn.runtime.load import load  # noqa: E402
from darcnn.runtime.pipeline import run_slide  # noqa: E402
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
