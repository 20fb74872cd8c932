"""The unlabelled target: one intensity rule per whole image, tiles at the network's scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from darcnn.runtime.errors import InputError
from darcnn.runtime.intensity import IntensityRule, apply_window, measure_window
from darcnn.training.config import Recipe, Target, TargetSet
from darcnn.training.data.target import TargetImages

FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
WithTarget = Callable[..., Recipe]


def target_of(pattern: str = "*.png", diameter_px: float | None = None, **changes: object) -> Target:
    base = Target((TargetSet(pattern, diameter_px),), 1, IntensityRule("full_range"), 20.0)
    return replace(base, **changes)  # type: ignore[arg-type]


def grey(folder: Path, pixels: np.ndarray, name: str = "image") -> Path:
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("tile_px", [64, 128, 192])
@pytest.mark.parametrize("diameter_px", [10.0, 20.0, 45.0])
def test_tiles_have_the_asked_size_whatever_the_scale(data: Path, tile_px: int, diameter_px: float) -> None:
    images = TargetImages(data, target_of("target/*.png", diameter_px), seed=0)
    for seed in range(6):
        tile = images.tile(np.random.default_rng(seed), tile_px)
        assert tile.image.shape == (tile_px, tile_px, 3)
        assert tile.image.dtype == np.uint8
        assert tile.masks.shape == (0, tile_px, tile_px)


def test_intensity_rule_is_applied_to_the_whole_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(100, 300, (200, 300)).astype(np.uint16)  # a dark part without anything
    pixels[:, 200:] += 40_000  # a bright part
    rule = IntensityRule("percentile", 1.0, 99.0)
    images = TargetImages(grey(tmp_path, pixels), target_of(intensity=rule, jitter=1.0), seed=0)
    (image,) = images.images
    expected = apply_window(pixels[..., None], measure_window(rule, pixels))
    assert np.array_equal(image.pixels, expected)
    dark = [t for t in (images.tile(np.random.default_rng(s), 64) for s in range(30)) if t.image.max() < 100]
    assert len(dark) > 5
    assert max(int(tile.image.max()) for tile in dark) < 10  # not stretched for being alone in its tile


def test_one_channel_of_colour_is_the_mean_and_is_shown_thrice(data: Path) -> None:
    (image, *_) = TargetImages(data, target_of("tissue/*.png"), seed=0).images
    with Image.open(data / "tissue" / f"{image.name}.png") as picture:
        colours = np.asarray(picture)
    assert np.array_equal(image.pixels, np.rint(colours.mean(axis=2, keepdims=True)).astype(np.uint8))
    tile = TargetImages(data, target_of("tissue/*.png"), seed=0).tile(np.random.default_rng(0), 64)
    assert (tile.image == tile.image[..., :1]).all()


def test_three_channels_keep_the_colours(data: Path) -> None:
    images = TargetImages(data, target_of("tissue/*.png", channels=3), seed=0)
    for image in images.images:
        with Image.open(data / "tissue" / f"{image.name}.png") as picture:
            assert np.array_equal(image.pixels, np.asarray(picture))
    tile = images.tile(np.random.default_rng(0), 64)
    assert not (tile.image == tile.image[..., :1]).all()


def test_scale_brings_objects_to_the_nominal_diameter(data: Path) -> None:
    sets = (
        TargetSet("target/u2os*.png", 30.0),
        TargetSet("tissue/*.png", 10.0),
        TargetSet("target/dim*.png"),
    )
    images = TargetImages(data, target_of(sets=sets), seed=0).images
    scales = {image.name.split("_")[0]: image.scale for image in images}
    assert scales == pytest.approx({"u2os": 20 / 30, "purple": 2.0, "dim": 1.0})


def test_scale_follows_the_pixel_size_where_no_diameter_is_given(tmp_path: Path) -> None:
    pixels = np.zeros((40, 50), np.uint8)
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        pixels,
        ome=True,
        metadata={
            "PhysicalSizeX": 0.5,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": 0.5,
            "PhysicalSizeYUnit": "µm",
        },
    )
    (image,) = TargetImages(tmp_path, target_of("*.tif", mpp=0.25), seed=0).images
    assert image.scale == pytest.approx(2.0)
    (image,) = TargetImages(tmp_path, target_of("*.tif", diameter_px=40.0, mpp=0.25), seed=0).images
    assert image.scale == pytest.approx(0.5)  # the diameter decides alone


def test_jitter_scales_either_way_up_to_its_factor(tmp_path: Path) -> None:
    # stripes with a period of 16 px: how many cross a tile tells the scale
    columns = np.arange(600) // 8 % 2 * 200
    folder = grey(tmp_path, np.repeat(columns[None], 600, axis=0).astype(np.uint8))
    images = TargetImages(folder, target_of(jitter=2.0), seed=0)
    periods = []
    for seed in range(60):
        row = images.tile(np.random.default_rng(seed), 128).image[64, :, 0].astype(int)
        periods.append(2 * 128 / max(1, np.count_nonzero(np.diff(np.sign(row - 100)))))
    assert 7 < min(periods) < 11
    assert 22 < max(periods) < 38


@FAST
@given(seeds, st.sampled_from([0.5, 1.0, 2.0]))
def test_labels_are_cropped_with_their_image(
    tmp_path: Path, disc: Callable[..., np.ndarray], seed: int, scale: float
) -> None:
    labels = np.zeros((160, 160), np.int32)
    for number, (x, y) in enumerate([(40, 40), (110, 50), (70, 120)], start=1):
        labels[disc(160, x, y, 18)] = number
    images = TargetImages(
        grey(tmp_path, np.where(labels > 0, 255, 0).astype(np.uint8)),
        target_of(diameter_px=20 / scale),
        seed=0,
    )
    tile = images.tile(np.random.default_rng(seed), 96, {"image": labels})
    assert len(tile.masks) >= 1  # a labelled tile shows an object
    assert tile.masks.sum(axis=0).max() == 1
    inside = tile.masks.any(axis=0)
    margin = np.ones((5, 5), bool)
    shown = tile.image[..., 0].astype(int)
    core, around = ndimage.binary_erosion(inside, margin), ndimage.binary_dilation(inside, margin)
    assert (shown[core] > 200).all()
    # slivers of fewer than a dozen pixels have no mask, but are in the image
    assert (shown[~around] > 50).sum() < 60


def test_only_labelled_images_are_drawn_with_labels(data: Path) -> None:
    images = TargetImages(data, target_of("target/*.png"), seed=0)
    name = images.images[2].name
    labels = {name: np.zeros((128, 128), np.int32)}
    labels[name][40:80, 50:90] = 7
    for seed in range(10):
        assert len(images.tile(np.random.default_rng(seed), 64, labels).masks) == 1


def test_tiles_are_a_function_of_their_generator(data: Path) -> None:
    images = TargetImages(data, target_of("target/*.png"), seed=0)
    first, again = (images.tile(np.random.default_rng(3), 64).image for _ in range(2))
    assert np.array_equal(first, again)


def test_order_of_images_is_fixed(data: Path) -> None:
    names = [image.name for image in TargetImages(data, target_of("target/*.png"), seed=0).images]
    assert names == sorted(names)
    assert len(names) == 4


def test_a_pattern_without_images_is_refused(data: Path) -> None:
    with pytest.raises(InputError, match="no target images"):
        TargetImages(data, target_of("nothing/*.png"), seed=0)


def test_an_image_with_several_channels_that_are_no_colours_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "two.ome.tif", np.zeros((2, 64, 64), np.uint16), ome=True, metadata={"axes": "CYX"}
    )
    with pytest.raises(InputError, match="two"):
        TargetImages(tmp_path, target_of("*.tif"), seed=0)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(InputError, match="broken"):
        TargetImages(tmp_path, target_of(), seed=0)


def test_a_slide_is_represented_by_crops_that_show_tissue(example_slide: Path) -> None:
    images = TargetImages(
        example_slide.parent, target_of(example_slide.name, channels=3, mpp=0.25), seed=0
    ).images
    assert len(images) > 3
    assert len({image.name for image in images}) == len(images)
    for image in images:
        assert image.pixels.shape == (512, 512, 3)
        assert image.scale == pytest.approx(0.499 / 0.25, rel=0.01)
        assert image.pixels.std() > 5


@pytest.mark.parametrize(("height", "width", "tile_px"), [(107, 107, 256), (98, 130, 128), (77, 77, 320)])
def test_an_image_that_the_tile_covers_exactly_gives_tiles(
    tmp_path: Path, height: int, width: int, tile_px: int
) -> None:
    images = TargetImages(grey(tmp_path, np.zeros((height, width), np.uint8)), target_of(), seed=0)
    for seed in range(200):
        assert images.tile(np.random.default_rng(seed), tile_px).image.shape[:2] == (tile_px, tile_px)


def test_images_of_the_same_name_in_two_sets_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        grey(tmp_path / folder, np.zeros((64, 64), np.uint8))
    images = TargetImages(tmp_path, target_of(sets=(TargetSet("x/*.png"), TargetSet("y/*.png"))), seed=0)
    assert len({image.name for image in images.images}) == 2


def test_a_slide_narrower_than_a_crop_is_sampled(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "narrow.tif", np.zeros((300, 20_000, 3), np.uint8), photometric="rgb")
    images = TargetImages(tmp_path, target_of("*.tif"), seed=0)
    assert all(image.pixels.shape[0] == 300 for image in images.images)


@pytest.mark.parametrize("pattern", ["/nowhere/*.png", ""])
def test_a_pattern_that_leaves_the_data_folder_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError):
        TargetImages(tmp_path, target_of(pattern), seed=0)
