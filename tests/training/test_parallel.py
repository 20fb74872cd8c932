"""Several processes: two that `torchrun` starts learn what one learns. They are real, on CPUs with gloo.

Equal means: losses to 1e-4 relative, weights to 2 % of the way that they went. Sums are added in another
order, so last bits differ; Adam makes a full step of a gradient that is nothing but last bits, and a
suppressed box may be another. Steps are small here, so that this does not add up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from darcnn.training import parallel
from darcnn.training.checkpoint import load_network
from darcnn.training.config import read_recipe
from darcnn.training.history import read_history
from darcnn.training.model.network import Darcnn
from darcnn.training.run import Run
from darcnn.training.stages import run_adapt, run_source

LOSS_TOLERANCE, WAY_TOLERANCE = 1e-4, 0.02

RECIPE = """
name = "tiny"
preset = "lite"
seed = 3
data = "."
data_licence = "CC0"
tile_px = 64

[source]
images = "source/images"
annotations = "source/instances.json"
diameter_px = [12.0, 40.0]

[source_stage]
steps = 3
batch = 2
warm_up = 1
learning_rate = 1e-5

[target]
channels = 1
intensity = { kind = "percentile", low = 0.5, high = 99.8 }
nominal_diameter_px = 20.0

[[target.sets]]
images = "target/*.png"

[adapt_stage]
steps = 3
warm_up = 1
learning_rate = 1e-5

[refine_stage]
steps = 1
batch = 2
"""

# What each process runs: it writes what the functions gave it as JSON, then runs the command for two stages.
# One program, since starting it takes longer than all that it does.
PROGRAM = """
import contextlib, json, pathlib, sys
import torch
from torch import nn
from darcnn.runtime.errors import UsageError
from darcnn.training import parallel
from darcnn.training.cli import main
from darcnn.training.history import History

torch.set_num_threads(1)
out = pathlib.Path(sys.argv[1])
with parallel.processes(torch.device("cpu")):
    rank = torch.distributed.get_rank()
    seen = {"is_first": parallel.is_first(), "share": list(parallel.share_of(6))}
    try:
        parallel.share_of(3)
    except UsageError as err:
        seen["uneven"] = str(err)
    # rows are scaled by a weight of this process's own; the loss looks at the rows of both
    weight = torch.tensor(2.0, requires_grad=True)
    rows = parallel.gather(weight * torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (rank + 1))
    seen["gathered"] = rows.tolist()
    total = rows.cumsum(0).square().sum()
    total.backward()
    seen["slope"] = weight.grad.item()
    # one gradient everywhere, one in the first process only, one nowhere
    parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 2), 1.0 + 2.0 * rank)
    if rank == 0:
        parameters[1].grad = torch.eye(2)
    parallel.average_gradients(parameters)
    seen["gradients"] = [None if p.grad is None else p.grad.tolist() for p in parameters]
    seen["mean"] = parallel.mean_over_processes(torch.tensor(float(rank), requires_grad=True)).item()
    seen["counts"] = [parallel.mean_count(torch.tensor(n)).item() for n in (0, rank)]
    with History(out / f"stage-{rank}", "source", 0) as history:
        history.add(0, {"total": 1.0})
        history.flush()
        history.show(1, None if rank else lambda network: __import__("PIL.Image").Image.new("RGB", (4, 4)),
                     nn.Identity())
    parallel.wait_for_all()
    (out / f"{rank}.json").write_text(json.dumps(seen))
    parallel.processes = lambda device: contextlib.nullcontext()  # the command finds them joined
    for stage, start in (("source", []), ("adapt", ["--start", sys.argv[4]])):
        where = ["--data", sys.argv[3], "--out", sys.argv[1], "--device", "cpu"]
        arguments, sys.argv = sys.argv, ["darcnn-train", stage, sys.argv[2], *where, *start]
        try:
            main()
        except SystemExit as end:
            assert not end.code, stage
        sys.argv = arguments
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(recipe_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source and adapt stages of one process."""
    run = Run(read_recipe(recipe_path), data, tmp_path_factory.mktemp("alone"))
    run_source(run)
    run_adapt(run, run.out / "source")
    return run.out


@pytest.fixture(scope="module")
def together(alone: Path, recipe_path: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes that torchrun started left what they saw and learned."""
    out = tmp_path_factory.mktemp("together")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    result = subprocess.run(
        [sys.executable, *torchrun, sys.executable, "-c", PROGRAM, out, recipe_path, data, alone / "source"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "".join(f"checkpoint: {out / stage}\n" for stage in ("source", "adapt"))  # once
    return out


@pytest.fixture(scope="module")
def first(together: Path) -> dict[str, Any]:
    return dict(json.loads((together / "0.json").read_text()))


@pytest.fixture(scope="module")
def second(together: Path) -> dict[str, Any]:
    return dict(json.loads((together / "1.json").read_text()))


@pytest.mark.slow
def test_each_process_takes_its_share_of_a_batch(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert (first["is_first"], second["is_first"]) == (True, False)
    assert first["share"] + second["share"] == list(range(6))
    assert len(first["share"]) == len(second["share"])


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_evenly_is_refused(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for seen in (first, second):
        assert "a batch of 3 cannot be shared by 2 processes" in seen["uneven"]
        assert "--nproc-per-node" in seen["uneven"]


@pytest.mark.slow
def test_gathered_rows_are_those_of_all_processes_and_give_each_its_gradient(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    weights = torch.tensor([2.0, 2.0], requires_grad=True)
    ours = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = torch.cat([weights[0] * ours, weights[1] * ours * 2])
    assert first["gathered"] == second["gathered"] == rows.tolist()
    rows.cumsum(0).square().sum().backward()
    assert weights.grad is not None
    # each process has the whole loss; its slope sums over the two, and gradients are averaged later
    assert [first["slope"], second["slope"]] == pytest.approx((2 * weights.grad).tolist())


@pytest.mark.slow
def test_gradients_become_the_mean_of_all_processes_and_those_of_nobody_stay_none(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert first["gradients"] == second["gradients"]
    assert first["gradients"] == [[[2.0, 2.0], [2.0, 2.0]], [[0.5, 0.0], [0.0, 0.5]], None]


@pytest.mark.slow
def test_means_and_counts_are_those_of_all_processes_and_no_count_is_zero(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    for seen in (first, second):
        assert seen["mean"] == 0.5
        assert 0 < seen["counts"][0] < 0.01
        assert seen["counts"][1] == 0.5  # one thing in two processes: not rounded up to one in each


@pytest.mark.slow
def test_only_the_first_process_writes(together: Path, first: dict[str, Any]) -> None:
    assert (together / "stage-0" / "history.csv").is_file()
    assert (together / "stage-0" / "sheets" / "step_000001.png").is_file()
    assert not (together / "stage-1").exists()


def test_one_process_is_left_alone() -> None:
    with parallel.processes(torch.device("cpu")):
        assert parallel.is_first()
        assert parallel.share_of(3) == range(3)
        value = torch.ones(2, 2, requires_grad=True)
        assert parallel.gather(value) is value
        assert not parallel.mean_over_processes(value).requires_grad
        parallel.wait_for_all()


def start_of(stage: str, run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> Darcnn:
    """Return the network with which a stage begins."""
    monkeypatch.setattr("darcnn.training.stages.train", lambda network, *rest: network)
    return run_source(run) if stage == "source" else run_adapt(run, source)


def distance(one: Darcnn, other: Darcnn) -> float:
    theirs = other.state_dict()
    return sum(float((t - theirs[name]).square().sum()) for name, t in one.state_dict().items()) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source", "adapt"])
def test_two_processes_learn_what_one_learns(
    stage: str,
    alone: Path,
    together: Path,
    recipe_path: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, two = read_history(alone / stage), read_history(together / stage)
    assert len(one) == 3
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=LOSS_TOLERANCE)
    begin = start_of(
        stage, Run(read_recipe(recipe_path), data, tmp_path / "start"), alone / "source", monkeypatch
    )
    learned, learned_together = load_network(alone / stage)[0], load_network(together / stage)[0]
    way = distance(begin, learned)
    assert way > 0
    assert distance(learned, learned_together) < WAY_TOLERANCE * way
