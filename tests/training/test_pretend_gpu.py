"""Training where all tensors say that they are on a GPU, and in the 16 bits that it takes there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from darcnn.training import loop
from darcnn.training.config import read_recipe
from darcnn.training.history import read_history
from darcnn.training.run import Run
from darcnn.training.stages import run_all

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
steps = 2
batch = 2

[target]
channels = 1
intensity = { kind = "percentile", low = 0.5, high = 99.8 }
nominal_diameter_px = 20.0

[[target.sets]]
images = "target/u2os_2*.png"
diameter_px = 20.0

[adapt_stage]
steps = 2

[refine_stage]
steps = 3
rounds = 1
min_score = 0.01
doubt_score = 0.005
source_every = 3
synthetic_every = 2
"""
STAGES = ("source", "adapt", "refine")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_host(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the recipe on the CPU, in 32 bits."""
    folder = tmp_path_factory.mktemp("host")
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE, encoding="utf-8")
    run = Run(read_recipe(recipe), data, folder / "run")
    run_all(run)
    return run


def totals(folder: Path) -> dict[str, list[float]]:
    return {stage: [row["total"] for row in read_history(folder / stage)] for stage in STAGES}


def test_no_tensor_is_in_the_wrong_place(on_host: Run, data: Path, tmp_path: Path) -> None:
    program, recipe = Path(__file__).with_name("pretend_gpu.py"), on_host.out.parent / "tiny.toml"
    options = ["--data", data, "--out", tmp_path / "run", "--device", "cuda", "--yes"]
    done = subprocess.run([sys.executable, program, "run", recipe, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = totals(on_host.out)
    for stage, losses in totals(tmp_path / "run").items():
        assert losses == pytest.approx(expected[stage], rel=1e-3), stage


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
