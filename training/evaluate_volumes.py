"""How good a model is on labelled volumes, on the path that ships: from the file to labels on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import tifffile
import zarr
from numpy.typing import NDArray
from tqdm import tqdm

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.open import is_packed_volume, is_readable
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.metrics import VolumeScores, score_volume
from darcnn.runtime.volumes.options import AxisOption, VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume
from darcnn.training.evaluate import refuse_shared_labels

__all__ = ["as_rows", "by_volume", "evaluate_volumes", "labelled_volumes", "read_label_volume"]


_LABELS = "labels.ome.zarr/0"  # of a result: the labels in full


def labelled_volumes(folder: Path) -> list[tuple[Path, Path]]:
    """Return the pairs of `folder`/volumes and `folder`/labels (TIFF), same name but for the ending.

    Raises:
        InputError: there is none, a volume has no labels, or two have the same.
    """
    pairs = []
    volumes = sorted(
        path
        for path in (folder / "volumes").iterdir()
        if (is_readable(path) or is_packed_volume(path)) and not path.name.startswith(".")
    )
    names = [make_slide_name(volume) for volume in volumes]
    refuse_shared_labels(names, volumes)
    for name, volume in zip(names, volumes, strict=True):
        label = folder / "labels" / f"{name}.tif"
        if not label.is_file():
            raise InputError(
                "no label volume", where=label, fix="give each volume a TIFF stack of the same name"
            )
        pairs.append((volume, label))
    if not pairs:
        raise InputError(
            "no volumes", where=folder / "volumes", fix="give a folder with volumes/ and labels/"
        )
    return pairs


def evaluate_volumes(
    folder: Path,
    segmenter: Segmenter,
    *,
    diameter_px: float | Literal["auto"] | None = None,
    pixels: bool = False,
    axis: AxisOption = "auto",
) -> dict[str, VolumeScores]:
    """Return the figures of each labelled volume of `folder`, by file name.

    Args:
        folder: holds volumes/ and labels/.
        segmenter: the model.
        diameter_px: of a typical object, voxels; None: the voxel size decides the scale.
        pixels: take the voxels as they are.
        axis: whose planes are looked at (`VolumeOptions`).
    Raises:
        InputError: a volume or its labels cannot be used.
    """
    options = VolumeOptions(axis=axis, diameter_px=diameter_px, pixels=pixels)
    found = {}
    for volume, label in tqdm(labelled_volumes(folder), desc=folder.name, unit="volume"):
        truth = read_label_volume(label)
        with TemporaryDirectory() as out:
            result = run_volume(segmenter, volume, Path(out), options=options).folder
            prediction = np.asarray(zarr.open_array(result / _LABELS, mode="r")[:])
        if truth.shape != prediction.shape:
            raise InputError(
                f"is {truth.shape}, its volume {prediction.shape}", where=label, fix="match the sizes"
            )
        found[volume.name] = score_volume(truth, prediction)
    return found


def as_rows(figures: Mapping[str, VolumeScores]) -> dict[str, dict[str, float]]:
    """Return the figures by row: the mean of all volumes, and each volume."""
    rows = by_volume(figures)
    mean = {key: float(np.mean([row[key] for row in rows.values()])) for key in next(iter(rows.values()))}
    return {f"all {len(rows)}, mean": mean, **rows}


def by_volume(figures: Mapping[str, VolumeScores]) -> dict[str, dict[str, float]]:
    """Return the figures of each volume."""
    return {name: _row(one) for name, one in figures.items()}


def _row(scores: VolumeScores) -> dict[str, float]:
    return {
        "aji": scores.planes.aji,
        "pixel_f1": scores.planes.pixel_f1,
        "object_f1": scores.planes.object_f1,
        "object_f1_3d": scores.object_f1,
        "hit_f1": scores.hit_f1,
    }


def read_label_volume(path: Path) -> NDArray[Any]:
    """Return the (Z, Y, X) labels in `path`, 0 background.

    Raises:
        InputError: it cannot be read, or is no volume.
    """
    try:
        labels: NDArray[Any] = tifffile.imread(path)
    except (OSError, ValueError) as err:
        raise InputError(f"cannot be read ({err})", where=path, fix="give a TIFF stack") from err
    if labels.ndim != 3 or labels.dtype.kind not in "iu":
        raise InputError(
            f"has shape {labels.shape} of {labels.dtype}", where=path, fix="give a stack of whole numbers"
        )
    return labels
