"""One run: its folders, the images that it learns from, and what an earlier try noted of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from darcnn.runtime.errors import OutputError, UsageError
from darcnn.training import parallel
from darcnn.training.checkpoint import is_complete, load_network
from darcnn.training.config import Recipe
from darcnn.training.data.target import TargetImages
from darcnn.training.decisions import DECISIONS_PICTURE
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import preset_named
from darcnn.training.model.pretrained import start_of
from darcnn.training.writing import disk_errors, new_file

__all__ = ["LABELS_FOLDER", "LAST_ROUND", "Run", "check_images", "check_start", "rounds_of"]

LAST_ROUND = "refine"  # its folder: the final model
LABELS_FOLDER = "pseudo_labels"  # in that of a round


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

    def targets(self) -> TargetImages:
        """Return the unlabelled images, but for pictures that the run itself has drawn.

        Raises:
            InputError: there are none, or one does not serve.
        """
        own = [self.out / name for name in ("source", "adapt", *rounds_of(self.recipe), DECISIONS_PICTURE)]
        return TargetImages(self.data, self.recipe.target, self.recipe.seed, without=own)

    def is_done(self, folder: Path) -> bool:
        """Tell whether a resumed run finds the stage in `folder` finished."""
        return self.resume and is_complete(folder)

    def start_from(self, folder: Path) -> Darcnn:
        """Return the network of the checkpoint in `folder`, on the run's device, ready for adaptation.

        Raises:
            UsageError: it has other layers than the recipe's preset.
        """
        network, info = load_network(folder)
        if network.preset != preset_named(self.recipe.preset, self.recipe.weights):
            raise UsageError(
                f"has other layers than the recipe: {info.recipe.preset}, weights {info.recipe.weights!r}",
                where=folder,
                fix="start from a checkpoint of a recipe with the same preset and weights",
            )
        if info.is_source_only:
            network.start_adaptation()
        return network.to(self.device)


def check_start(run: Run, folder: Path) -> None:
    """Note in `folder` what the run starts from, or compare it with what an earlier try noted.

    Raises:
        UsageError: the weights are others than those that the stage was begun with.
    """
    start, path = start_of(run.recipe.preset, run.recipe.weights, run.data), folder / "start.txt"
    if parallel.is_first():
        if not path.is_file():
            with new_file(path) as temporary:
                temporary.write_text(start, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != start:
            raise UsageError(
                f"was begun from another file than weights = {run.recipe.weights!r} is now",
                where=folder,
                fix="choose another --out, or bring that file back",
            )
    parallel.wait_for_all()


def check_images(targets: TargetImages, folder: Path) -> None:
    """Note in `folder` which images are learned from, or compare them with those that an earlier try noted.

    Raises:
        UsageError: they are others, and something was learned from those.
    """
    path = folder / "images.txt"
    if parallel.is_first():
        known = path.read_text(encoding="utf-8") if path.is_file() else None
        has_begun = any((folder / name).exists() for name in ("checkpoint.json", LABELS_FOLDER))
        if known not in (None, targets.digest) and has_begun:
            raise UsageError(
                "was begun with other images than target.sets names now",
                where=folder,
                fix="choose another --out, or bring those images back",
            )
        if known != targets.digest:
            with new_file(path) as temporary:
                temporary.write_text(targets.digest, encoding="utf-8")
    parallel.wait_for_all()


def rounds_of(recipe: Recipe) -> list[str]:
    """Return the names of the rounds of stage 2."""
    return [*(f"refine-{number}" for number in range(1, recipe.refine_stage.rounds)), LAST_ROUND]
