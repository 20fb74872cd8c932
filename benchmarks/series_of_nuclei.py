"""Are nuclei found and followed where a stage jumps and where they bleach? Series made of real nuclei.

    python benchmarks/series_of_nuclei.py ../shared/data/fluorescence/val

Single nuclei are cut out of labelled images, laid side by side on noise and moved a little at each of 8 time
points; so it is known where each one is. Half way the field jumps, or all the time the nuclei bleach. `found`
are nuclei with a found centroid within 8 px, `links` those found at two time points in a row, `kept` those of
them with one `id` at both, `mixed` the tracks that hold more than one nucleus.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import regionprops

import darcnn.runtime as darcnn
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.pipeline import run_volume
from darcnn.training.evaluate import labelled_images

_SIDE_PX, _APART_PX = 420, 38
_TIMES = 8
_AREA_PX = (300, 900)
_BACKGROUND, _NOISE = 12.0, 2.5
_NEAR_PX = 8.0
# how far the field jumps, pixels, and to what share of their brightness the nuclei bleach
_CASES = ((0.0, 1.0), (15.0, 1.0), (30.0, 1.0), (45.0, 1.0), (0.0, 0.33), (0.0, 0.12))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="nuclei-fluorescence", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(folder: Path, model: str, seed: int) -> None:
    """Make series of the nuclei in FOLDER (images/ and labels/) and follow them."""
    nuclei = _cut_out(folder)
    click.echo(f"{len(nuclei)} nuclei at hand\njump px  bleached to  nuclei  found  links  kept  mixed")
    with darcnn.load(model) as segmenter:
        for jump_px, last in _CASES:
            rng = np.random.default_rng(seed)
            series, places = _make_series(nuclei, rng, jump_px, last)
            n, n_found, n_links, n_kept, n_mixed = _judge(segmenter, series, places)
            click.echo(
                f"{jump_px:7.0f}  {last:11.2f}  {n:6}  {n_found:5}  {n_links:5}  {n_kept:4}  {n_mixed:5}"
            )


def _cut_out(folder: Path) -> list[NDArray[np.float64]]:
    """Return nuclei that touch no other, brightness above the background, 0 around them."""
    nuclei = []
    for image_path, label_path in labelled_images(folder):
        if not image_path.name.startswith("u2os_"):
            continue
        with Image.open(image_path) as picture, Image.open(label_path) as labels_picture:
            image, labels = np.asarray(picture.convert("L"), np.float64), np.asarray(labels_picture)
        background = np.median(image[labels == 0])
        padded = np.pad(labels, 1)
        for region in regionprops(labels):
            y0, x0, y1, x1 = region.bbox
            around = padded[y0 : y1 + 2, x0 : x1 + 2]
            is_alone = np.isin(around, (0, region.label)).all()
            is_whole = y0 > 0 and x0 > 0 and y1 < labels.shape[0] and x1 < labels.shape[1]
            if is_alone and is_whole and _AREA_PX[0] <= region.area <= _AREA_PX[1]:
                nuclei.append(np.maximum(image[y0:y1, x0:x1] - background, 0.0) * region.image)
    return nuclei


def _make_series(
    nuclei: list[NDArray[np.float64]], rng: np.random.Generator, jump_px: float, last: float
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return the series (T, H, W) and where each nucleus is, (T, N, 2) y x."""
    first: list[NDArray[np.float64]] = []
    for place in rng.uniform(30, _SIDE_PX - 70, (3000, 2)):
        if all(np.hypot(*(place - other)) > _APART_PX for other in first):
            first.append(place)
    chosen = [nuclei[k] for k in rng.choice(len(nuclei), len(first))]
    speed = rng.normal(0.0, 1.0, (len(first), 2))
    jump = jump_px * np.array([0.8, 0.6])
    times = np.arange(_TIMES)[:, None, None]
    corners = np.round(np.array(first) + speed * times + jump * (times >= _TIMES // 2)).astype(int)
    series, places = np.zeros((_TIMES, _SIDE_PX, _SIDE_PX)), np.zeros(corners.shape)
    for t in range(_TIMES):
        for n, (nucleus, (y, x)) in enumerate(zip(chosen, corners[t].tolist(), strict=True)):
            h, w = nucleus.shape
            ground = series[t, y : y + h, x : x + w]
            np.maximum(ground, nucleus[: ground.shape[0], : ground.shape[1]], out=ground)
            ys, xs = np.nonzero(nucleus)
            places[t, n] = ys.mean() + y + 0.5, xs.mean() + x + 0.5
        series[t] *= last ** (t / (_TIMES - 1))
    noisy = series + _BACKGROUND + rng.normal(0.0, _NOISE, series.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), places


def _judge(
    segmenter: Segmenter, series: NDArray[np.uint8], places: NDArray[np.float64]
) -> tuple[int, int, int, int, int]:
    """Return the numbers of places, of those found, of links, of those kept, and of mixed tracks."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "series.tif"
        tifffile.imwrite(path, series, imagej=True, metadata={"axes": "TYX"})
        folder = run_volume(segmenter, path, Path(scratch) / "out").folder
        table = pq.read_table(folder / "tracks.parquet", columns=["id", "t", "y", "x"])
    ids, t, y, x = (table[name].to_numpy() for name in table.column_names)
    owner = np.full(places.shape[:2], -1)  # the track of each nucleus at each time point
    for time in range(len(places)):
        now = t == time
        if now.any():
            apart = np.linalg.norm(places[time][:, None] - np.stack([y[now], x[now]], axis=1), axis=2)
            owner[time] = np.where(apart.min(axis=1) < _NEAR_PX, ids[now][apart.argmin(axis=1)], -1)
    is_link = (owner[1:] >= 0) & (owner[:-1] >= 0)
    n_kept = int((is_link & (owner[1:] == owner[:-1])).sum())
    mixed = [one for one in np.unique(owner[owner >= 0]) if (owner == one).any(axis=0).sum() > 1]
    return owner.size, int((owner >= 0).sum()), int(is_link.sum()), n_kept, len(mixed)


if __name__ == "__main__":
    from one_line import run

    run(main)
