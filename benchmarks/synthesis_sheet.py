"""What do synthesized tiles look like, and how long does one take?

    python benchmarks/synthesis_sheet.py DATA "histology/train/images/*.png" --diameter 19 --out sheet.jpg

Writes a sheet of 4 x 4 tiles, every other one with the outlines of its nuclei, and prints how long a tile
took. docs/synthesis.jpg is such a sheet, with --seed 2.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.segmentation import find_boundaries

from darcnn.runtime.intensity import IntensityRule
from darcnn.training.config import Target, TargetSet
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource, synthesize_tile
from darcnn.training.data.target import TargetImages

_SIDE = 4  # tiles
_GAP_PX = 4
_OUTLINE = (255, 255, 0)
_QUALITY = 88  # of the JPEG


def make_sheet(tiles: list[LabelledTile]) -> NDArray[np.uint8]:
    """Return the tiles in rows of four as (H, W, 3), every other one outlined."""
    cells = [
        np.pad(
            _outlined(tile) if (index + index // _SIDE) % 2 else tile.image,
            ((0, _GAP_PX), (0, _GAP_PX), (0, 0)),
        )
        for index, tile in enumerate(tiles)
    ]
    rows = [np.concatenate(cells[first : first + _SIDE], axis=1) for first in range(0, len(cells), _SIDE)]
    return np.concatenate(rows)[:-_GAP_PX, :-_GAP_PX]


def _outlined(tile: LabelledTile) -> NDArray[np.uint8]:
    image = tile.image.copy()
    for mask in tile.masks:
        image[find_boundaries(mask, mode="inner")] = _OUTLINE
    return image


@click.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("images")
@click.option("--diameter", type=float, help="Typical nucleus in the images, px [default: as nominal].")
@click.option("--nominal", type=float, default=28.0, show_default=True, help="Typical nucleus in a tile, px.")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", show_default=True)
@click.option("--tile-px", type=int, default=256, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The sheet, JPEG or PNG.")
def main(
    data: Path,
    images: str,
    diameter: float | None,
    nominal: float,
    channels: str,
    tile_px: int,
    seed: int,
    out: Path,
) -> None:
    """Synthesize tiles from the IMAGES (a glob) in the folder DATA."""
    rule = IntensityRule("full_range") if channels == "3" else IntensityRule("percentile", 0.5, 99.8)
    target = Target((TargetSet(images, diameter),), int(channels), rule, nominal)
    source = SynthesizedSource(TargetImages(data, target, seed))
    tiles = [source.tile(np.random.default_rng((seed, index)), tile_px) for index in range(_SIDE**2)]
    Image.fromarray(make_sheet(tiles)).save(out, quality=_QUALITY)
    crops = [
        source.targets.tile(np.random.default_rng((seed, index)), tile_px).image for index in range(_SIDE**2)
    ]
    seconds = []
    for crop in crops:
        start = time.perf_counter()
        synthesize_tile(crop, np.random.default_rng(seed), source.options)
        seconds.append(time.perf_counter() - start)
    low, middle, high = np.quantile(seconds, (0.1, 0.5, 0.9)) * 1000.0
    click.echo(f"{out}: {np.mean([len(tile.masks) for tile in tiles]):.0f} nuclei a tile")
    click.echo(f"{middle:.0f} ms a tile of {tile_px} px (10 to 90 %: {low:.0f} to {high:.0f})")


if __name__ == "__main__":
    from one_line import run

    run(main)
