"""Images with label maps as a source: crops keep image and masks together, misfits are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.errors import InputError
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.config import Recipe, Source
from darcnn.training.data.batches import make_source_tile, random_generator
from darcnn.training.data.label_maps import LabelMapSource, open_labelled_source, read_label_map
from darcnn.training.data.source import PhotographSource
from darcnn.training.run import Run
from darcnn.training.stages import run_source

FAST = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
Disc = Callable[..., np.ndarray]
SOURCE = Source("images", labels="labels", diameter_px=(20.0, 60.0))
SIZE = 160


def write(folder: Path, name: str, picture: np.ndarray, labels: np.ndarray | None) -> None:
    (folder / "images").mkdir(exist_ok=True)
    (folder / "labels").mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / "images" / f"{name}.png")
    if labels is not None:
        Image.fromarray(labels.astype(np.uint16)).save(folder / "labels" / f"{name}.png")


def refusal(folder: Path, source: Source = SOURCE, tile_px: int = 64) -> str:
    with pytest.raises(InputError) as caught:
        open_labelled_source(folder, source, tile_px=tile_px)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def discs(tmp_path: Path, disc: Disc) -> Path:
    """One grey image with three bright objects, numbers 1, 7 and 300; 300 needs 16 bits."""
    labels = np.zeros((SIZE, SIZE), np.int32)
    for number, x, y, radius in ((1, 40, 40, 20), (7, 110, 50, 15), (300, 80, 115, 25)):
        labels[disc(SIZE, x, y, radius)] = number
    write(tmp_path, "a", np.where(labels > 0, np.uint8(200), np.uint8(20)), labels)
    return tmp_path


@FAST
@given(seeds)
def test_masks_are_cropped_with_their_image_and_stay_apart(discs: Path, seed: int) -> None:
    source = LabelMapSource(discs, SOURCE)
    tile = source.tile(np.random.default_rng(seed), 64)
    assert tile.image.shape == (64, 64, 3)
    assert tile.masks.shape[1:] == (64, 64)
    assert len(tile.masks) >= 1
    assert tile.masks.any(axis=(1, 2)).all()
    assert tile.masks.sum(axis=0).max() <= 1
    assert (tile.image[tile.masks.any(axis=0)] > 107).all()  # half way from 20 to 200, less rounding


@FAST
@given(seeds, st.sampled_from([30.0, 45.0]))
def test_objects_come_to_the_size_that_is_ordered(discs: Path, seed: int, diameter_px: float) -> None:
    source = LabelMapSource(discs, replace(SOURCE, diameter_px=(diameter_px, diameter_px)))
    tile = source.tile(np.random.default_rng(seed), 96)
    whole = [m for m in tile.masks if not (m[[0, -1]].any() or m[:, [0, -1]].any())]
    sizes = [2 * math.sqrt(mask.sum() / math.pi) for mask in whole]
    ratios = [size / diameter_px for size in sizes]  # one object is the one chosen; they are as 15 : 20 : 25
    assert all(15 / 25 - 0.1 < ratio < 25 / 15 + 0.1 for ratio in ratios)


def test_an_image_smaller_than_its_crop_is_enlarged_not_padded(discs: Path) -> None:
    source = LabelMapSource(discs, replace(SOURCE, diameter_px=(5.0, 5.0)))
    tile = source.tile(np.random.default_rng(0), 256)
    assert len(tile.masks) == 3
    assert tile.masks.sum() == pytest.approx(math.pi * (20**2 + 15**2 + 25**2) * (256 / SIZE) ** 2, rel=0.03)
    assert set(np.unique(tile.image[:, [0, -1]])) == {20}


def test_cutouts_are_the_objects_that_are_large_and_whole(discs: Path, disc: Disc) -> None:
    cutouts = LabelMapSource(discs, SOURCE).cutouts()
    assert [c.mask.sum() for c in cutouts] == [disc(SIZE, 40, 40, 20).sum(), disc(SIZE, 110, 50, 15).sum(),
                                               disc(SIZE, 80, 115, 25).sum()]  # fmt: skip
    for cutout in cutouts:
        assert np.array_equal(cutout.mask, cutout.image[..., 0] == 200)


def test_the_intensity_rule_maps_the_pixels(discs: Path) -> None:
    rule = IntensityRule("percentile", 0.0, 100.0)
    tile = LabelMapSource(discs, replace(SOURCE, intensity=rule)).tile(np.random.default_rng(1), 64)
    assert set(np.unique(tile.image)) >= {0, 255}
    assert (tile.image[tile.masks.any(axis=0)] > 120).all()


def test_deep_images_need_no_conversion(discs: Path, disc: Disc) -> None:
    labels = disc(SIZE, 80, 80, 30).astype(np.int32)
    write(discs, "deep", np.where(labels > 0, np.uint16(60000), np.uint16(0)), labels)
    source = LabelMapSource(discs, replace(SOURCE, images="images/deep*.png"))
    tile = source.tile(np.random.default_rng(0), 64)
    assert tile.image[tile.masks[0]].max() == pytest.approx(60000 / 257, abs=1)


@pytest.mark.parametrize("images", ["images", "images/*.png", "images/a.png"])
def test_images_are_a_folder_or_a_glob(discs: Path, images: str) -> None:
    (discs / "images" / "notes.txt").write_text("no image")
    assert LabelMapSource(discs, replace(SOURCE, images=images)).images == [0]


def test_images_whose_map_is_empty_are_left_out_and_specks_dropped(discs: Path) -> None:
    speck = np.zeros((SIZE, SIZE), np.int32)
    speck[3:6, 3:6] = 4
    write(discs, "b", np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE)))
    write(discs, "c", np.zeros((SIZE, SIZE), np.uint8), speck)
    assert LabelMapSource(discs, SOURCE).images == [0]


@pytest.mark.parametrize(("invert", "darker"), [(True, 1.0), (False, 0.0)])
def test_polarity_is_the_recipes_where_it_says_so(discs: Path, invert: bool, darker: float) -> None:
    source = open_labelled_source(discs, replace(SOURCE, invert=invert), tile_px=64)
    is_darker = []
    for index in range(12):
        tile = make_source_tile(
            source, [], random_generator(0, "source", 0, index), 64, scene_fraction=0.0, grey_fraction=1.0
        )
        inside = tile.masks.any(axis=0)
        if not inside.all():
            is_darker.append(tile.image[inside].mean() < tile.image[~inside].mean())
    assert np.mean(is_darker) == darker


def test_tiles_are_a_function_of_their_generator(discs: Path) -> None:
    first, again = (LabelMapSource(discs, SOURCE).tile(np.random.default_rng(5), 64) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)


def test_a_missing_label_map_is_named(discs: Path) -> None:
    write(discs, "b", np.zeros((SIZE, SIZE), np.uint8), None)
    assert refusal(discs).startswith(str(discs / "labels" / "b.png"))


def test_a_label_map_of_another_size_is_named_with_both_sizes(discs: Path) -> None:
    write(discs, "b", np.zeros((SIZE, SIZE), np.uint8), np.ones((SIZE, SIZE - 1)))
    message = refusal(discs)
    assert str(discs / "labels" / "b.png") in message
    assert "159 x 160" in message
    assert "160 x 160" in message


def test_an_image_too_small_for_the_tiles_is_named(discs: Path) -> None:
    message = refusal(discs, tile_px=512)
    assert "a.png" in message
    assert "171 px" in message  # 512 at three times its size


@pytest.mark.parametrize("images", ["images/*.tif", "nowhere", "labels/../images/*.jpg", "/"])
def test_no_images_are_refused(discs: Path, images: str) -> None:
    assert "source.images" in refusal(discs, replace(SOURCE, images=images))


def test_maps_without_any_object_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a", np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE)))
    assert "no object" in refusal(tmp_path)


@pytest.mark.parametrize("harm", [b"", b"no picture", b"\x89PNG\r\n\x1a\n broken"])
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_damaged_files_are_named_before_training(discs: Path, folder: str, harm: bytes) -> None:
    (discs / folder / "a.png").write_bytes(harm)
    assert str(discs / folder / "a.png") in refusal(discs)


def test_a_coloured_picture_is_no_label_map(discs: Path) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(discs / "labels" / "a.png")
    assert "no label map" in refusal(discs)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_label_maps_of_any_depth_are_read(tmp_path: Path, kind: type) -> None:
    labels = np.arange(48).reshape(6, 8).astype(kind)
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert np.array_equal(read_label_map(tmp_path / "a.png"), labels)


def test_a_run_refuses_bad_labels_before_its_first_step(recipe: Recipe, discs: Path) -> None:
    write(discs, "b", np.zeros((SIZE, SIZE), np.uint8), np.ones((4, 4)))
    (discs / "target").mkdir()
    Image.effect_noise((128, 128), 40).save(discs / "target" / "a.png")
    with pytest.raises(InputError, match=r"b\.png"):
        run_source(Run(replace(recipe, source=SOURCE), discs, discs / "out"))


def test_the_door_opens_photographs_and_label_maps(data: Path, recipe: Recipe) -> None:
    assert isinstance(open_labelled_source(data, recipe.source, tile_px=128), PhotographSource)
    real = Source("evaluate/images", labels="evaluate/labels", diameter_px=(20.0, 40.0))
    source = open_labelled_source(data, real, tile_px=128)
    assert isinstance(source, LabelMapSource)
    assert len(source.images) == 2
    for seed in range(4):
        tile = source.tile(np.random.default_rng(seed), 128)
        assert tile.masks.any(axis=(1, 2)).all()
        inside = tile.masks.any(axis=0)
        assert tile.image[inside].mean() > tile.image[~inside].mean()
