"""What does the size of the mask head cost, and what does it bring?

    python benchmarks/mask_heads.py RUN --data DATA --labelled DATA/fluorescence/val --every 3

RUN is a folder that `darcnn-train run` left. Mask heads of several sizes are trained anew, all on the same
batches: the pseudo-labels of the last round, features of the trained network, which stays as it is. Then the
same boxes get their masks from each. The labels only tell how good each is; `roofline.py --mask-heads` tells
what each costs.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from pathlib import Path

import click
import torch

from darcnn.training.adapt.diameters import match_scales
from darcnn.training.adapt.pseudo_labels import read_labels
from darcnn.training.checkpoint import load_network
from darcnn.training.config import Recipe
from darcnn.training.data.augment import augment_target
from darcnn.training.data.batches import BatchKey, make_batch, prefetch
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import make_segmenter
from darcnn.training.evaluate import evaluate_folder
from darcnn.training.model.heads import Heads, make_heads
from darcnn.training.model.network import Darcnn
from darcnn.training.schedule import learning_rate_factor

# layers and cells a side, of which the mask has twice as many; the second is that of `lite`
_SIZES = {
    "256 x 4, 28 px": ((256, 256, 256, 256), 14),
    "64 x 3, 28 px": ((64, 64, 64), 14),
    "32 x 2, 28 px": ((32, 32), 14),
    "64 x 3, 14 px": ((64, 64, 64), 7),
    "32 x 2, 14 px": ((32, 32), 7),
    "64 x 3, 56 px": ((64, 64, 64), 28),
}
_RATE = 1e-3
_BATCH = 4


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--labelled", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--every", type=int, default=1, show_default=True, help="Take every n-th labelled image.")
@click.option("--head", "names", multiple=True, type=click.Choice(list(_SIZES)), help="All by default.")
@click.option("--steps", type=int, default=400, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(
    run: Path,
    data: Path,
    labelled: Path,
    every: int,
    names: tuple[str, ...],
    steps: int,
    out: Path | None,
) -> None:
    """Train mask heads of several sizes on what RUN learned from, and score them on LABELLED."""
    torch.set_num_threads(1)
    network, info = load_network(run / "refine")
    targets = TargetImages(data, info.recipe.target, info.recipe.seed)
    match_scales(network, info.recipe, targets, run / "adapt")
    torch.manual_seed(info.recipe.seed)
    heads = {}
    for name in names or _SIZES:
        layers, cells = _SIZES[name]
        heads[name] = make_heads(replace(network.preset, mask_head_layers=layers, mask_cells=cells))
    _train(network, info.recipe, targets, run, heads, steps)
    rows = []
    for name, head in heads.items():
        row = {"head": name} | _score(network, info.recipe, head, labelled, every)
        rows.append(row)
        click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
    if out is not None:
        record = {"run": run.name, "steps": steps, "every": every, "cpu": platform.processor(), "rows": rows}
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _train(
    network: Darcnn, recipe: Recipe, targets: TargetImages, run: Path, heads: dict[str, Heads], steps: int
) -> None:
    """Train the mask branch of each of `heads`; nothing else learns."""
    labels = read_labels(run / "refine" / "pseudo_labels")
    network.eval()
    parameters = [
        parameter
        for head in heads.values()
        for part in (head.train().mask_head, head.mask_predictor)
        for parameter in part.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=_RATE)

    def batch_of(step: int):  # type: ignore[no-untyped-def]  # a closure of one use
        return make_batch(
            lambda rng: augment_target(targets.tile(rng, recipe.tile_px, labels), rng),
            BatchKey(recipe.seed, "mask-heads", step),
            range(_BATCH),
        )

    for step, batch in enumerate(prefetch(batch_of, range(steps))):
        with torch.no_grad():
            c2 = network.trunk(batch.images)
            shared, private = network.shared_encoder(c2), network.target_encoder(c2)
            proposals, _, _ = network.proposer.propose(network.rpn_levels(shared), batch.image_size)
        for group in optimizer.param_groups:
            group["lr"] = _RATE * learning_rate_factor(step, warm_up=20, steps=steps)
        losses = {
            name: head.losses(private, proposals, batch.image_size, batch.targets)["head_mask"]
            for name, head in heads.items()
        }
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        if (step + 1) % 50 == 0:
            said = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            click.echo(f"step {step + 1}: {said}", err=True)


def _score(network: Darcnn, recipe: Recipe, head: Heads, labelled: Path, every: int) -> dict[str, float]:
    """Return the figures of the network with the masks of `head`."""
    own = network.target_heads
    own.mask_head, own.mask_predictor, own.mask_roi_pool = (
        head.mask_head,
        head.mask_predictor,
        head.mask_roi_pool,
    )
    network.preset = replace(network.preset, mask_cells=head.mask_roi_pool.cells)
    export = recipe.export
    with make_segmenter(
        network, recipe.target, min_score=export.min_score, max_diameters=export.max_diameters
    ) as segmenter:
        mean = evaluate_folder(labelled, segmenter, every=every).mean
    names = ("aji", "pixel_f1", "object_f1", "max_iou")
    return {name: round(float(getattr(mean, name)), 4) for name in names}


if __name__ == "__main__":
    from one_line import run

    run(main)
