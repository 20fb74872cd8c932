"""Volumes are scored on the path that ships: an oracle is perfect, and a shifted truth is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.errors import InputError
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.metrics import score_volume
from darcnn.training.evaluate_volumes import as_rows, by_volume, evaluate_volumes, labelled_volumes


@pytest.fixture
def truth() -> np.ndarray:
    labels = np.zeros((9, 60, 50), np.uint8)
    for number, (z, y, x) in enumerate([(1, 2, 3), (2, 20, 30), (4, 40, 8)], start=1):
        labels[z : z + 4, y : y + 6, x : x + 7] = number
    return labels


@pytest.fixture
def folder(tmp_path: Path, truth: np.ndarray) -> Path:
    mrcfile = pytest.importorskip("mrcfile", reason="volumes need the extra volumes")
    for name in ("volumes", "labels"):
        (tmp_path / name).mkdir()
    tifffile.imwrite(tmp_path / "volumes" / "a.tif", truth, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "labels" / "a.tif", truth)
    with mrcfile.new(tmp_path / "volumes" / "b.mrc") as file:
        file.set_data(truth.astype(np.int8))
    tifffile.imwrite(tmp_path / "labels" / "b.tif", np.roll(truth, 4, axis=1))
    return tmp_path


def test_the_oracle_is_perfect_and_a_shifted_truth_is_not(folder: Path) -> None:
    engine = OracleEngine(tile_px=64, channels=1)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=16)) as segmenter:
        (folder / "volumes" / "b.mrc").rename(folder / "b.mrc")
        figures = evaluate_volumes(folder, segmenter)
    scores = figures["a.tif"]
    assert (scores.planes.aji, scores.object_f1, scores.hit_f1) == (1.0, 1.0, 1.0)
    assert (scores.n_true, scores.n_found) == (3, 3)
    rows = as_rows(figures)
    assert rows["all 1, mean"] == rows["a.tif"]
    assert by_volume(figures) == {"a.tif": rows["a.tif"]}


def test_figures_of_a_shifted_volume_are_those_worked_out_by_hand(truth: np.ndarray) -> None:
    moved = np.roll(truth, 2, axis=1)  # 4 of 6 rows are common: IoU 4 / 8
    scores = score_volume(truth, moved)
    assert (scores.object_f1, scores.hit_f1) == (1.0, 1.0)
    assert scores.planes.pixel_f1 == pytest.approx((2 * 4 / 12 * 7 + 2) / 9)  # two of nine planes are empty
    moved = np.roll(truth, 4, axis=1)  # IoU 2 / 10, and the centroid lies beyond
    scores = score_volume(truth, moved)
    assert (scores.object_f1, scores.hit_f1) == (0.0, 0.0)


def test_a_hit_counts_once(truth: np.ndarray) -> None:
    halves = truth.copy()
    halves[:, :, 6:10][halves[:, :, 6:10] == 1] = 9  # object 1 in two pieces, both inside it
    scores = score_volume(truth, halves)
    assert scores.hit_f1 == pytest.approx(2 * 3 / (3 + 4))
    assert score_volume(truth, np.zeros_like(truth)).hit_f1 == 0.0
    assert score_volume(np.zeros_like(truth), np.zeros_like(truth)).hit_f1 == 1.0


def test_a_volume_without_labels_is_named(folder: Path) -> None:
    (folder / "labels" / "b.tif").unlink()
    engine = OracleEngine(tile_px=64, channels=1)
    with (
        Segmenter(engine, make_oracle_manifest(engine, halo_px=16)) as segmenter,
        pytest.raises(InputError, match=r"b\.tif: no label volume"),
    ):
        evaluate_volumes(folder, segmenter)


def test_volumes_are_known_by_their_names_up_to_the_ending(folder: Path, truth: np.ndarray) -> None:
    """Dates have dots too; what systems leave in folders is no volume."""
    for place in ("volumes", "labels"):
        for path in (folder / place).iterdir():
            path.unlink()
    for name in ("2024.03.01_a", "2024.05.02_b"):
        tifffile.imwrite(folder / "volumes" / f"{name}.ome.tif", truth, metadata={"axes": "ZYX"})
        tifffile.imwrite(folder / "labels" / f"{name}.tif", truth)
    for name in ("Thumbs.db", ".DS_Store", "._2024.03.01_a.ome.tif", "README.md"):
        (folder / "volumes" / name).touch()
    pairs = labelled_volumes(folder)
    assert [label.stem for _, label in pairs] == ["2024.03.01_a", "2024.05.02_b"]
    (folder / "volumes" / "2024.03.01_a.mrc.gz").touch()
    with pytest.raises(InputError, match=r"same name as 2024.03.01_a.mrc.gz, and so the same labels"):
        labelled_volumes(folder)
