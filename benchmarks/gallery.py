"""What do the best, the median and the worst images of a labelled folder look like?

    python benchmarks/gallery.py nuclei-he --folder DIR --diameter 19 --out docs/gallery-he.jpg

Draws the images of highest, middle and lowest AJI in three rows: green is what MODEL found, red the truth.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

import darcnn.runtime
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.masks import label_instances
from darcnn.runtime.metrics import score_labels
from darcnn.runtime.readers import open_source
from darcnn.runtime.readers.image_places import stem_of
from darcnn.training.contact_sheet import draw_outlines
from darcnn.training.evaluate import labelled_images, read_label_image

_COLUMNS = 4
_SIDE_PX = 300
_GAP_PX = 4
_TRUTH = (255, 60, 60)
_SHOWN = IntensityRule("percentile", 0.5, 99.8)


@click.command()
@click.argument("model")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--diameter", type=float, help="Typical object, pixels of the images; else estimated.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The picture to write (JPEG).")
def main(model: str, folder: Path, diameter: float | None, out: Path) -> None:
    """Draw what MODEL finds on the best, median and worst images of FOLDER."""
    seen = []
    with darcnn.runtime.load(model) as segmenter:
        for image, label in labelled_images(folder):
            truth = read_label_image(label)
            with open_source(image) as reader:
                found = segmenter(reader, diameter_px=diameter)
                info = reader.info
                pixels = reader.read(info.whole, level=0)
            seen.append((score_labels(truth, found.labels()).aji, stem_of(image), pixels, found, truth))
    seen.sort(key=lambda one: -one[0])
    middle = (len(seen) - _COLUMNS) // 2
    rows = [seen[:_COLUMNS], seen[middle : middle + _COLUMNS], seen[-_COLUMNS:]]
    pitch = _SIDE_PX + _GAP_PX
    page = Image.new("RGB", (_COLUMNS * pitch - _GAP_PX, len(rows) * pitch - _GAP_PX), "white")
    for y, row in enumerate(rows):
        for x, (aji, name, pixels, found, truth) in enumerate(row):
            page.paste(_draw(pixels, found, truth, f"{name}  AJI {aji:.2f}"), (x * pitch, y * pitch))
    page.save(out, quality=85)


def _draw(
    pixels: NDArray[np.generic], found: Instances, truth: NDArray[np.int32], caption: str
) -> Image.Image:
    """Return the middle of an image, at most `_SIDE_PX` a side after enlargement, with both outlines."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    enlarged = _SIDE_PX / side
    x0, y0 = (width - side) // 2, (height - side) // 2
    crop = pixels[y0 : y0 + side, x0 : x0 + side].astype(np.float32)
    low, high = np.percentile(crop, [_SHOWN.low, _SHOWN.high]) if crop.shape[2] == 1 else (0.0, 255.0)
    shown = np.clip((crop - low) / max(high - low, 1e-6) * 255.0, 0, 255).astype(np.uint8)
    shift = np.array([x0, y0], np.float64)
    rings = [ring - shift for ring in found.outlines]
    picture = draw_outlines(shown, rings, "", enlarged=enlarged)
    draw = ImageDraw.Draw(picture)
    for ring in label_instances(truth).outlines:
        draw.line(((ring - shift) * enlarged - 0.5).ravel().tolist(), fill=_TRUTH, width=1)
    draw.text((4, 2), caption, fill="white", stroke_width=2, stroke_fill="black")
    return picture


if __name__ == "__main__":
    from one_line import run

    run(main)
