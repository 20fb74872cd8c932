"""The tiles that stage 2 learns from: pseudo-labelled, synthesized and, now and then, labelled ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from darcnn.training import parallel
from darcnn.training.adapt.pseudo_labels import show_dark_objects
from darcnn.training.config import Recipe
from darcnn.training.data.augment import add_noise, augment_target, vary_stains, vary_synthesized
from darcnn.training.data.batches import Batch, BatchKey, make_batch
from darcnn.training.data.crowding import crowd
from darcnn.training.data.glass import lay_glass
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.data.target import TargetImages
from darcnn.training.source_tiles import SourceTiles

__all__ = ["RefineTiles"]


class RefineTiles:
    """What a round of stage 2 learns from, by seed, round, step and index.

    Raises:
        UsageError: photographs are due, and the recipe has no [source].
        InputError: its images or labels cannot be used.
    """

    def __init__(self, recipe: Recipe, data: Path, targets: TargetImages) -> None:
        self.recipe, self.stage, self.targets = recipe, recipe.refine_stage, targets
        self.source = SourceTiles(recipe, data, targets) if self.stage.source_every else None
        slab, nominal = recipe.target.slab, recipe.target.nominal_diameter_px
        self._grain_px = 0.0 if slab is None else slab.sigma_px(nominal)

    def of_round(self, name: str, labels: dict[str, NDArray[np.int32]]) -> Callable[[int], Batch]:
        """Return what makes this process's share of a batch of the round called `name`, by its number.

        Every so many batches are of photographs, or of synthesized tiles: these have objects of the polarity
        that the labelled ones have.

        Args:
            name: of the round.
            labels: its pseudo-labels by image, (H, W), negative where doubtful.
        """
        stage, tile_px = self.stage, self.recipe.tile_px
        is_dark = stage.synthetic_every > 0 and show_dark_objects(self.targets.images, labels)
        synthesized = SynthesizedSource(self.targets, is_dark=is_dark)

        def batch(number: int) -> Batch:
            if self.source is not None and number % stage.source_every == 0:
                return self.source.batch(name, number, stage.batch)
            is_synthetic = stage.synthetic_every and number % stage.synthetic_every == 0

            def draw(rng: np.random.Generator) -> LabelledTile:
                if is_synthetic:
                    return vary_synthesized(synthesized.tile(rng, tile_px), rng)
                return self._vary(self.targets.tile(rng, tile_px, labels), rng)

            return make_batch(draw, BatchKey(self.recipe.seed, name, number), parallel.share_of(stage.batch))

        return batch

    def _vary(self, tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
        """Return a pseudo-labelled tile as it is learned: labels come from the clean image."""
        stage = self.stage
        if stage.extra_noise > 0:
            tile = add_noise(tile, rng, most=stage.extra_noise, grain_px=self._grain_px)
        if stage.crowding > 0 and rng.random() < stage.crowding:
            tile = crowd(tile, rng)
        if stage.glass > 0 and rng.random() < stage.glass:
            tile = lay_glass(tile, rng, diameter_px=self.recipe.target.nominal_diameter_px)
        if stage.vary_stains > 0:
            tile = vary_stains(tile, rng, most=stage.vary_stains)
        return augment_target(tile, rng) if stage.augment else tile
