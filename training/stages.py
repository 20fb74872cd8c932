"""The three stages of a run, each from a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from darcnn.runtime.errors import UsageError
from darcnn.training import parallel
from darcnn.training.adapt.diameters import match_scales
from darcnn.training.adapt.pseudo_labels import label_images, read_labels
from darcnn.training.checkpoint import (
    CheckpointInfo,
    record_recipe,
    save_checkpoint,
)
from darcnn.training.config import Recipe
from darcnn.training.contact_sheet import ContactSheet
from darcnn.training.data.batches import Batch, BatchKey, make_batch
from darcnn.training.data.target import TargetImages
from darcnn.training.decisions import (
    DECISIONS_FILE,
    Decisions,
    decide,
    note_decisions,
)
from darcnn.training.loop import LoopPlan, saved_progress, train
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_weights
from darcnn.training.refine_tiles import RefineTiles
from darcnn.training.run import LABELS_FOLDER, LAST_ROUND, Run, check_images, check_start, rounds_of
from darcnn.training.schedule import similarity_weight
from darcnn.training.source_tiles import SourceTiles
from darcnn.training.steps import adapt_losses, refine_losses, source_losses
from darcnn.training.trust import note_trust

__all__ = ["check_batches", "run_adapt", "run_all", "run_refine", "run_source"]

_MIN_SHEET_STEPS = 100  # between two pictures, which take as long as several steps


def run_source(run: Run) -> Darcnn:
    """Train a Mask R-CNN on the labelled photographs, from the recipe's weights, into `run.out`/source.

    Of 0 steps, it passes the weights on.
    """
    recipe, stage = run.recipe, run.recipe.source_stage
    folder = run.folder("source")
    check_start(run, folder)
    with torch.random.fork_rng(devices=[]):  # heads start at random, in every process the same
        torch.manual_seed(recipe.seed)
        network = Darcnn.from_name(recipe.preset, recipe.weights)
    if stage.steps == 0 or not run.is_done(folder):  # else they come from the checkpoint
        load_weights(network, recipe.weights, run.data)
    network.to(run.device)
    targets = run.targets()
    if recipe.source is not None and recipe.source.synthetic_fraction > 0:
        check_images(targets, folder)
    if stage.steps == 0:
        return _pass_on(run, network, "source", folder)
    tiles = SourceTiles(recipe, run.data, targets)
    plan = LoopPlan(
        stage="source",
        steps=stage.steps,
        learning_rate=stage.learning_rate,
        warm_up=stage.warm_up,
        folder=folder,
        info=CheckpointInfo("source", 0, False, recipe),
        accumulate=stage.accumulate,
        resume=run.resume,
        sheet=ContactSheet(recipe, targets, source_branch=True),
        sheet_every=_epoch(len(tiles.source.images), stage.batch * stage.accumulate),
    )

    def losses_of(batch: Batch, step: int) -> dict[str, Tensor]:
        return source_losses(network, batch.to(run.device))

    return train(network, plan, lambda number: tiles.batch("source", number, stage.batch), losses_of)


def run_adapt(run: Run, start: Path) -> Darcnn:
    """Stage 1: adapt the source checkpoint in `start` to the unlabelled images, into `run.out`/adapt.

    Of 0 steps, both domains start stage 2 from what the source stage learned.
    """
    recipe, stage = run.recipe, run.recipe.adapt_stage
    folder = run.folder("adapt")
    network = run.start_from(start)
    targets = run.targets()
    check_images(targets, folder)
    _match_scales(run, network, targets, folder)
    if stage.steps == 0:
        network = _pass_on(run, network, "adapt", folder)
        note_trust(network, recipe, targets, folder)
        return network
    tiles = SourceTiles(recipe, run.data, targets)
    observed: dict[str, float] = {}
    plan = LoopPlan(
        stage="adapt",
        steps=stage.steps,
        learning_rate=stage.learning_rate,
        warm_up=stage.warm_up,
        folder=folder,
        info=CheckpointInfo("adapt", 0, False, recipe),
        accumulate=stage.accumulate,
        patience=stage.patience,
        settle_steps=stage.alpha_rise_steps,
        resume=run.resume,
        sheet=ContactSheet(recipe, targets),
        sheet_every=_epoch(len(targets.images), stage.target_batch * stage.accumulate),
        observed=observed,
        slow=network.target_encoder,
        slow_rate=stage.target_encoder_rate,
    )

    def batch_of(number: int) -> tuple[Batch, Tensor]:
        key = BatchKey(recipe.seed, "target", number)
        unlabelled = make_batch(
            lambda rng: targets.tile(rng, recipe.tile_px), key, parallel.share_of(stage.target_batch)
        )
        return tiles.batch("adapt", number, stage.source_batch), unlabelled.images

    def losses_of(batch: tuple[Batch, Tensor], step: int) -> dict[str, Tensor]:
        rise = similarity_weight(step, first=stage.alpha_first, rise_steps=stage.alpha_rise_steps)
        source, target = batch[0].to(run.device), batch[1].to(run.device)
        return adapt_losses(network, source, target, stage, stage.alpha * rise, observed)

    def after_step() -> None:
        network.follow_source_heads(stage.heads_average)
        network.follow_source_encoder(stage.encoder_average)

    network = train(network, plan, batch_of, losses_of, after_step)
    note_trust(network, recipe, targets, folder)
    return network


def run_refine(run: Run, start: Path) -> Darcnn:
    """Stage 2: rounds of labelling the clean images and learning from them, into `run.out`/refine.

    Round n leaves `run.out`/refine-n with its pseudo-labels as pictures; the last is `run.out`/refine.
    """
    recipe, stage = run.recipe, run.recipe.refine_stage
    network = run.start_from(start)
    targets = run.targets()
    first = run.folder(rounds_of(recipe)[0])
    check_images(targets, first)
    _match_scales(run, network, targets, first, before=start)  # what stage 1 measured holds for stage 2
    tiles, sheet = RefineTiles(recipe, run.data, targets), ContactSheet(recipe, targets)
    for name in rounds_of(recipe):
        folder = run.folder(name)
        label_folder = folder / LABELS_FOLDER
        if not run.is_done(folder) and parallel.is_first():
            label_images(
                network,
                recipe,
                targets,
                label_folder,
                resume=run.resume,
                keeps_doubt=name != LAST_ROUND,
            )
        parallel.wait_for_all()
        labels = read_labels(label_folder)
        plan = LoopPlan(
            stage="refine",
            few=stage.learns == "few",
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            warm_up=stage.warm_up,
            folder=folder,
            info=CheckpointInfo("refine", 0, False, recipe),
            accumulate=stage.accumulate,
            resume=run.resume,
            sheet=sheet,
            sheet_every=_epoch(len(labels), stage.batch * stage.accumulate),
        )
        batch_of = tiles.of_round(name, labels)
        network = train(network, plan, batch_of, _refine_losses_of(network, run.device))
        note_trust(network, recipe, targets, folder)
    return network


def _decide(run: Run, is_right: Callable[[Decisions], bool]) -> None:
    """Let the size and polarity of the objects be judged before anything is learned from them."""
    network = run.start_from(run.out / "source")
    targets = run.targets()
    match_scales(network, run.recipe, targets, run.out / "adapt")
    decisions = decide(network, run.recipe, targets, run.out)
    if not is_right(decisions):
        raise UsageError(
            "stopped before the adaptation",
            where=run.recipe.name,
            fix="give target.sets.diameter_px or refine_stage.polarity in the recipe, then --resume",
        )
    note_decisions(decisions, run.out)


def _pass_on(run: Run, network: Darcnn, stage: str, folder: Path) -> Darcnn:
    """Write the checkpoint of a stage that has no steps."""
    if parallel.is_first():
        if run.is_done(folder):  # figures may be noted in it
            record_recipe(folder, run.recipe)
        else:
            save_checkpoint(folder, network, CheckpointInfo(stage, 0, True, run.recipe))
    parallel.wait_for_all()
    return network.eval()


def _match_scales(
    run: Run, network: Darcnn, targets: TargetImages, folder: Path, *, before: Path | None = None
) -> None:
    """Bring the images to the network's scale, by what it finds on them; one process looks, all read."""
    if parallel.is_first():
        match_scales(network, run.recipe, targets, folder, before=before)
    parallel.wait_for_all()
    if not parallel.is_first():
        match_scales(network, run.recipe, targets, folder, before=before)


def _refine_losses_of(network: Darcnn, device: torch.device) -> Callable[[Batch, int], dict[str, Tensor]]:
    return lambda batch, step: refine_losses(network, batch.to(device))


def _epoch(n_images: int, batch: int) -> int:
    """Return the steps in which as many images are drawn as there are, but enough to be worth a picture."""
    return max(_MIN_SHEET_STEPS, n_images // batch)


def check_batches(recipe: Recipe) -> None:
    """Raise a UsageError where a batch of any stage cannot be shared evenly by the processes."""
    adapt = recipe.adapt_stage
    for batch in (
        recipe.source_stage.batch,
        adapt.source_batch,
        adapt.target_batch,
        recipe.refine_stage.batch,
    ):
        parallel.share_of(batch)


def run_all(run: Run, is_right: Callable[[Decisions], bool] = lambda decisions: True) -> Darcnn:
    """Run the three stages one after another; finished ones are skipped when resuming.

    What would stop a later stage stops the run before it trains: the source stage reads all images.

    Args:
        run: the run.
        is_right: is shown what the run takes for granted about the unlabelled images, once, before it learns
            from them.

    Raises:
        UsageError: that is not right.
    """
    check_batches(run.recipe)
    for name in ("source", "adapt", *rounds_of(run.recipe)):
        saved_progress(run.folder(name), name.partition("-")[0], run.recipe)  # before any is trained
    run_source(run)
    if parallel.is_first() and not (run.out / DECISIONS_FILE).is_file():
        _decide(run, is_right)
    parallel.wait_for_all()
    run_adapt(run, run.out / "source")
    return run_refine(run, run.out / "adapt")
