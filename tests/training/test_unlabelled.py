"""Figures without labels: they fall where findings do not hold, and rank what a truth would rank."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.load import load
from darcnn.runtime.readers import open_source
from darcnn.training.unlabelled import Trust, as_table, judge_folder, judge_image, separation_of, write_csv

NUCLEI = Path(__file__).parents[1] / "data/target/u2os_2abc40c118.png"
TISSUE = next((Path(__file__).parents[1] / "data/tissue").glob("*.png"))
FAST = settings(deadline=None, max_examples=50)


def halves(inside: list[float], outside: list[float]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([*inside, *outside])[None, :, None]
    return values, np.arange(values.shape[1])[None] < len(inside)


@pytest.mark.parametrize(
    ("inside", "outside", "wanted"),
    [
        ([5, 6], [1, 2, 3], 1.0),
        ([1, 2], [5, 6, 7], 1.0),  # dark objects tell as well as bright ones
        ([1, 2], [1, 2], 0.0),
        ([4, 4], [4, 4], 0.0),
        ([2, 4], [1, 3], 0.5),  # three of four pairs in order
        ([], [1, 2], 0.0),
        ([1, 2], [], 0.0),
        ([5, 6, np.nan], [1, 2, -np.inf, np.nan], 1.0),  # what has no value tells nothing
    ],
)
def test_separation_is_two_auc_minus_one(inside: list[float], outside: list[float], wanted: float) -> None:
    assert separation_of(*halves(inside, outside)) == pytest.approx(wanted)


@FAST
@given(st.lists(st.integers(0, 255), min_size=1), st.lists(st.integers(0, 255), min_size=1))
def test_separation_does_not_hang_on_gain_or_polarity(inside: list[int], outside: list[int]) -> None:
    image, is_object = halves(list(map(float, inside)), list(map(float, outside)))
    plain = separation_of(image, is_object)
    assert 0.0 <= plain <= 1.0
    assert separation_of(255.0 - image, is_object) == pytest.approx(plain)
    assert separation_of(8.0 * image + 3.0, is_object) == pytest.approx(plain)


def test_of_several_channels_the_one_that_tells_counts() -> None:
    rng = np.random.default_rng(0)
    is_object = rng.random((40, 40)) < 0.3
    image = rng.normal(0.0, 20.0, (40, 40, 3))
    image[..., 1] = rng.normal(0.0, 1.0, (40, 40)) + 8.0 * is_object
    assert separation_of(image, is_object) > 0.99
    assert separation_of(image[..., :1], is_object) < 0.2


def test_a_wrong_scale_is_trusted_less(data: Path) -> None:
    image = data / "target" / "u2os_1f6b7cead1.png"
    with load("nuclei-fluorescence") as segmenter, open_source(image) as reader:
        right, large, small = (
            judge_image(segmenter, reader, diameter_px=size) for size in (27.0, 110.0, 7.0)
        )
    assert right.n_objects > 3
    assert right.trust > 0.6
    assert right.trust > max(large.trust, small.trust) + 0.1


def test_an_image_of_nothing_has_no_trust(tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).normal(20.0, 1.0, (96, 96)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    with load("nuclei-fluorescence", min_score=0.999) as segmenter:
        (only,) = judge_folder(tmp_path, segmenter, pixels=True).values()
    assert only.trust == 0.0


@pytest.mark.slow
def test_the_benchmark_compares_rankings(data: Path, root: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(root / "benchmarks" / "unlabelled.py"))
    arguments = ["nuclei-fluorescence", "--folder", str(data / "evaluate"), "--out", str(tmp_path / "f.json")]
    result = CliRunner().invoke(script["main"], arguments, catch_exceptions=False)
    assert "AJI at the scale that trust chooses" in result.output
    figures = json.loads((tmp_path / "f.json").read_text())
    assert len(figures["means"][0]) == len(figures["factors"])
    aji, trust = np.array(figures["means"])[0, :, :2].T
    right = figures["factors"].index(1.0)
    assert trust[right] > max(trust[0], trust[-1])  # half and double the size of the nuclei
    assert 0.0 < aji[right] < 1.0


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with load("nuclei-fluorescence") as segmenter, pytest.raises(InputError, match="no images"):
        judge_folder(tmp_path, segmenter)


def test_a_volume_is_judged_by_its_middle_plane(tmp_path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile", reason="volumes need the extra volumes")
    picture = np.asarray(Image.open(NUCLEI).convert("L"))[:200, :200]
    with mrcfile.new(tmp_path / "a.mrc") as file:
        file.set_data(np.stack([np.zeros_like(picture), picture, np.zeros_like(picture)]).astype(np.float32))
    Image.fromarray(picture).save(tmp_path / "b.png")
    with load("nuclei-fluorescence") as segmenter:
        found = judge_folder(tmp_path, segmenter, diameter_px=25.0)
    assert found["a.mrc"].n_objects == found["b.png"].n_objects > 3
    assert found["a.mrc"].trust == pytest.approx(found["b.png"].trust, abs=0.05)


def test_a_stack_of_bytes_is_judged_by_models_of_whole_ranges(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    with Image.open(TISSUE) as picture:
        grey = np.asarray(picture.convert("L"))[:200, :200]
    tifffile.imwrite(tmp_path / "s.tif", np.stack([grey] * 5), photometric="minisblack")
    with load("nuclei-he") as segmenter:
        assert judge_folder(tmp_path, segmenter, diameter_px=20.0)["s.tif"].n_objects > 3
        with pytest.raises(UsageError, match="--mpp"):
            judge_folder(tmp_path, segmenter, mpp=0.3)


def test_table_and_csv_say_the_same(tmp_path: Path) -> None:
    figures = {"a.png": Trust(0.64, 1.0, 3), "b.png": Trust(0.0, 0.5, 0)}
    table = as_table(figures)
    assert table["all 2, mean"] == pytest.approx(
        {"trust": (0.32 * 0.75) ** 0.5, "agreement": 0.32, "separation": 0.75}
    )
    write_csv(figures, tmp_path / "figures.csv")
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trust"] for row in rows] == ["0.8000", "0.0000"]
    assert [row["objects"] for row in rows] == ["3", "0"]
