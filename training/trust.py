"""What a stage notes of its network's trust on the unlabelled images that it learned from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import spread_evenly
from darcnn.training.checkpoint import is_complete
from darcnn.training.config import Recipe
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import make_segmenter
from darcnn.training.model.network import Darcnn
from darcnn.training.parallel import is_first
from darcnn.training.unlabelled import Trust, judge_image, mean_trust
from darcnn.training.writing import new_file

__all__ = ["TRUST_FILE", "checkpoint_in", "most_trusted_round", "note_trust", "read_trust", "round_folders"]

TRUST_FILE = "trust.json"
_IMAGES = 8  # looked at, evenly spread over the targets and always the same


def note_trust(network: Darcnn, recipe: Recipe, targets: TargetImages, folder: Path) -> None:
    """Judge the target branch on eight of its unlabelled images and write `folder`/trust.json.

    Of several processes the first does; again only where the recipe exports the model otherwise.

    Raises:
        OutputError: it cannot be written.
    """
    if not is_first():
        return
    export = recipe.export
    depends_on = {key: getattr(export, key) for key in ("min_score", "tile_px", "max_diameters")}
    if _read(folder).get("depends_on") == depends_on:
        return
    as_they_are = recipe.target.with_intensity_done()
    nominal, figures = recipe.target.nominal_diameter_px, []
    with make_segmenter(
        network,
        as_they_are,
        min_score=export.min_score,
        tile_px=export.tile_px,
        max_diameters=export.max_diameters,
    ) as segmenter:
        for image in spread_evenly(targets.images, _IMAGES):
            with ArrayReader(image.pixels) as reader:
                figures.append(judge_image(segmenter, reader, diameter_px=nominal / image.scale))
    content = {**asdict(mean_trust(figures)), "depends_on": depends_on}
    with new_file(folder / TRUST_FILE) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def read_trust(folder: Path) -> Trust | None:
    """Return what the stage in `folder` noted, None if nothing."""
    content = _read(folder)
    content.pop("depends_on", None)
    return Trust(**content) if content else None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / TRUST_FILE
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def round_folders(out: Path) -> list[Path]:
    """Return the folders of the rounds of stage 2 in the run `out`, in the order in which they ran."""
    earlier = sorted(out.glob("refine-[0-9]*"), key=lambda folder: int(folder.name.split("-")[1]))
    return [*earlier, out / "refine"]


def checkpoint_in(folder: Path) -> Path:
    """Return the folder of the checkpoint in `folder`: itself, or of a whole run the most trusted round."""
    is_run = not (folder / "checkpoint.json").is_file() and (folder / "refine").is_dir()
    return most_trusted_round(folder) if is_run else folder


def most_trusted_round(out: Path) -> Path:
    """Return the folder of the round of stage 2 in the run `out` whose network is trusted most.

    No label decides: the figure is that of `note_trust`. Of equal ones, and where none is noted, the last.

    Raises:
        InputError: the run has no finished last round.
    """
    last = out / "refine"
    if not is_complete(last):
        raise InputError("no finished run", where=out, fix="give a folder that darcnn-train run finished")
    noted = [(folder, read_trust(folder)) for folder in round_folders(out)]
    known = [(folder, trust.trust) for folder, trust in noted if trust is not None]
    best = max((value for _, value in known), default=0.0)
    return [last, *(folder for folder, value in known if value == best)][-1]
