"""Are nuclei found and followed where a stage jumps, where they bleach and divide? Series of real nuclei.

    python benchmarks/series_of_nuclei.py ../shared/data/fluorescence/val

Single nuclei are cut out of labelled images, laid side by side on noise and moved a little at each of 8 time
points; so it is known where each one is. Half way the field jumps, or all the time the nuclei bleach, or one
by one some divide into two smaller ones that move apart. `found` are nuclei with a found centroid within
8 px, `links` those found at two time points in a row, `kept` those of them with one `id` at both, `mixed` the
tracks that hold more than one nucleus. Of the nuclei that `divided`, `told` are those whose track both
daughters name as their parent; `false` are all other divisions that are told.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pyarrow.parquet as pq
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage.measure import regionprops
from skimage.transform import rescale

import darcnn.runtime as darcnn
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.pipeline import run_volume
from darcnn.training.evaluate import labelled_images

_SIDE_PX, _APART_PX = 420, 38
_TIMES = 8
_AREA_PX = (300, 900)
_BACKGROUND, _NOISE = 12.0, 2.5
_NEAR_PX = 8.0
# how far the field jumps, pixels, to what share of their brightness the nuclei bleach, how many divide
_CASES = (
    (0.0, 1.0, 0.0),
    (15.0, 1.0, 0.0),
    (30.0, 1.0, 0.0),
    (45.0, 1.0, 0.0),
    (0.0, 0.33, 0.0),
    (0.0, 0.12, 0.0),
    (0.0, 1.0, 0.4),
    (15.0, 1.0, 0.4),
)
_DAUGHTER = 0.75  # width of a daughter, in that of her mother
_DRIFT_PX = 1.5  # that daughters move apart at each time point


@dataclass(frozen=True)
class _Series:
    """A series and what is on it: N nuclei, daughters included."""

    pixels: NDArray[np.uint8]  # (T, H, W)
    places: NDArray[np.float64]  # (T, N, 2) y x, NaN where it is not
    mothers: NDArray[np.int64]  # (N,) -1: it has none


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="nuclei-fluorescence", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(folder: Path, model: str, seed: int) -> None:
    """Make series of the nuclei in FOLDER (images/ and labels/) and follow them."""
    nuclei = _cut_out(folder)
    click.echo(f"{len(nuclei)} nuclei at hand")
    click.echo("jump px  bleached to  nuclei  found  links  kept  mixed  divided  told  false")
    with darcnn.load(model) as segmenter:
        for jump_px, last, dividing in _CASES:
            series = _make_series(nuclei, np.random.default_rng(seed), jump_px, last, dividing)
            figures = _judge(segmenter, series)
            widths = (6, 5, 5, 4, 5, 7, 4, 5)
            shown = "  ".join(f"{n:{width}}" for n, width in zip(figures, widths, strict=True))
            click.echo(f"{jump_px:7.0f}  {last:11.2f}  {shown}")


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
    nuclei: list[NDArray[np.float64]], rng: np.random.Generator, jump_px: float, last: float, dividing: float
) -> _Series:
    first: list[NDArray[np.float64]] = []
    for place in rng.uniform(30, _SIDE_PX - 70, (3000, 2)):
        if all(np.hypot(*(place - other)) > _APART_PX for other in first):
            first.append(place)
    chosen = [nuclei[k] for k in rng.choice(len(nuclei), len(first))]
    speed = rng.normal(0.0, 1.0, (len(first), 2))
    jump = jump_px * np.array([0.8, 0.6])
    times = np.arange(_TIMES)[:, None, None]
    centres = np.array([place + np.divide(one.shape, 2) for place, one in zip(first, chosen, strict=True)])
    ways = centres + speed * times + jump * (times >= _TIMES // 2)  # (T, N, 2) of the middle of each crop
    mothers = np.full(len(first), -1)
    for mother in np.flatnonzero(rng.random(len(first)) < dividing):
        begin = int(rng.integers(2, _TIMES - 1))
        daughter = rescale(chosen[mother], _DAUGHTER)
        angle = rng.uniform(0, np.pi)
        side = np.array([np.sin(angle), np.cos(angle)])
        apart = max(daughter.shape) / 2 + 1 + _DRIFT_PX * np.maximum(0, times[:, 0] - begin)  # (T, 1)
        for sign in (-1, 1):
            way = ways[:, mother] + sign * side * apart
            way[:begin] = np.nan
            ways, mothers = np.concatenate([ways, way[:, None]], axis=1), np.append(mothers, mother)
            chosen.append(daughter)
        ways[begin:, mother] = np.nan
    series, places = np.zeros((_TIMES, _SIDE_PX, _SIDE_PX)), np.full(ways.shape, np.nan)
    for t in range(_TIMES):
        for n in np.flatnonzero(np.isfinite(ways[t, :, 0])):
            h, w = chosen[n].shape
            y, x = np.round(ways[t, n] - np.divide(chosen[n].shape, 2)).astype(int).tolist()
            ground = series[t, y : y + h, x : x + w]
            np.maximum(ground, chosen[n][: ground.shape[0], : ground.shape[1]], out=ground)
            ys, xs = np.nonzero(chosen[n])
            places[t, n] = ys.mean() + y + 0.5, xs.mean() + x + 0.5
        series[t] *= last ** (t / (_TIMES - 1))
    noisy = series + _BACKGROUND + rng.normal(0.0, _NOISE, series.shape)
    return _Series(np.clip(noisy, 0, 255).astype(np.uint8), places, mothers)


def _judge(segmenter: Segmenter, series: _Series) -> tuple[int, ...]:
    """Return the numbers of places, found, links, kept, mixed, divided, told and false."""
    places = series.places
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "series.tif"
        tifffile.imwrite(path, series.pixels, imagej=True, metadata={"axes": "TYX"})
        folder = run_volume(segmenter, path, Path(scratch) / "out").folder
        table = pq.read_table(folder / "tracks.parquet", columns=["id", "t", "y", "x"])
        objects = pq.read_table(folder / "objects.parquet", columns=["id", "parent"])
    ids, t, y, x = (table[name].to_numpy() for name in table.column_names)
    owner = np.full(places.shape[:2], -1)  # the track of each nucleus at each time point
    for time in range(len(places)):
        now = t == time
        if now.any():
            apart = np.linalg.norm(places[time][:, None] - np.stack([y[now], x[now]], axis=1), axis=2)
            nearest = np.where(np.isfinite(places[time, :, 0]), apart.argmin(axis=1), 0)
            owner[time] = np.where(apart.min(axis=1) < _NEAR_PX, ids[now][nearest], -1)
    is_link = (owner[1:] >= 0) & (owner[:-1] >= 0)
    n_kept = int((is_link & (owner[1:] == owner[:-1])).sum())
    mixed = [one for one in np.unique(owner[owner >= 0]) if (owner == one).any(axis=0).sum() > 1]
    tracks = [set(one[one >= 0].tolist()) for one in owner.T]
    parents = {one: parent for one, parent in zip(*objects.to_pydict().values(), strict=True) if parent}
    n_told = 0
    divided = np.unique(series.mothers[series.mothers >= 0])
    for mother in divided:
        named = [
            any(parents.get(one) in tracks[mother] for one in tracks[daughter])
            for daughter in np.flatnonzero(series.mothers == mother)
        ]
        n_told += all(named)
    n_places = int(np.isfinite(places[:, :, 0]).sum())
    n_false = len(set(parents.values())) - n_told
    counts = int((owner >= 0).sum()), int(is_link.sum()), n_kept, len(mixed), len(divided), n_told, n_false
    return n_places, *counts


if __name__ == "__main__":
    from one_line import run

    run(main)
