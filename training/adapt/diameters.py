"""Scale matching: the size of the objects of each unlabelled image, estimated by the network itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from darcnn.runtime.diameter import estimate_diameter
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.tiling import halo_for
from darcnn.training.config import Recipe
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import make_segmenter
from darcnn.training.model.network import Darcnn
from darcnn.training.writing import new_file

__all__ = ["match_scales"]

_FILE = "diameters.json"
_TILE_PX = 320  # small tiles: a size is told by a few objects ...
_CORE_PX = 160  # ... but not smaller than this between their halos


def match_scales(
    network: Darcnn, recipe: Recipe, targets: TargetImages, folder: Path, *, before: Path | None = None
) -> None:
    """Scale the images of `targets` whose size nobody gave, so that their objects have the nominal diameter.

    Not in the paper. An image on which the network finds too little gets the median of the others. The
    diameters are kept in `folder`/diameters.json (image name -> level-0 pixels) and read back from there, or
    from the folder of the stage `before`, unless images or recipe have changed since.

    Raises:
        OutputError: they cannot be written.
    """
    unknown = [image for image in targets.images if image.is_scale_open]
    if not recipe.target.finds_diameter or not unknown:
        return
    depends_on = [targets.digest, repr(recipe.target), recipe.refine_stage.min_score]
    diameters = None if before is None else _read(before, depends_on)
    if diameters is None:
        diameters = _read(folder, depends_on)
    if diameters is None:
        as_they_are = recipe.target.with_intensity_done()
        min_score = recipe.refine_stage.min_score
        found: dict[str, float | None] = {}
        stride = max(network.preset.strides_px)
        halo = halo_for(recipe.target.nominal_diameter_px, stride)
        tile_px = max(_TILE_PX, stride * math.ceil((2 * halo + _CORE_PX) / stride))
        with make_segmenter(network, as_they_are, min_score=min_score, tile_px=tile_px) as segmenter:
            for image in tqdm(unknown, desc="diameters", unit="image"):
                with ArrayReader(image.pixels) as reader:
                    found[image.name] = estimate_diameter(segmenter, reader)
        known = [value for value in found.values() if value is not None]
        typical = float(np.median(known)) if known else recipe.target.nominal_diameter_px
        diameters = {name: typical if value is None else value for name, value in found.items()}
        content = {"depends_on": depends_on, "diameters": diameters}
        with new_file(folder / _FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    targets.match(diameters)


def _read(folder: Path, depends_on: list[object]) -> dict[str, float] | None:
    """Return the diameters that were measured for the same images and recipe, None where there are none."""
    path = folder / _FILE
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("depends_on", depends_on) != depends_on:  # runs from before it was noted tell sizes alone
        return None
    diameters: dict[str, float] = content.get("diameters", content)
    return diameters
