"""The three stages of a run, each from a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darcnn.runtime.errors import OutputError
from darcnn.training import parallel
from darcnn.training.adapt.diameters import DIAMETERS_FILE, match_scales
from darcnn.training.adapt.pseudo_labels import label_images, read_labels
from darcnn.training.checkpoint import CheckpointInfo, is_complete, load_network
from darcnn.training.config import Recipe
from darcnn.training.contact_sheet import ContactSheet
from darcnn.training.data.augment import augment_target, vary_synthesized
from darcnn.training.data.batches import Batch, BatchKey, make_batch, make_source_tile
from darcnn.training.data.label_maps import open_labelled_source
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.data.target import TargetImages
from darcnn.training.loop import LoopPlan, train
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_weights
from darcnn.training.schedule import similarity_weight
from darcnn.training.steps import adapt_losses, refine_losses, source_losses
from darcnn.training.trust import note_trust
from darcnn.training.writing import disk_errors

__all__ = ["Run", "SourceTiles", "check_batches", "run_adapt", "run_all", "run_refine", "run_source"]

_LAST_ROUND = "refine"  # its folder: the final model
_MIN_SHEET_STEPS = 100  # between two pictures, which take as long as several steps


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: what, from which data folder, into which folder, on which device."""

    recipe: Recipe
    data: Path
    out: Path
    resume: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def folder(self, name: str) -> Path:
        """Return the folder of the stage called `name`, made if need be.

        Raises:
            OutputError: it holds a checkpoint and the run does not resume, or cannot be written.
        """
        folder = self.out / name
        if (folder / "checkpoint.json").exists() and not self.resume:
            raise OutputError(
                "holds a checkpoint already", where=folder, fix="pass --resume or another --out"
            )
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def is_done(self, folder: Path) -> bool:
        """Tell whether a resumed run finds the stage in `folder` finished."""
        return self.resume and is_complete(folder)

    def start_from(self, folder: Path) -> Darcnn:
        """Return the network of the checkpoint in `folder`, on the run's device."""
        return load_network(folder)[0].to(self.device)


class SourceTiles:
    """Labelled images, scenes and synthesized tiles of a recipe, by seed, stage, step and index."""

    def __init__(self, run: Run, targets: TargetImages) -> None:
        self.recipe = run.recipe
        self.source = open_labelled_source(run.data, run.recipe.source, tile_px=run.recipe.tile_px)
        self.cutouts = self.source.cutouts() if run.recipe.source.scene_fraction > 0 else []
        self.synthesized: SynthesizedSource | None = None
        if run.recipe.source.synthetic_fraction > 0:
            self.synthesized = SynthesizedSource(targets)

    def batch(self, stage: str, number: int, size: int) -> Batch:
        """Return this process's share of batch `number` of a stage."""
        key = BatchKey(self.recipe.seed, stage, number)
        return make_batch(self._tile, key, parallel.share_of(size))

    def _tile(self, rng: np.random.Generator) -> LabelledTile:
        options = self.recipe.source
        if self.synthesized is not None and rng.random() < options.synthetic_fraction:
            return vary_synthesized(self.synthesized.tile(rng, self.recipe.tile_px), rng)
        return make_source_tile(
            self.source,
            self.cutouts,
            rng,
            self.recipe.tile_px,
            scene_fraction=options.scene_fraction if self.cutouts else 0.0,
            grey_fraction=options.grey_fraction,
        )


def run_source(run: Run) -> Darcnn:
    """Train a Mask R-CNN on the labelled photographs, from the recipe's weights, into `run.out`/source."""
    recipe, stage = run.recipe, run.recipe.source_stage
    folder = run.folder("source")
    with torch.random.fork_rng(devices=[]):  # heads start at random, in every process the same
        torch.manual_seed(recipe.seed)
        network = Darcnn.from_name(recipe.preset, recipe.weights)
    if not run.is_done(folder):
        load_weights(network, recipe.weights, run.data)
    network.to(run.device)
    targets = TargetImages(run.data, recipe.target, recipe.seed)
    tiles = SourceTiles(run, targets)
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
    """Stage 1: adapt the source checkpoint in `start` to the unlabelled images, into `run.out`/adapt."""
    recipe, stage = run.recipe, run.recipe.adapt_stage
    folder = run.folder("adapt")
    network = run.start_from(start)
    network.start_adaptation()
    targets = TargetImages(run.data, recipe.target, recipe.seed)
    _match_scales(run, network, targets, folder)
    tiles = SourceTiles(run, targets)
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
    targets = TargetImages(run.data, recipe.target, recipe.seed)
    first = run.folder(_rounds(recipe)[0])
    known = start / DIAMETERS_FILE  # what stage 1 measured holds for stage 2
    _match_scales(run, network, targets, known.parent if known.is_file() else first)
    tiles, synthesized = SourceTiles(run, targets), SynthesizedSource(targets)
    sheet = ContactSheet(recipe, targets)
    for name in _rounds(recipe):
        folder = run.folder(name)
        label_folder = folder / "pseudo_labels"
        if not run.is_done(folder) and parallel.is_first():
            label_images(
                network,
                recipe,
                targets,
                label_folder,
                resume=run.resume,
                keeps_doubt=name != _LAST_ROUND,
            )
        parallel.wait_for_all()
        labels = read_labels(label_folder)
        plan = LoopPlan(
            stage="refine",
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

        def batch_of(number: int, name: str = name, labels: dict[str, NDArray[np.int32]] = labels) -> Batch:
            if stage.source_every and number % stage.source_every == 0:
                return tiles.batch(name, number, stage.batch)
            is_synthetic = stage.synthetic_every and number % stage.synthetic_every == 0

            def draw(rng: np.random.Generator) -> LabelledTile:
                if is_synthetic:
                    return vary_synthesized(synthesized.tile(rng, recipe.tile_px), rng)
                tile = targets.tile(rng, recipe.tile_px, labels)
                return augment_target(tile, rng) if stage.augment else tile

            return make_batch(draw, BatchKey(recipe.seed, name, number), parallel.share_of(stage.batch))

        network = train(network, plan, batch_of, _refine_losses_of(network, run.device))
        note_trust(network, recipe, targets, folder)
    return network


def _match_scales(run: Run, network: Darcnn, targets: TargetImages, folder: Path) -> None:
    """Bring the images to the network's scale, by what it finds on them; one process looks, all read."""
    if parallel.is_first():
        match_scales(network, run.recipe, targets, folder)
    parallel.wait_for_all()
    if not parallel.is_first():
        match_scales(network, run.recipe, targets, folder)


def _rounds(recipe: Recipe) -> list[str]:
    """Return the names of the rounds of stage 2."""
    return [*(f"refine-{number}" for number in range(1, recipe.refine_stage.rounds)), _LAST_ROUND]


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


def run_all(run: Run) -> Darcnn:
    """Run the three stages one after another; finished ones are skipped when resuming.

    What would stop a later stage stops the run before it trains: the source stage reads all images.
    """
    check_batches(run.recipe)
    for name in ("source", "adapt", *_rounds(run.recipe)):
        run.folder(name)
    run_source(run)
    run_adapt(run, run.out / "source")
    return run_refine(run, run.out / "adapt")
