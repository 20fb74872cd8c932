"""How good are the models, and how good is thresholding, on the same labelled images?

    python benchmarks/quality.py nuclei-fluorescence --folder DIR
    python benchmarks/quality.py nuclei-he --folder DIR --diameter 19 --stain haematoxylin

Prints a table and writes JSON. Thresholding: Otsu on the smoothed image (of haematoxylin for stained
tissue), holes filled, split by a distance-transform watershed whose spacing is the median object.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label, regionprops
from skimage.segmentation import watershed

import darcnn.runtime
from darcnn.runtime.instances import Instances
from darcnn.runtime.masks import label_instances
from darcnn.runtime.readers import Reader
from darcnn.training.evaluate import Evaluation, evaluate_folder

_FIGURES = ("aji", "pixel_f1", "object_f1", "max_iou")
_SMOOTHING_PX = 1.0
_MIN_AREA_PX = 20


def otsu_watershed(image: NDArray[Any], *, is_haematoxylin: bool) -> NDArray[np.int32]:
    """Return the (H, W) label image that thresholding gives for `image`, (H, W, C)."""
    grey = rgb2hed(image[:, :, :3])[:, :, 0] if is_haematoxylin else image.astype(float).mean(axis=2)
    smooth = gaussian(grey, _SMOOTHING_PX)
    mask = ndimage.binary_fill_holes(smooth > threshold_otsu(smooth))
    areas = [region.area for region in regionprops(label(mask)) if region.area >= _MIN_AREA_PX]
    if not areas:
        return np.zeros(mask.shape, np.int32)
    radius = float(np.sqrt(np.median(areas) / np.pi))
    distance = gaussian(ndimage.distance_transform_edt(mask), 1.0)
    peaks = peak_local_max(distance, min_distance=max(2, round(0.7 * radius)), labels=label(mask))
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: NDArray[np.int32] = watershed(-distance, markers, mask=mask).astype(np.int32)
    small = np.bincount(labels.ravel()) < _MIN_AREA_PX
    labels[small[labels]] = 0
    return labels


@click.command()
@click.argument("models", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--diameter", type=float, help="Typical object, pixels of the images; else estimated.")
@click.option("--stain", type=click.Choice(["haematoxylin"]), help="What thresholding looks at.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(
    models: tuple[str, ...], folder: Path, diameter: float | None, stain: str | None, out: Path | None
) -> None:
    """Score thresholding and MODELS (names or bundles) on a FOLDER with images/ and labels/."""

    def threshold(reader: Reader) -> Instances:
        info = reader.info
        image = reader.read(info.whole, level=0)
        return label_instances(otsu_watershed(image, is_haematoxylin=stain is not None))

    rows: dict[str, dict[str, float]] = {"thresholding": _row(folder, threshold)}
    for model in models:
        with darcnn.runtime.load(model) as segmenter:

            def segment(reader: Reader, segmenter: darcnn.runtime.Segmenter = segmenter) -> Instances:
                return segmenter(reader, diameter_px="auto" if diameter is None else diameter)

            rows[model] = _row(folder, segment)
    click.echo(f"{folder.parent.name}/{folder.name}")
    for name, row in rows.items():
        click.echo(f"{name:<24}" + "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
    if out is not None:
        record = {
            "folder": f"{folder.parent.name}/{folder.name}",
            "rows": rows,
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.processor() or platform.machine(),
        }
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _row(folder: Path, segment: Callable[[Reader], Instances]) -> dict[str, float]:
    start = time.perf_counter()
    result: Evaluation = evaluate_folder(folder, segment)
    figures = {figure: float(getattr(result.mean, figure)) for figure in _FIGURES}
    return figures | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    from one_line import run

    run(main)
