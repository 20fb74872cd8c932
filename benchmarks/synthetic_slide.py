"""A slide of any size, made of a real one: for timings where no large slide is at hand.

    python benchmarks/synthetic_slide.py examples/CMU-1-Small-Region.svs big.tif --side 8192

The real slide is enlarged to the pixel size asked for and laid side by side, mirrored so that no edge
shows, over a square in the middle; around it is glass. The result is a tiled pyramidal TIFF, JPEG inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

import darcnn.runtime

__all__ = ["make_slide"]

_TILE_PX = 512
_PIECE_PX = 2048  # so much of level 0 is in memory at once, along each axis
_STEP = 4  # from level to level
_SMALLEST_PX = 1024
_QUALITY = 90


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--side", type=click.IntRange(1024), default=8192, show_default=True, help="In pixels.")
@click.option("--filled", type=click.FloatRange(0.01, 1), default=1.0, show_default=True, help="Of the side.")
@click.option("--mpp", type=float, default=0.25, show_default=True, help="Micrometres per pixel.")
def main(source: Path, out: Path, side: int, filled: float, mpp: float) -> None:
    """Write the slide OUT, made of SOURCE."""
    make_slide(source, out, side_px=side, filled=filled, mpp=mpp)


def make_slide(source: Path, out: Path, *, side_px: int, filled: float = 1.0, mpp: float = 0.25) -> None:
    """Write a square slide made of `source`, which must know its pixel size and fit in memory.

    Args:
        source: the real slide.
        out: TIFF to write.
        side_px: width and height.
        filled: share of the side that the real slide covers; the rest is glass.
        mpp: micrometres per pixel of the result.
    """
    with darcnn.runtime.open_source(source) as reader:
        info = reader.info
        assert info.mpp is not None
        whole = reader.read(info.whole, level=0)
        size = [round(n * info.mpp[0] / mpp) for n in (info.width_px0, info.height_px0)]
    picture = np.asarray(Image.fromarray(whole).resize((size[0], size[1]), Image.Resampling.BICUBIC))
    steps = [1]
    while side_px // steps[-1] > _SMALLEST_PX:
        steps.append(steps[-1] * _STEP)
    with tifffile.TiffWriter(out, bigtiff=True) as writer:
        for step in steps:
            side = -(-side_px // step)
            writer.write(
                _tiles(picture, side_px, filled, step),
                shape=(side, side, 3),
                dtype=np.uint8,
                tile=(_TILE_PX, _TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _QUALITY},
                resolution=(1e4 / mpp / step, 1e4 / mpp / step),
                resolutionunit="CENTIMETER",
                subifds=len(steps) - 1 if step == 1 else None,
                subfiletype=0 if step == 1 else 1,
                metadata=None,
            )


def _tiles(picture: NDArray[np.uint8], side_px: int, filled: float, step: int) -> Iterator[NDArray[np.uint8]]:
    glass = np.median(picture.reshape(-1, 3)[::997], axis=0).astype(np.uint8)
    side, piece = -(-side_px // step), max(1, _PIECE_PX // step)
    for y0 in range(0, side, _TILE_PX):
        for x0 in range(0, side, _TILE_PX):
            tile = np.empty((_TILE_PX, _TILE_PX, 3), np.uint8)
            for y in range(0, _TILE_PX, piece):  # piece by piece: a tile far up stands for gigabytes
                for x in range(0, _TILE_PX, piece):
                    rows, columns = (
                        np.arange(at * step, (at + min(piece, _TILE_PX)) * step) for at in (y0 + y, x0 + x)
                    )
                    block = _lay(picture, rows, columns, round(side_px * (1 - filled) / 2), side_px, glass)
                    if block.strides[0]:
                        block = np.asarray(Image.fromarray(block).reduce(step))
                    tile[y : y + piece, x : x + piece] = block[: min(piece, _TILE_PX), : min(piece, _TILE_PX)]
            yield tile


def _lay(
    picture: NDArray[np.uint8],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    margin: int,
    side_px: int,
    glass: NDArray[np.uint8],
) -> NDArray[np.uint8]:
    """Return the pixels of the slide at `rows` and `columns`: the picture, and glass within the margin."""
    beyond = [(at < margin) | (at >= side_px - margin) for at in (rows, columns)]
    if any(outside.all() for outside in beyond):
        return np.broadcast_to(glass, (len(rows), len(columns), 3))
    at = (_mirrored(rows - margin, picture.shape[0]), _mirrored(columns - margin, picture.shape[1]))
    block = picture[np.ix_(*at)]  # from the margin on: the same tissue, however large the slide is round it
    block[beyond[0][:, None] | beyond[1][None, :]] = glass
    return block


def _mirrored(at: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    at = at % (2 * n)
    return np.minimum(at, 2 * n - 1 - at)


if __name__ == "__main__":
    from one_line import run

    run(main)
