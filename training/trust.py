"""What a stage notes of its network's trust on the unlabelled images that it learned from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from darcnn.runtime.readers.array import ArrayReader
from darcnn.training.config import Recipe
from darcnn.training.contact_sheet import spread
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import make_segmenter
from darcnn.training.model.network import Darcnn
from darcnn.training.parallel import is_first
from darcnn.training.unlabelled import Trust, judge_image, mean_trust
from darcnn.training.writing import new_file

__all__ = ["TRUST_FILE", "note_trust", "read_trust"]

TRUST_FILE = "trust.json"
_IMAGES = 8  # looked at, evenly spread over the targets and always the same


def note_trust(network: Darcnn, recipe: Recipe, targets: TargetImages, folder: Path) -> None:
    """Judge the target branch on eight of its unlabelled images and write `folder`/trust.json, once.

    Of several processes the first does.

    Raises:
        OutputError: it cannot be written.
    """
    if not is_first() or (folder / TRUST_FILE).is_file():
        return
    as_they_are = recipe.target.with_intensity_done()
    nominal, figures = recipe.target.nominal_diameter_px, []
    with make_segmenter(
        network,
        as_they_are,
        min_score=recipe.export.min_score,
        tile_px=recipe.export.tile_px,
        max_diameters=recipe.export.max_diameters,
    ) as segmenter:
        for image in spread(targets.images, _IMAGES):
            with ArrayReader(image.pixels) as reader:
                figures.append(judge_image(segmenter, reader, diameter_px=nominal / image.scale))
    with new_file(folder / TRUST_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(mean_trust(figures))), encoding="utf-8")


def read_trust(folder: Path) -> Trust | None:
    """Return what the stage in `folder` noted, None if nothing."""
    path = folder / TRUST_FILE
    return Trust(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
