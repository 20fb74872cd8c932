"""How long does a training step take, and where does the time go?

    python benchmarks/training.py examples/recipes/nuclei-fluorescence.toml --data DATA --steps 10

Times steps of each stage on real batches made beforehand, after a burn-in of two, and prints their median
and spread; then, for the stage named by --profile, what took longest. Figures hold for this machine
and load only: compare two versions by turns, on the same recipe.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from darcnn.training.config import read_recipe
from darcnn.training.data.batches import BatchKey, make_batch
from darcnn.training.data.target import TargetImages
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_weights
from darcnn.training.source_tiles import SourceTiles
from darcnn.training.steps import adapt_losses, learning_parts, refine_losses, source_losses

_BURN_IN = 2
STAGES = ("source", "adapt", "refine")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--steps", type=int, default=10, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--profile", type=click.Choice(STAGES), help="Show where this stage's time goes.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(recipe: Path, data: Path, steps: int, threads: int, profile: str | None, out: Path | None) -> None:
    """Time training steps of RECIPE."""
    torch.set_num_threads(threads)
    record: dict[str, object] = {
        "recipe": recipe.name,
        "threads": threads,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    for stage in STAGES:
        step = _make_step(stage, recipe, data, steps + _BURN_IN)
        seconds = [_time(step, number) for number in range(steps + _BURN_IN)][_BURN_IN:]
        record[stage] = {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
        click.echo(
            f"{stage:8} {statistics.median(seconds):.3f} s a step ({min(seconds):.3f} to {max(seconds):.3f})"
        )
        if stage == profile:
            _profile(step, steps)
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _make_step(stage: str, path: Path, data: Path, n: int) -> Callable[[int], None]:
    """Return what takes one step of `stage` on a batch made beforehand."""
    recipe = read_recipe(path)
    network = Darcnn.from_name(recipe.preset, recipe.weights)
    load_weights(network, recipe.weights, data)
    network.train().to(memory_format=torch.channels_last)
    targets = TargetImages(data, recipe.target, recipe.seed)
    tiles = SourceTiles(recipe, data, targets)
    size = {"source": recipe.source_stage.batch, "adapt": recipe.adapt_stage.source_batch}
    labelled = [tiles.batch(stage, number, size.get(stage, recipe.refine_stage.batch)) for number in range(n)]
    count = range(recipe.adapt_stage.target_batch)
    unlabelled = [
        make_batch(lambda rng: targets.tile(rng, recipe.tile_px), BatchKey(recipe.seed, "t", number), count)
        for number in range(n)
    ]
    parameters = list(network.select_trainable(*learning_parts(network, stage)))
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def losses(number: int) -> dict[str, Tensor]:
        if stage == "source":
            return source_losses(network, labelled[number])
        if stage == "refine":
            return refine_losses(network, labelled[number])
        return adapt_losses(network, labelled[number], unlabelled[number].images, recipe.adapt_stage, 1.0)

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses(number).values())).sum().backward()
        optimizer.step()

    return step


def _time(step: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    step(number)
    return time.perf_counter() - start


def _profile(step: Callable[[int], None], steps: int) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        for number in range(steps):
            step(number)
    rows = sorted(seen.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:12]:
        click.echo(f"    {row.self_cpu_time_total / total:6.1%}  {row.key}")


if __name__ == "__main__":
    from one_line import run

    run(main)
