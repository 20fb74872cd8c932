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

DATA = Path(__file__).parents[1] / "data"
N_PLANES = 9
MIDDLE = N_PLANES // 2
BLUR = 0.4  # px a plane away from the middle
DRIFT = 1  # px to the right from plane to plane


FIELDS = {  # and their nuclei's diameter, px
    "evaluate/images/u2os_212b858a66.png": 27.0,
    "evaluate/images/dim_1f00080601.png": 46.0,
    "target/dim_1609b1b848.png": 50.0,
    "target/small_0acd2c223d.png": 18.0,
    "target/u2os_1f6b7cead1.png": 32.0,
    "target/u2os_2abc40c118.png": 24.0,
}


@pytest.mark.slow
def test_nuclei_of_z_stacks_link_one_to_one(tmp_path: Path) -> None:
    found = linked = 0
    with darcnn.runtime.load("nuclei-fluorescence") as segmenter:
        for name, diameter in FIELDS.items():
            stack = make_stack(name)
            # linking is asked, not the model: what it sees on the sharpest plane goes through all others
            middle = segmenter(stack[MIDDLE], diameter_px=diameter).labels()
            path = tmp_path / Path(name).with_suffix(".ome.tif").name
            tifffile.imwrite(path, stack, metadata={"axes": "ZYX"})
            options = VolumeOptions(diameter_px=diameter)
            folder = run_volume(segmenter, path, tmp_path / "out", options=options).folder
            labels = np.asarray(zarr.open_array(folder / "labels.ome.zarr" / "0", mode="r")[:])
            for number in np.unique(middle[middle > 0]):
                columns = np.flatnonzero((middle == number).any(axis=0))
                if columns[0] < MIDDLE or columns[-1] >= middle.shape[1] - MIDDLE:
                    continue  # it leaves the field
                seen = [
                    _main_label(labels[z], np.roll(middle == number, DRIFT * (z - MIDDLE), axis=1))
                    for z in range(N_PLANES)
                ]
                if seen[MIDDLE]:
                    found += 1
                    linked += len(set(seen) - {0}) == 1  # what is missed on a plane is no break
    assert found > 20
    assert linked >= 0.95 * found


def make_stack(name: str) -> np.ndarray:
    """Return (Z, H, W): the field, moved to the right and less sharp the farther from the middle."""
    field = np.asarray(Image.open(DATA / name)).astype(np.float32)
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
