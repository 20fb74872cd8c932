"""A model to judge: a checkpoint, a bundle, or the name of a shipped one."""

from __future__ import annotations

from pathlib import Path

from darcnn.runtime.errors import InputError
from darcnn.runtime.load import load
from darcnn.runtime.segmenter import Segmenter

__all__ = ["is_checkpoint", "open_model"]


def is_checkpoint(model: str) -> bool:
    """Tell whether `model` is the folder of a checkpoint, or of a whole run."""
    folder = Path(model)
    return (folder / "checkpoint.json").is_file() or (folder / "refine" / "checkpoint.json").is_file()


def open_model(model: str, *, min_score: float | None = None) -> Segmenter:
    """Return the segmenter of a checkpoint folder, a bundle or the name of a shipped model.

    Args:
        model: which; of a whole run the most trusted round.
        min_score: objects below it are not reported; None takes the model's own.
    Raises:
        DarcnnError: there is no such model, or it cannot be read.
    """
    if not is_checkpoint(model):
        if (Path(model) / "source").is_dir() or (Path(model) / "adapt").is_dir():
            raise InputError(
                "is a run that is not finished",
                where=model,
                fix="finish it with --resume, or give the folder of one of its stages: refine-1, say",
            )
        return load(model, min_score=min_score)
    from darcnn.training.checkpoint import load_network  # here: a bundle needs no torch
    from darcnn.training.engine import make_segmenter
    from darcnn.training.trust import checkpoint_in

    network, info = load_network(checkpoint_in(Path(model)))
    recipe = info.recipe
    return make_segmenter(
        network,
        recipe.target,
        min_score=recipe.export.min_score if min_score is None else min_score,
        tile_px=recipe.export.tile_px,
        source_branch=info.is_source_only,
        max_diameters=recipe.export.max_diameters,
        found_diameter_px=recipe.export.found_diameter_px,
    )
