"""Mistake 7, the first half: labels come from the clean image, and by the final score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from darcnn.runtime.engines.protocol import Detections
from darcnn.runtime.errors import InputError
from darcnn.runtime.instances import Instances
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.adapt.pseudo_labels import (
    drop_unstained,
    keep_one_polarity,
    label_images,
    merge_scales,
    read_labels,
)
from darcnn.training.config import Recipe, TargetSet
from darcnn.training.data.augment import turn
from darcnn.training.data.target import TargetImages
from darcnn.training.engine import TorchEngine, make_segmenter
from darcnn.training.model.network import Darcnn

InstancesOf = Callable[..., Instances]
SIDE = 128


class Script:
    """Stands in for the network: finds `boxes` (x0, y0, x1, y1, score) on each tile that is `wanted`."""

    def __init__(self) -> None:
        self.boxes: list[tuple[float, ...]] = []
        self.wanted: Callable[[np.ndarray], bool] = lambda tile: True
        self.tiles: list[np.ndarray] = []

    def detect(self, tiles: np.ndarray) -> Detections:
        boxes, scores = np.zeros((len(tiles), 256, 4), np.float32), np.zeros((len(tiles), 256), np.float32)
        for index, tile in enumerate(tiles):
            self.tiles.append(tile.copy())
            y, x = _origin(tile)
            if self.wanted(tile):
                for slot, (x0, y0, x1, y1, score) in enumerate(self.boxes):
                    boxes[index, slot] = x0 + x, y0 + y, x1 + x, y1 + y
                    scores[index, slot] = score
        return Detections(boxes, scores, np.ones(len(tiles), bool), None)


def _origin(tile: np.ndarray) -> tuple[int, int]:
    """Return the row and column at which the image begins: the first pixel with the value 255."""
    place = np.unravel_index(np.argmax(tile[..., 0]), tile.shape[:2])
    return int(place[0]), int(place[1])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """The script that runs in place of the network."""
    script = Script()
    monkeypatch.setattr(TorchEngine, "detect", lambda engine, tiles: script.detect(tiles))
    monkeypatch.setattr(
        TorchEngine,
        "masks",
        lambda engine, detections, boxes, index: np.ones((len(boxes), 28, 28), np.float32),
    )
    return script


@pytest.fixture
def targets(tmp_path: Path, recipe: Recipe) -> tuple[Recipe, TargetImages]:
    """Two images of noise below 200, each with one pixel of 255 at its first corner, taken as they are."""
    rng = np.random.default_rng(0)
    for name in ("first", "second"):
        pixels = rng.integers(0, 200, (SIDE, SIDE), dtype=np.uint8)
        pixels[0, 0] = 255
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    rule = replace(recipe.target.intensity, kind="full_range")
    target = replace(recipe.target, sets=(TargetSet("*.png"),), intensity=rule)
    changed = replace(recipe, target=target, refine_stage=replace(recipe.refine_stage, min_score=0.5))
    return changed, TargetImages(tmp_path, target, recipe.seed)


def label(
    network: Darcnn,
    targets: tuple[Recipe, TargetImages],
    folder: Path,
    *,
    resume: bool = False,
    **stage: object,
) -> dict[str, np.ndarray]:
    recipe, images = targets
    changed = replace(recipe, refine_stage=replace(recipe.refine_stage, **stage))  # type: ignore[arg-type]
    label_images(network, changed, images, folder, resume=resume)
    return read_labels(folder)


def test_labels_are_taken_from_the_clean_image(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9)]
    label(network, targets, tmp_path / "labels")
    assert len(script.tiles) == 2
    for tile, image in zip(script.tiles, targets[1].images, strict=True):
        y, x = _origin(tile)
        assert np.array_equal(tile[y : y + SIDE, x : x + SIDE], image.pixels)


def test_labels_lie_where_the_objects_are(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9), (60, 70, 90, 100, 0.8)]
    labels = label(network, targets, tmp_path / "labels")
    assert set(labels) == {"first", "second"}
    for found in labels.values():
        assert found.shape == (SIDE, SIDE)
        assert len(np.unique(found)) == 3
        assert found[35, 25] > 0
        assert found[85, 75] not in (0, found[35, 25])
        assert found[5, 5] == 0


def test_labels_are_chosen_by_the_final_score(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.51), (60, 70, 90, 100, 0.49)]
    labels = label(network, targets, tmp_path / "labels")
    assert all(found[35, 25] > 0 and found[85, 75] == 0 for found in labels.values())
    labels = label(network, targets, tmp_path / "lower", min_score=0.4)
    assert all(found[35, 25] > 0 and found[85, 75] > 0 for found in labels.values())


def test_an_image_keeps_its_best_objects(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.6), (60, 70, 90, 100, 0.9), (60, 10, 90, 40, 0.7)]
    labels = label(network, targets, tmp_path / "labels", max_objects=2)
    assert all(found[35, 25] == 0 and found[85, 75] > 0 and found[25, 75] > 0 for found in labels.values())


def test_the_limit_of_size_is_the_same_at_every_scale(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    images = targets[1]
    for number, image in enumerate(images.images):
        bright = image.pixels.copy()
        bright[:4, :4] = 255  # the first corner is still found at half the size
        images.images[number] = replace(image, pixels=bright)
    script.boxes = [(10, 10, 40, 40, 0.9)]  # network pixels: 60 px of the image at half its size
    nominal = targets[0].target.nominal_diameter_px
    (kept, *_) = label(network, targets, tmp_path / "a", scales=(0.5,), max_diameters=70 / nominal).values()
    assert kept.max() == 1
    with pytest.raises(InputError, match="no object"):
        label(network, targets, tmp_path / "b", scales=(0.5,), max_diameters=40 / nominal)


def test_labels_are_cut_into_tiles_as_large_as_the_objects_need(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9)]
    recipe, images = targets
    large = replace(recipe, export=replace(recipe.export, tile_px=704))
    label_images(network, large, images, tmp_path / "labels", resume=False)
    assert script.tiles[0].shape[:2] == (704, 704)


def test_images_without_an_object_are_left_out(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9)]
    script.wanted = lambda tile: len(script.tiles) == 1
    labels = label(network, targets, tmp_path / "labels")
    assert set(labels) == {"first"}
    drawn = [targets[1].tile(np.random.default_rng(seed), 64, labels) for seed in range(20)]
    assert all(len(tile.masks) for tile in drawn)


def test_finding_nothing_at_all_is_an_error_that_says_what_to_do(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="min_score"):
        label(network, targets, tmp_path / "labels")


def test_resuming_takes_finished_labels_as_they_are(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9)]
    first = label(network, targets, tmp_path / "labels")
    script.boxes = [(0, 0, 9, 9, 0.9)]
    again = label(network, targets, tmp_path / "labels", resume=True)
    assert len(script.tiles) == 2
    assert all(np.array_equal(again[name], first[name]) for name in first)


def test_each_scale_shows_the_image_at_its_size(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9)]
    label(network, targets, tmp_path / "labels", scales=(1.0, 2.0))
    assert len(script.tiles) == 4
    # noise is smoother where it is enlarged
    rough = [np.abs(np.diff(tile[..., 0].astype(float), axis=1)).mean() for tile in script.tiles]
    assert rough[0] > 1.3 * rough[1]
    assert rough[2] > 1.3 * rough[3]


def test_labels_are_what_the_segmenter_finds(
    network: Darcnn, data: Path, recipe: Recipe, tmp_path: Path
) -> None:
    target = replace(recipe.target, sets=(TargetSet("target/u2os_1*.png", diameter_px=30.0),))
    images = TargetImages(data, target, recipe.seed)
    label_images(network, replace(recipe, target=target), images, tmp_path, resume=False)
    (labels,) = read_labels(tmp_path).values()
    with make_segmenter(network, target, min_score=0.0) as segmenter:
        found = segmenter(images.images[0].pixels, diameter_px=30.0)
    assert len(found) > 0
    assert np.array_equal(labels > 0, found.labels() > 0)


def squares(*corners: tuple[int, int]) -> np.ndarray:
    labels = np.zeros((64, 64), np.int32)
    for number, (x, y) in enumerate(corners, start=1):
        labels[y : y + 10, x : x + 10] = number
    return labels


def test_merging_scales_keeps_the_better_of_two_findings_of_one_object(instances_of: InstancesOf) -> None:
    fine = instances_of(squares((5, 5), (40, 40)), [0.6, 0.8])
    coarse = instances_of(squares((7, 6), (20, 40)), [0.9, 0.5])
    merged = merge_scales([fine, coarse])
    kept = {
        (float(box[0]), float(box[1]), round(float(s), 1))
        for box, s in zip(merged.boxes, merged.scores, strict=True)
    }
    assert kept == {(7.0, 6.0, 0.9), (40.0, 40.0, 0.8), (20.0, 40.0, 0.5)}


def test_merging_one_finding_with_nothing_keeps_it(instances_of: InstancesOf) -> None:
    one, none = instances_of(squares((5, 5))), instances_of(squares())
    for parts in ([one, none], [none, one]):
        merged = merge_scales(parts)
        assert np.array_equal(merged.boxes, one.boxes)
        assert np.array_equal(merged.labels(), one.labels())
    assert len(merge_scales([none, none])) == 0


def test_objects_of_one_scale_that_touch_are_kept(instances_of: InstancesOf) -> None:
    touching = instances_of(squares((5, 5), (15, 5), (5, 15)))
    assert len(merge_scales([touching, instances_of(squares())])) == 3


def two_polarities(*, bright: int, dark: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, (96, 96, 1), of squares brighter and darker than around them, and its labels."""
    image, labels = np.full((96, 96, 1), 100, np.uint8), np.zeros((96, 96), np.int32)
    for number in range(bright + dark):
        y, x = 4 + 18 * (number // 5), 4 + 18 * (number % 5)
        labels[y : y + 10, x : x + 10] = number + 1
        image[y : y + 10, x : x + 10] = 200 if number < bright else 20
    return image, labels


@pytest.mark.parametrize(("bright", "dark"), [(5, 2), (2, 5), (4, 0), (0, 4)])
def test_findings_of_the_rarer_polarity_are_dropped(
    instances_of: InstancesOf, bright: int, dark: int
) -> None:
    image, labels = two_polarities(bright=bright, dark=dark)
    found = instances_of(labels, [0.8] * (bright + dark))
    (kept,) = keep_one_polarity([image], [found])
    assert len(kept) == max(bright, dark)
    levels = {int(image[labels == row + 1][0, 0]) for row in range(bright + dark)}
    left = {int(image[int(box[1]), int(box[0]), 0]) for box in kept.boxes}
    assert left == ({200} if bright > dark else {20}) & levels


def test_polarity_is_decided_by_all_images_and_by_score(instances_of: InstancesOf) -> None:
    images, labels = zip(*(two_polarities(bright=b, dark=d) for b, d in ((4, 1), (1, 2))), strict=True)
    found = [instances_of(one, [0.6] * len(np.unique(one)[1:])) for one in labels]
    assert [len(one) for one in keep_one_polarity(list(images), found)] == [4, 1]
    sure = [instances_of(labels[0], [0.1] * 4 + [0.9]), instances_of(labels[1], [0.1, 0.9, 0.9])]
    assert [len(one) for one in keep_one_polarity(list(images), sure)] == [1, 2]


def test_faint_findings_are_dropped_with_the_rarer_polarity(instances_of: InstancesOf) -> None:
    image, labels = two_polarities(bright=5, dark=0)
    image[labels == 5] = 105  # of a contrast that is a twentieth of the others'
    (kept,) = keep_one_polarity([image], [instances_of(labels)])
    assert len(kept) == 4


def test_what_others_surround_is_kept_whatever_the_polarity(instances_of: InstancesOf) -> None:
    labels = np.kron(np.arange(1, 26).reshape(5, 5), np.ones((12, 12), int))  # cells side by side, no ground
    image = np.random.default_rng(0).integers(90, 110, (60, 60, 3)).astype(np.uint8)
    found = instances_of(labels)
    assert [len(one) for one in keep_one_polarity([image], [found])] == [25]
    (kept,), (pale,) = drop_unstained([image], [found], 0.5)
    assert len(kept) == 25
    assert not pale.any()


def test_images_without_findings_have_no_polarity(instances_of: InstancesOf) -> None:
    image, labels = two_polarities(bright=3, dark=0)
    none = instances_of(np.zeros_like(labels))
    assert [len(one) for one in keep_one_polarity([image, image], [none, instances_of(labels)])] == [0, 3]
    assert [len(one) for one in keep_one_polarity([image], [none])] == [0]


PINK = (225, 140, 180)
COLOURS = {
    "haematoxylin": (90, 70, 140),
    "pale haematoxylin": (176, 120, 180),
    "DAB": (95, 60, 40),
    "eosin": (222, 80, 130),  # as dark as nuclei to the eye, but not in red light
    "glass": (245, 243, 245),
}


def stained(*kinds: str) -> tuple[np.ndarray, np.ndarray]:
    """Return pink tissue, (96, 96, 3), with a square of each of these colours, and its labels."""
    corners = [(4 + 18 * (n % 5), 4 + 18 * (n // 5)) for n in range(len(kinds))]
    labels = squares(*corners)
    image = np.full((*labels.shape, 3), PINK, np.uint8)
    for number, kind in enumerate(kinds, start=1):
        image[labels == number] = COLOURS[kind]
    return image, labels


@pytest.mark.parametrize("nucleus", ["haematoxylin", "DAB"])
@pytest.mark.parametrize("other", ["eosin", "glass"])
def test_what_holds_no_stain_is_dropped(instances_of: InstancesOf, nucleus: str, other: str) -> None:
    image, labels = stained(nucleus, nucleus, nucleus, other)
    (kept,), (pale,) = drop_unstained([image], [instances_of(labels)], 0.5)
    assert np.array_equal(kept.labels() > 0, (labels > 0) & (labels < 4))
    assert not pale.any()


def test_what_holds_little_stain_is_pale_and_stays(instances_of: InstancesOf) -> None:
    image, labels = stained("haematoxylin", "haematoxylin", "haematoxylin", "pale haematoxylin")
    (kept,), (pale,) = drop_unstained([image], [instances_of(labels)], 0.5)
    assert len(kept) == len(pale) == 4
    assert pale.tolist() == [False, False, False, True]


def test_stain_is_told_image_by_image_and_of_no_findings(instances_of: InstancesOf) -> None:
    weak, labels = stained("pale haematoxylin", "pale haematoxylin")
    nothing = np.zeros_like(labels)
    kept, pale = drop_unstained([weak, weak], [instances_of(labels), instances_of(nothing)], 0.5)
    assert [len(one) for one in kept] == [len(one) for one in pale] == [2, 0]
    assert not pale[0].any()


def test_pale_findings_teach_nothing_even_in_the_last_round(
    network: Darcnn, script: Script, recipe: Recipe, tmp_path: Path
) -> None:
    pixels = np.full((SIDE, SIDE, 3), PINK, np.uint8)
    corners = ("haematoxylin", 10), ("haematoxylin", 45), ("pale haematoxylin", 80)
    for kind, x in corners:
        pixels[20:50, x : x + 25] = COLOURS[kind]
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "tissue.png")
    rule = replace(recipe.target.intensity, kind="full_range")
    target = replace(recipe.target, sets=(TargetSet("*.png"),), intensity=rule, channels=3)
    stage = replace(recipe.refine_stage, min_stain=0.5, min_score=0.5, doubt_score=0.2)
    images = TargetImages(tmp_path, target, recipe.seed)
    script.boxes = [(x, 20, x + 25, 50, 0.9) for _, x in corners]
    for keeps_doubt in (True, False):
        changed = replace(recipe, target=target, refine_stage=stage)
        folder = tmp_path / f"labels-{keeps_doubt}"
        label_images(network, changed, images, folder, resume=False, keeps_doubt=keeps_doubt)
        labels = read_labels(folder)["tissue"]
        assert [int(np.sign(labels[35, x + 12])) for _, x in corners] == [1, 1, -1]


@pytest.mark.parametrize("resume", [False, True])
def test_labels_of_an_earlier_try_do_not_stay(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path, resume: bool
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9), (60, 70, 90, 100, 0.6)]
    first = label(network, targets, tmp_path / "labels")
    (tmp_path / "labels" / "third.png").write_bytes((tmp_path / "labels" / "first.png").read_bytes())
    second = label(network, targets, tmp_path / "labels", resume=resume, min_score=0.8)
    assert set(second) == {"first", "second"}
    assert all(first[name][85, 75] > 0 and second[name][85, 75] == 0 for name in second)


def test_the_intensity_rule_is_applied_once(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(1000, 4900, (SIDE, SIDE)).astype(np.uint16)
    pixels[0, 0] = 5000
    Image.fromarray(pixels).save(folder / "a.png")
    recipe = targets[0]
    rule = IntensityRule("range", 1000.0, 5000.0)
    target = replace(recipe.target, intensity=rule, sets=(TargetSet("*.png"),))
    images = TargetImages(folder, target, recipe.seed)
    script.boxes = [(10, 20, 40, 50, 0.9)]
    label(network, (replace(recipe, target=target), images), tmp_path / "labels")
    tile = script.tiles[0]
    y, x = _origin(tile)
    assert np.array_equal(tile[y : y + SIDE, x : x + SIDE], images.images[0].pixels)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_separate_channels_are_labelled_by_all_means(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path, channels: int
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 60, (channels, SIDE, SIDE)).astype(np.uint8)
    pixels[-1, 18:48, 8:42] = 200  # shows in the last channel only, larger than it is found
    pixels[:, 0, 0] = 255
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "CYX"}, photometric="minisblack")
    recipe = targets[0]
    target = replace(recipe.target, channels=channels, sets=(TargetSet("*.tif"),))
    images = TargetImages(tmp_path, target, recipe.seed)
    script.boxes = [(10, 20, 40, 46, 0.9)]
    changed = (replace(recipe, target=target), images)
    options = {"fit_masks": True, "polarity": "one", "scales": (1.0, 2.0)}
    (labels,) = label(network, changed, tmp_path / "labels", **options).values()
    assert {tile.shape[2] for tile in script.tiles} == {channels}
    y, x = _origin(script.tiles[0])
    assert np.array_equal(script.tiles[0][y : y + SIDE, x : x + SIDE], images.images[0].pixels)
    shown, found = pixels[-1] > 100, labels > 0
    shown[0, 0] = False
    assert (shown & found).sum() / (shown | found).sum() > 0.9


def test_findings_between_doubt_and_z_are_kept_apart(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9), (60, 70, 90, 100, 0.3), (60, 10, 90, 40, 0.1)]
    labels = label(network, targets, tmp_path / "labels", doubt_score=0.2)
    for found in labels.values():
        assert found[35, 25] > 0
        assert found[85, 75] < 0
        assert found[25, 75] == 0
    assert not (label(network, targets, tmp_path / "plain")["first"] < 0).any()


def test_a_tile_carries_its_doubtful_parts_along_when_it_turns(
    network: Darcnn, script: Script, targets: tuple[Recipe, TargetImages], tmp_path: Path
) -> None:
    script.boxes = [(10, 20, 40, 50, 0.9), (60, 70, 90, 100, 0.3)]
    labels = label(network, targets, tmp_path / "labels", doubt_score=0.2)
    for seed in range(4):
        tile = targets[1].tile(np.random.default_rng(seed), 64, labels)
        marked = replace(
            tile, image=np.repeat((tile.doubtful.any(axis=0) * 255)[..., None], 3, 2).astype("u1")
        )
        turned = turn(marked, np.random.default_rng(seed))
        assert np.array_equal(turned.image[..., 0] > 0, turned.doubtful.any(axis=0))
