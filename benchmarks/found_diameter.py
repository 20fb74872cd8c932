"""For how large does a model take objects whose size it was told in training?

    python benchmarks/found_diameter.py nuclei-he DATA/histology/train/images --diameter 19

Each image is measured as `--diameter auto` does. The median over all, at the scale that the images had in
training, is `export.found_diameter_px` of the recipe: with it, what "auto" finds on such images is in the
median the size that the recipe gives them. No label is read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np

import darcnn.runtime as darcnn
from darcnn.runtime.diameter import estimate_diameter
from darcnn.runtime.readers import open_source
from darcnn.runtime.readers.open import is_readable
from darcnn.runtime.segmenter import Segmenter

_ROUNDS = 4
_SETTLED = 0.01  # relative change


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--diameter", type=float, required=True, help="What the recipe says of these images, pixels.")
@click.option("--every", type=int, default=1, show_default=True, help="Take every n-th image.")
def main(model: str, folder: Path, diameter: float, every: int) -> None:
    """Measure the objects of the images in FOLDER with MODEL until the figure no longer changes."""
    paths = sorted(path for path in folder.iterdir() if is_readable(path))[::every]
    with darcnn.load(model) as segmenter:
        plain = segmenter.manifest
        found_px = plain.input.nominal_diameter_px
        for _ in range(_ROUNDS):
            manifest = replace(plain, input=replace(plain.input, found_diameter_px=found_px))
            ratio = _median_diameter(Segmenter(segmenter.engine, manifest), paths) / diameter
            found_px *= ratio
            click.echo(f"found_diameter_px = {found_px:.1f} ({len(paths)} images)")
            if abs(ratio - 1) < _SETTLED:
                break


def _median_diameter(segmenter: Segmenter, paths: list[Path]) -> float:
    sizes = []
    for path in paths:
        with open_source(path) as reader:
            sizes.append(estimate_diameter(segmenter, reader))
    return float(np.median([size for size in sizes if size is not None]))


if __name__ == "__main__":
    from one_line import run

    run(main)
