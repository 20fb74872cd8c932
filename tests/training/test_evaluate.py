"""Evaluation: a perfect segmenter scores 1, and a folder that cannot be scored says why."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from darcnn.runtime.errors import InputError
from darcnn.runtime.instances import Instances
from darcnn.runtime.metrics import score_labels
from darcnn.runtime.readers import Reader
from darcnn.training.evaluate import evaluate_folder, kinds, labelled_images

InstancesOf = Callable[..., Instances]
Segment = Callable[[Reader], Instances]


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    """A copy of the labelled folder, to be spoiled."""
    return shutil.copytree(data / "evaluate", tmp_path / "evaluate")


@pytest.fixture
def perfect(data: Path, instances_of: InstancesOf) -> Segment:
    """A segmenter that knows the answer."""

    def segment(reader: Reader) -> Instances:
        with Image.open(data / "evaluate" / "labels" / f"{reader.info.name}.png") as picture:
            return instances_of(np.asarray(picture).astype(np.int32))

    return segment


def nothing(reader: Reader) -> Instances:
    return Instances.empty((reader.info.height_px0, reader.info.width_px0))


def test_a_perfect_segmenter_scores_one(data: Path, perfect: Segment) -> None:
    result = evaluate_folder(data / "evaluate", perfect)
    assert result.names == ("dim_1f00080601", "u2os_212b858a66")
    for scores in (*result.scores, result.mean, result.pooled):
        assert (scores.aji, scores.pixel_f1, scores.object_f1, scores.max_iou) == (1.0, 1.0, 1.0, 1.0)


def test_images_of_one_file_have_labels_each(folder: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    for name in ("images", "labels"):
        (several / name).mkdir(parents=True)
    with tifffile.TiffWriter(several / "images" / "plate.tif", ome=True) as file:
        for number, image in enumerate(sorted((folder / "images").iterdir())):
            with Image.open(image) as picture:
                file.write(np.asarray(picture.convert("L")), metadata={"axes": "YX"})
            shutil.copy(folder / "labels" / image.name, several / "labels" / f"plate-{number}.png")
    pairs = [(image.name, label.name) for image, label in labelled_images(several)]
    assert pairs == [("0", "plate-0.png"), ("1", "plate-1.png")]
    assert evaluate_folder(several, nothing).names == ("plate-0", "plate-1")


def test_a_segmenter_that_finds_nothing_scores_zero(data: Path) -> None:
    result = evaluate_folder(data / "evaluate", nothing)
    for scores in (result.mean, result.pooled):
        assert (scores.aji, scores.pixel_f1, scores.object_f1, scores.max_iou) == (0.0, 0.0, 0.0, 0.0)


def test_mean_is_over_images_and_pooled_over_objects(data: Path, perfect: Segment) -> None:
    def half(reader: Reader) -> Instances:
        return perfect(reader) if reader.info.name.startswith("dim_") else nothing(reader)

    result = evaluate_folder(data / "evaluate", half)
    assert result.mean.object_f1 == pytest.approx(0.5)
    n_dim, n_u2os = (
        s.counts.true_positives + s.counts.false_negatives
        for s in evaluate_folder(data / "evaluate", perfect).scores
    )
    assert result.pooled.object_f1 == pytest.approx(2 * n_dim / (2 * n_dim + n_u2os))


def test_findings_are_held_against_the_truth_and_not_the_other_way_round(
    data: Path, perfect: Segment, instances_of: InstancesOf
) -> None:
    pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def two_as_one(reader: Reader) -> Instances:
        truth = perfect(reader).labels()
        pairs.append((truth, np.isin(truth, (1, 2)).astype(np.int32)))
        return instances_of(pairs[-1][1])

    result = evaluate_folder(data / "evaluate", two_as_one)
    assert [scores.aji for scores in result.scores] == [score_labels(*pair).aji for pair in pairs]


def test_kinds_of_a_mixed_folder_are_scored_apart(data: Path, perfect: Segment) -> None:
    result = evaluate_folder(data / "evaluate", perfect)
    assert list(kinds(result.names)) == ["dim_", "u2os_"]
    assert result.of_kind("dim_").names == ("dim_1f00080601",)
    assert list(kinds(("u2os_1", "u2os_2"))) == []
    assert list(kinds(("a", "b"))) == []


def test_an_image_without_labels_is_named(folder: Path, perfect: Segment) -> None:
    (folder / "labels" / "u2os_212b858a66.png").unlink()
    with pytest.raises(InputError, match=r"u2os_212b858a66\.png: no label image"):
        evaluate_folder(folder, perfect)


@pytest.mark.parametrize("content", ["nothing", "empty images"])
def test_a_folder_without_images_is_refused(tmp_path: Path, content: str) -> None:
    if content == "empty images":
        (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match="no images"):
        labelled_images(tmp_path)


def test_labels_of_another_size_are_refused(folder: Path, perfect: Segment) -> None:
    path = folder / "labels" / "dim_1f00080601.png"
    Image.fromarray(np.zeros((100, 128), np.uint16)).save(path)
    with pytest.raises(InputError, match="match the sizes") as caught:
        evaluate_folder(folder, perfect)
    assert str(path) in str(caught.value)


def test_labels_that_are_no_picture_are_refused(folder: Path, perfect: Segment) -> None:
    (folder / "labels" / "dim_1f00080601.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="16-bit PNG"):
        evaluate_folder(folder, perfect)


def test_an_image_that_is_no_picture_is_refused(folder: Path, perfect: Segment) -> None:
    (folder / "images" / "dim_1f00080601.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="dim_1f00080601"):
        evaluate_folder(folder, perfect)


def test_two_images_of_one_name_are_refused(folder: Path) -> None:
    image = next((folder / "images").iterdir())
    with Image.open(image) as picture:
        picture.convert("L").save(image.with_suffix(".jpg"))
    (image.parent / f"._{image.name}").touch()  # macOS
    with pytest.raises(InputError, match=r"has the same name as .*rename one of them"):
        labelled_images(folder)
