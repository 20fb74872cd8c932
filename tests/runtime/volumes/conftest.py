"""Volumes whose objects are known, and a model that reads them off the planes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.segmenter import Segmenter

HALO_PX = 16


def make_balls(shape: tuple[int, int, int], n: int, seed: int = 0) -> np.ndarray:
    """Return (Z, Y, X) uint8 labels of balls 5 to 9 voxels wide that do not touch, numbered 1.. n."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*(np.arange(k) for k in shape), indexing="ij"))
    number = 0
    while number < n:
        radius = random.uniform(2.5, 4.5)
        centre = random.uniform(-1, np.array(shape))
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(axis=0))
        if (distance <= radius).sum() > 30 and not labels[distance <= radius + 2.0].any():
            number += 1
            labels[distance <= radius] = number
    return labels


@pytest.fixture
def balls() -> np.ndarray:
    return make_balls((20, 70, 60), 25)


@pytest.fixture
def oracle() -> Iterator[Segmenter]:
    engine = OracleEngine(tile_px=64, channels=1)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=HALO_PX)) as segmenter:
        yield segmenter


@pytest.fixture
def mrc_file(tmp_path: Path, balls: np.ndarray) -> Path:
    mrcfile = pytest.importorskip("mrcfile", reason="MRC files need the extra volumes")
    path = tmp_path / "balls.mrc"
    with mrcfile.new(path) as file:
        file.set_data(balls.astype(np.uint16))  # mode 6
        file.voxel_size = 12.0
    return path


@pytest.fixture
def oracle16(oracle: Segmenter) -> Segmenter:
    """Return the oracle for 16-bit files that hold bytes."""
    manifest = oracle.manifest
    rule = IntensityRule("range", 0.0, 255.0)
    return Segmenter(oracle.engine, replace(manifest, input=replace(manifest.input, intensity=rule)))
