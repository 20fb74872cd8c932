"""The labelled tiles that a recipe learns from: photographs or label maps, scenes, synthesized ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from darcnn.runtime.errors import UsageError
from darcnn.training import parallel
from darcnn.training.config import Recipe
from darcnn.training.data.augment import vary_synthesized
from darcnn.training.data.batches import Batch, BatchKey, make_batch, make_source_tile
from darcnn.training.data.label_maps import open_labelled_source
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.data.target import TargetImages

__all__ = ["SourceTiles"]


class SourceTiles:
    """Labelled images, scenes and synthesized tiles of a recipe, by seed, stage, step and index.

    Raises:
        UsageError: the recipe has no [source].
        InputError: its images or labels cannot be used.
    """

    def __init__(self, recipe: Recipe, data: Path, targets: TargetImages) -> None:
        if recipe.source is None:
            raise UsageError("the recipe has no [source]", where=recipe.name, fix="add it")
        self.recipe, self.options = recipe, recipe.source
        options = self.options
        self.source = open_labelled_source(data, options, tile_px=recipe.tile_px)
        self.cutouts = self.source.cutouts() if options.scene_fraction > 0 else []
        self.synthesized: SynthesizedSource | None = None
        if options.synthetic_fraction > 0:
            told = {"dark": True, "bright": False}  # nothing has been found yet that would tell
            is_dark = told.get(recipe.refine_stage.polarity)
            self.synthesized = SynthesizedSource(targets, is_dark=is_dark)

    def batch(self, stage: str, number: int, size: int) -> Batch:
        """Return this process's share of batch `number` of a stage."""
        key = BatchKey(self.recipe.seed, stage, number)
        return make_batch(self._tile, key, parallel.share_of(size))

    def _tile(self, rng: np.random.Generator) -> LabelledTile:
        options = self.options
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
