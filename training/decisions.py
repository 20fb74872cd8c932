"""What a run takes for granted about the unlabelled images, shown before it learns from them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from darcnn.runtime.sampling import spread_evenly
from darcnn.training.adapt.fit_masks import contrast_of
from darcnn.training.adapt.pseudo_labels import share_of_bright
from darcnn.training.config import Recipe
from darcnn.training.contact_sheet import draw_outlines, lay_out
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import make_segmenter, tile_for_images
from darcnn.training.model.network import Darcnn
from darcnn.training.writing import new_file

__all__ = ["DECISIONS_FILE", "DECISIONS_PICTURE", "Decisions", "decide", "note_decisions"]

DECISIONS_FILE = "decisions.json"
DECISIONS_PICTURE = "decisions.png"

_IMAGES = 6  # looked at and shown, evenly spread
_COLUMNS = 3
_UNDECIDED = 0.65  # share of the findings of one polarity below which it may well be the other
_SIDE_PX = 480  # of one picture
_RULER = (255, 200, 0)


@dataclass(frozen=True, slots=True)
class Decisions:
    """Size and polarity of the objects, as a run will take them."""

    diameter_px: float  # of a typical object, pixels of the images; the median over them
    low_px: float  # the same in the image of which a tenth has smaller objects
    high_px: float
    is_estimated: bool  # from what the network finds; otherwise the recipe or the pixel size said it
    bright_share: float  # of the findings, weighted by score, that are brighter than their surroundings
    n_objects: int  # found on the images looked at

    def in_words(self) -> str:
        """Return them as a sentence or two."""
        how = "estimated from what the network finds" if self.is_estimated else "as given"
        spread_ = f" ({self.low_px:.0f} to {self.high_px:.0f} in most images)" if self.is_estimated else ""
        if not self.n_objects:
            return f"objects are {self.diameter_px:.0f} px across{spread_}, {how}; none is found yet"
        is_bright = self.bright_share >= 0.5
        share = self.bright_share if is_bright else 1.0 - self.bright_share
        doubt = ": as good as undecided" if share < _UNDECIDED else ""
        return (
            f"objects are {self.diameter_px:.0f} px across{spread_}, {how}; {share:.0%} of {self.n_objects} "
            f"findings are {'brighter' if is_bright else 'darker'} than what surrounds them{doubt}"
        )


def decide(network: Darcnn, recipe: Recipe, targets: TargetImages, out: Path) -> Decisions:
    """Return the decisions for `targets`, whose scales have been matched, and draw `out`/decisions.png.

    The picture shows what the network finds before the adaptation, and a bar as long as a typical object.

    Args:
        network: what the adaptation starts from; its target branch looks.
        recipe: the run's.
        targets: the unlabelled images.
        out: the run's folder.
    Raises:
        OutputError: the picture cannot be written.
    """
    as_they_are = recipe.target.with_intensity_done()
    nominal = recipe.target.nominal_diameter_px
    shown = spread_evenly(targets.images, _IMAGES)
    found, pictures = [], []
    min_score, tile_px = recipe.refine_stage.min_score, tile_for_images(recipe.export)
    with make_segmenter(network, as_they_are, min_score=min_score, tile_px=tile_px) as segmenter:
        for image in shown:
            diameter = nominal / image.scale
            instances = segmenter(image.pixels, diameter_px=diameter)
            found.append(instances)
            enlarged = _SIDE_PX / max(image.pixels.shape[:2])
            caption = f"{image.name[:24]}  {len(instances)} found, {diameter:.0f} px"
            picture = draw_outlines(image.pixels, instances.outlines, caption, enlarged=enlarged)
            _draw_ruler(picture, diameter * enlarged)
            pictures.append(picture)
    with new_file(out / DECISIONS_PICTURE) as temporary:
        lay_out(pictures, columns=_COLUMNS, side_px=_SIDE_PX).save(temporary, format="PNG")
    diameters = np.array([nominal / image.scale for image in targets.images])
    contrasts = [contrast_of(image.pixels, one) for image, one in zip(shown, found, strict=True)]
    return Decisions(
        diameter_px=float(np.median(diameters)),
        low_px=float(np.quantile(diameters, 0.1)),
        high_px=float(np.quantile(diameters, 0.9)),
        is_estimated=recipe.target.finds_diameter and any(image.is_scale_open for image in targets.images),
        bright_share=share_of_bright(contrasts, found),
        n_objects=sum(len(one) for one in found),
    )


def note_decisions(decisions: Decisions, out: Path) -> None:
    """Write `out`/decisions.json: a resumed run does not ask again."""
    with new_file(out / DECISIONS_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(decisions), indent=1), encoding="utf-8")


def _draw_ruler(picture: Image.Image, length: float) -> None:
    """Draw a bar of `length` pixels into the lower left corner."""
    draw = ImageDraw.Draw(picture)
    y = picture.height - 12
    draw.line((8, y, 8 + length, y), fill=_RULER, width=4)
