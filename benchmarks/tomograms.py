"""How good is a model on labelled tomograms, beside thresholding, and our linking beside plain stitching?

    python benchmarks/tomograms.py particles-cryoet --folder ../shared/data/tomograms/val

Prints a table and writes JSON. Thresholding: the mean of five planes, smoothed, its local mean taken off,
Otsu, connected components in space between 100 and 8000 voxels. Stitching, as Cellpose joins planes
(Stringer et al. 2021, `stitch3D`): a mask takes the number of the mask of the plane before with which it
overlaps most, if IoU is 0.25 or more; on the very sections that our linking gets. Peaks: dark blobs of one
size (differences of Gaussians) without outlines; hits at the threshold that is best *for these labels*.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

import darcnn.runtime
from darcnn.runtime.volumes.find import find_planes, plan_view
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.matching import Chain
from darcnn.runtime.volumes.metrics import VolumeScores, score_volume
from darcnn.runtime.volumes.open import open_volume
from darcnn.runtime.volumes.sections import Section, common_pixels, sections_of
from darcnn.runtime.volumes.solid import Solid, solid_of
from darcnn.runtime.volumes.volume import Volume
from darcnn.training.evaluate_volumes import as_rows, labelled_volumes, read_label_volume

_STITCH_IOU = 0.25
_SLAB = 5
_SMOOTHING = 1.5  # voxels
_BACKGROUND = 15.0  # voxels: what is smoother is no particle
_SIZES = (100, 8000)  # voxels of a component
_BLOB, _WIDER = 3.0, 1.6  # voxels, and times that: the two Gaussians
_BLOB_SIDE = 7  # voxels: a peak is the highest in such a cube

Labels = NDArray[np.integer[Any]]


def threshold(values: NDArray[np.float32]) -> Labels:
    """Return the (Z, Y, X) labels that thresholding gives for dark particles."""
    slab = ndimage.uniform_filter1d(values, _SLAB, axis=0)
    smooth = ndimage.gaussian_filter(slab, _SMOOTHING)
    flat = ndimage.gaussian_filter(smooth, (0, _BACKGROUND, _BACKGROUND)) - smooth
    labels, n = ndimage.label(flat > threshold_otsu(flat))
    sizes = np.bincount(labels.ravel(), minlength=n + 1)
    fits = (sizes >= _SIZES[0]) & (sizes <= _SIZES[1])
    fits[0] = False
    found: Labels = np.where(fits[labels], labels, 0)
    return found


def best_hits_of_peaks(values: NDArray[np.float32], truth: Labels) -> float:
    """Return the F1 of hits of the strongest dark blobs, as many of them as suit `truth` best."""
    narrow, wide = (ndimage.gaussian_filter(values, sigma) for sigma in (_BLOB, _BLOB * _WIDER))
    height = wide - narrow
    is_peak = (height == ndimage.maximum_filter(height, _BLOB_SIDE)) & (height > 0)
    hit = truth[is_peak][np.argsort(-height[is_peak], kind="stable")]
    first = np.zeros(len(hit), np.bool_)
    first[np.unique(hit, return_index=True)[1]] = True  # each particle counts once
    n_hits = np.cumsum(first & (hit > 0))
    n_true = len(np.unique(truth[truth > 0]))
    return float((2.0 * n_hits / (np.arange(1, len(hit) + 1) + n_true)).max(initial=0.0))


def stitch(planes: Iterable[list[Section]]) -> Iterator[Chain]:
    """Yield the chains that plain stitching makes: the best overlap with the plane before, nothing else."""
    chains: list[Chain] = []
    for sections in planes:
        overlap = np.array([[_iou(chain[-1], one) for one in sections] for chain in chains])
        joined: list[Chain] = []
        for column, section in enumerate(sections):
            best = int(overlap[:, column].argmax()) if chains else -1
            is_mutual = best >= 0 and overlap[best].argmax() == column
            if is_mutual and overlap[best, column] >= _STITCH_IOU:
                chains[best].append(section)
                joined.append(chains[best])
            else:
                joined.append([section])
        kept = {id(chain) for chain in joined}
        yield from (chain for chain in chains if id(chain) not in kept)
        chains = joined
    yield from chains


def _iou(one: Section, other: Section) -> float:
    shared = int(np.count_nonzero(common_pixels(one, other)))
    return shared / (one.area_px + other.area_px - shared)


def draw(solids: Iterable[Solid], shape: tuple[int, ...]) -> Labels:
    """Return the (Z, Y, X) labels of solids, the best on top."""
    labels = np.zeros(shape, np.uint32)
    for number, one in enumerate(sorted(solids, key=lambda solid: solid.score), start=1):
        place = tuple(slice(low, high) for low, high in zip(one.origin, one.stop, strict=True))
        labels[place][one.mask] = number
    return labels


def _values_of(volume: Volume) -> NDArray[np.float32]:
    return np.stack([volume.read("z", z).astype(np.float32) for z in range(volume.info.shape[0])])


def _rows_of(
    model: str, volume: Volume, values: NDArray[np.float32], truth: Labels, diameter: float | None
) -> dict[str, VolumeScores]:
    """Return the scores of one volume: thresholding, and the model with either way of joining planes."""
    n_planes = len(values)
    rows = {"thresholding": score_volume(truth, threshold(values))}
    with darcnn.runtime.load(model) as segmenter:
        view = plan_view(segmenter, volume, "z", diameter_px=diameter)
        found = find_planes(segmenter, view, 0, n_planes)
        planes = [sections_of(instances, plane) for plane, instances in enumerate(found)]
    shortest = view.stack.n_joined
    ways: dict[str, Callable[[], Iterable[Chain]]] = {
        "plain stitching": lambda: stitch(planes),
        "plain stitching, short ones left out": lambda: (c for c in stitch(planes) if len(c) >= shortest),
        "our linking": lambda: link_sections(planes, min_planes=shortest),
    }
    for name, way in ways.items():
        solids = [solid_of(chain, axis="z", n_planes=n_planes) for chain in way()]
        rows[name] = score_volume(truth, draw(solids, truth.shape))
    return rows


@click.command()
@click.argument("model")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--diameter", type=float, help="Typical object, voxels; else the voxel size decides.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(model: str, folder: Path, diameter: float | None, out: Path | None) -> None:
    """Score thresholding and MODEL (a name or bundle) on a FOLDER with volumes/ and labels/."""
    found: dict[str, dict[str, VolumeScores]] = {}
    peaks: dict[str, float] = {}
    for path, label in labelled_volumes(folder):
        with TemporaryDirectory() as scratch, open_volume(path, Path(scratch)) as volume:
            values, truth = _values_of(volume), read_label_volume(label)
            peaks[path.name] = best_hits_of_peaks(values, truth)
            for name, scores in _rows_of(model, volume, values, truth, diameter).items():
                found.setdefault(name, {})[path.name] = scores
    shown = "  ".join(f"{name} {value:.4f}" for name, value in peaks.items())
    click.echo(f"peaks, hits at the best threshold for these labels: {shown}")
    rows = {name: as_rows(figures) for name, figures in found.items()}
    for name, table in rows.items():
        click.echo(name)
        for row, values in table.items():
            click.echo(f"  {row:<16}" + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))
    if out is not None:
        record = {
            "folder": f"{folder.parent.name}/{folder.name}",
            "model": model,
            "rows": rows,
            "peaks_hit_f1": peaks,
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
        }
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    from one_line import run

    run(main)
