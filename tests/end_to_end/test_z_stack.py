"""Nuclei of a z stack link without breaks: a real field, shifted and blurred from plane to plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from scipy import ndimage

import darcnn.runtime
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume

pytest.importorskip("starfile", reason="volumes need the extra volumes")

DATA = Path(__file__).parents[1] / "data" / "evaluate"
N_PLANES = 9
MIDDLE = N_PLANES // 2
BLUR = 0.4  # px a plane away from the middle
DRIFT = 1  # px to the right from plane to plane


FIELDS = {"u2os_212b858a66.png": 27.0, "dim_1f00080601.png": 46.0}  # and their nuclei's diameter, px


@pytest.mark.slow
def test_nuclei_of_z_stacks_link_one_to_one(tmp_path: Path) -> None:
    found = linked = 0
    with darcnn.runtime.load("nuclei-fluorescence") as segmenter:
        for name, diameter in FIELDS.items():
            truth = np.asarray(Image.open(DATA / "labels" / name))
            path = tmp_path / name.replace(".png", ".ome.tif")
            tifffile.imwrite(path, make_stack(name), metadata={"axes": "ZYX"})
            options = VolumeOptions(diameter_px=diameter)
            folder = run_volume(segmenter, path, tmp_path / "out", options=options).folder
            labels = np.asarray(zarr.open_array(folder / "labels.ome.zarr" / "0", mode="r")[:])
            for number in np.unique(truth[truth > 0]):
                columns = np.flatnonzero((truth == number).any(axis=0))
                if columns[0] < MIDDLE or columns[-1] >= truth.shape[1] - MIDDLE:
                    continue  # it leaves the field
                seen = [
                    _main_label(labels[z], np.roll(truth == number, DRIFT * (z - MIDDLE), axis=1))
                    for z in range(N_PLANES)
                ]
                if seen[MIDDLE]:
                    found += 1
                    linked += len(set(seen) - {0}) == 1  # what is missed on a plane is no break
    assert found > 10
    assert linked >= 0.95 * found


def make_stack(name: str) -> np.ndarray:
    """Return (Z, H, W): the field, moved to the right and less sharp the farther from the middle."""
    field = np.asarray(Image.open(DATA / "images" / name)).astype(np.float32)
    planes = [
        np.roll(ndimage.gaussian_filter(field, BLUR * abs(z - MIDDLE)), DRIFT * (z - MIDDLE), axis=1)
        for z in range(N_PLANES)
    ]
    return np.rint(np.stack(planes)).astype(np.uint8)


def _main_label(labels: np.ndarray, own: np.ndarray) -> int:
    """Return the label that covers more than half of an object, 0 for none."""
    counts = np.bincount(labels[own])
    counts[0] = 0
    best = int(counts.argmax())
    return best if counts[best] > 0.5 * own.sum() else 0
