"""Training where all tensors say that they are on a GPU, and in the 16 bits that it takes there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from darcnn.training import loop
from darcnn.training.config import AdaptStage, Recipe, RefineStage, SourceStage, TargetSet, recipe_to_table
from darcnn.training.history import read_history
from darcnn.training.run import Run
from darcnn.training.stages import run_all

STAGES = ("source", "adapt", "refine")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_host(data: Path, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of a few steps on the CPU, in 32 bits, in which photographs and synthesized tiles have a turn."""
    one_image = replace(recipe.target, sets=(TargetSet("target/u2os_2*.png", diameter_px=20.0),))
    refine = RefineStage(
        steps=3, rounds=1, min_score=0.01, doubt_score=0.005, source_every=3, synthetic_every=2
    )
    short = replace(
        recipe,
        tile_px=64,
        source_stage=SourceStage(2, batch=2),
        adapt_stage=AdaptStage(2),
        target=one_image,
        refine_stage=refine,
    )
    run = Run(short, data, tmp_path_factory.mktemp("host"))
    with pytest.MonkeyPatch.context() as patch:  # losses alone are compared, no stage is judged
        patch.setattr("darcnn.training.stages.note_trust", lambda *judged: None)
        run_all(run)
    return run


def totals(folder: Path) -> dict[str, list[float]]:
    return {stage: [row["total"] for row in read_history(folder / stage)] for stage in STAGES}


def test_no_tensor_is_in_the_wrong_place(on_host: Run, data: Path, tmp_path: Path) -> None:
    program, recipe = Path(__file__).with_name("pretend_gpu.py"), tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_to_table(on_host.recipe)), encoding="utf-8")
    command = [sys.executable, program, recipe, data, tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = totals(on_host.out)
    for stage, losses in totals(tmp_path / "run").items():
        assert losses == pytest.approx(expected[stage], rel=1e-3), stage


@pytest.mark.usefixtures("untrusted")
def test_in_bfloat16_losses_are_those_of_32_bits_but_for_rounding(
    on_host: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Halving(torch.autocast):
        """What the loop asks for is done on a CPU too; what a step forbids is not."""

        def __init__(self, device: str, dtype: torch.dtype | None = None, *, enabled: bool) -> None:
            super().__init__(device, torch.bfloat16, enabled=enabled or dtype is not None)

    monkeypatch.setattr(loop.torch, "autocast", Halving)
    run_all(Run(on_host.recipe, data, tmp_path / "run"))
    expected = totals(on_host.out)
    found = totals(tmp_path / "run")
    assert found != expected
    for stage, losses in found.items():
        assert losses[0] == pytest.approx(expected[stage][0], rel=0.1), stage
