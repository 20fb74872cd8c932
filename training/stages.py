"""The three stages of a run, each from a checkpoint to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from darcnn.runtime.errors import OutputError
from darcnn.training.adapt.pseudo_labels import label_images, read_labels
from darcnn.training.checkpoint import CheckpointInfo, is_complete, load_network
from darcnn.training.config import Recipe
from darcnn.training.data.augment import augment_target, vary_synthesized
from darcnn.training.data.batches import Batch, collate, make_source_tile, random_generator
from darcnn.training.data.label_maps import open_labelled_source
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.data.target import TargetImages
from darcnn.training.loop import LoopPlan, train
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_imagenet
from darcnn.training.schedule import similarity_weight
from darcnn.training.steps import adapt_losses, refine_losses, source_losses

__all__ = ["Run", "run_adapt", "run_all", "run_refine", "run_source"]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: what, from which data folder, into which folder."""

    recipe: Recipe
    data: Path
    out: Path
    resume: bool = False

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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise OutputError(
                err.strerror or str(err), where=folder, fix="choose a folder with permission"
            ) from err
        return folder

    def is_done(self, folder: Path) -> bool:
        """Tell whether a resumed run finds the stage in `folder` finished."""
        return self.resume and is_complete(folder)


class _SourceTiles:
    """Labelled images, scenes and synthesized tiles of a recipe, by seed, stage, step and index."""

    def __init__(self, run: Run) -> None:
        self.recipe = run.recipe
        self.source = open_labelled_source(run.data, run.recipe.source, tile_px=run.recipe.tile_px)
        self.cutouts = self.source.cutouts() if run.recipe.source.scene_fraction > 0 else []
        self.synthesized: SynthesizedSource | None = None
        if run.recipe.source.synthetic_fraction > 0:
            targets = TargetImages(run.data, run.recipe.target, run.recipe.seed)
            self.synthesized = SynthesizedSource(targets)

    def batch(self, stage: str, step: int, size: int) -> Batch:
        return collate([self._tile(random_generator(self.recipe.seed, stage, step, i)) for i in range(size)])

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
    """Train a Mask R-CNN on the labelled photographs, from ImageNet weights, into `run.out`/source."""
    recipe, stage = run.recipe, run.recipe.source_stage
    folder = run.folder("source")
    network = Darcnn.from_name(recipe.preset)
    if not run.is_done(folder):
        load_imagenet(network)
    tiles = _SourceTiles(run)
    plan = LoopPlan(
        stage="source",
        steps=stage.steps,
        learning_rate=stage.learning_rate,
        warm_up=stage.warm_up,
        folder=folder,
        info=CheckpointInfo("source", 0, False, recipe),
        resume=run.resume,
    )

    def losses_of(batch: Batch, step: int) -> dict[str, Tensor]:
        return source_losses(network, batch)

    return train(network, plan, lambda step: tiles.batch("source", step, stage.batch), losses_of)


def run_adapt(run: Run, start: Path) -> Darcnn:
    """Stage 1: adapt the source checkpoint in `start` to the unlabelled images, into `run.out`/adapt."""
    recipe, stage = run.recipe, run.recipe.adapt_stage
    folder = run.folder("adapt")
    network, _ = load_network(start)
    network.start_adaptation()
    tiles = _SourceTiles(run)
    targets = TargetImages(run.data, recipe.target, recipe.seed)
    plan = LoopPlan(
        stage="adapt",
        steps=stage.steps,
        learning_rate=stage.learning_rate,
        warm_up=stage.warm_up,
        folder=folder,
        info=CheckpointInfo("adapt", 0, False, recipe),
        patience=stage.patience,
        settle_steps=stage.alpha_rise_steps,
        resume=run.resume,
    )

    def make_batch(step: int) -> tuple[Batch, Tensor]:
        generators = [random_generator(recipe.seed, "target", step, i) for i in range(stage.target_batch)]
        unlabelled = collate([targets.tile(rng, recipe.tile_px) for rng in generators])
        return tiles.batch("adapt", step, stage.source_batch), unlabelled.images

    def losses_of(batch: tuple[Batch, Tensor], step: int) -> dict[str, Tensor]:
        alpha = similarity_weight(step, first=stage.alpha_first, rise_steps=stage.alpha_rise_steps)
        return adapt_losses(network, *batch, stage, alpha)

    def after_step() -> None:
        network.follow_source_heads(stage.heads_average)

    return train(network, plan, make_batch, losses_of, after_step)


def run_refine(run: Run, start: Path) -> Darcnn:
    """Stage 2: rounds of labelling the clean images and learning from them, into `run.out`/refine.

    Round n leaves `run.out`/refine-n with its pseudo-labels as pictures; the last is `run.out`/refine.
    """
    recipe, stage = run.recipe, run.recipe.refine_stage
    network, _ = load_network(start)
    tiles = _SourceTiles(run)
    targets = TargetImages(run.data, recipe.target, recipe.seed)
    for number in range(1, stage.rounds + 1):
        name = "refine" if number == stage.rounds else f"refine-{number}"
        folder = run.folder(name)
        label_folder = folder / "pseudo_labels"
        if not run.is_done(folder):
            label_images(network, recipe, targets, label_folder, resume=run.resume)
        labels = read_labels(label_folder)
        plan = LoopPlan(
            stage="refine",
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            warm_up=stage.warm_up,
            folder=folder,
            info=CheckpointInfo("refine", 0, False, recipe),
            resume=run.resume,
        )

        def make_batch(step: int, name: str = name, labels: dict[str, NDArray[np.int32]] = labels) -> Batch:
            if stage.source_every and step % stage.source_every == 0:
                return tiles.batch(name, step, stage.batch)
            generators = [random_generator(recipe.seed, name, step, i) for i in range(stage.batch)]
            return collate([augment_target(targets.tile(g, recipe.tile_px, labels), g) for g in generators])

        network = train(network, plan, make_batch, _refine_losses_of(network))
    return network


def _refine_losses_of(network: Darcnn) -> Callable[[Batch, int], dict[str, Tensor]]:
    return lambda batch, step: refine_losses(network, batch)


def run_all(run: Run) -> Darcnn:
    """Run the three stages one after another; finished ones are skipped when resuming."""
    run_source(run)
    run_adapt(run, run.out / "source")
    return run_refine(run, run.out / "adapt")
