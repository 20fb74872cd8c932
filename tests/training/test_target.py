"""The unlabelled target: one intensity rule per whole image, tiles at the network's scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from skimage.segmentation import clear_border

from darcnn.runtime.errors import InputError
from darcnn.runtime.intensity import IntensityRule, apply_window, measure_window
from darcnn.runtime.slab import Slab
from darcnn.runtime.volumes.open import open_volume
from darcnn.runtime.volumes.stack import Stack, measure_stack
from darcnn.training.config import Recipe, Target, TargetSet
from darcnn.training.data.target import TargetImages

FAST = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)
WithTarget = Callable[..., Recipe]


def target_of(pattern: str = "*.png", diameter_px: float | None = None, **changes: object) -> Target:
    base = Target((TargetSet(pattern, diameter_px),), 1, IntensityRule("full_range"), 20.0)
    return replace(base, **changes)  # type: ignore[arg-type]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def grey(folder: Path, pixels: np.ndarray, name: str = "image") -> Path:
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("tile_px", [64, 128, 192])
@pytest.mark.parametrize("diameter_px", [10.0, 20.0, 40.0])
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


def test_every_image_of_a_file_is_learned_from(tmp_path: Path) -> None:
    pages = [noise(80, 90, seed=seed) for seed in range(2)]
    with tifffile.TiffWriter(tmp_path / "plate.ome.tif") as file:
        for page in pages:
            file.write(page, metadata={"axes": "YX"})
    images = TargetImages(tmp_path, target_of("*.tif", jitter=1.0), seed=0).images
    assert [image.name for image in images] == ["plate-0", "plate-1"]
    for image, page in zip(images, pages, strict=True):
        assert np.array_equal(image.pixels[:, :, 0], page)


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
    pixels = noise(140, 150)
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
    images = TargetImages(grey(tmp_path, noise(height, width)), target_of(), seed=0)
    for seed in range(200):
        assert images.tile(np.random.default_rng(seed), tile_px).image.shape[:2] == (tile_px, tile_px)


def discs(side: int, diameter: int) -> np.ndarray:
    """Return labels of discs apart from one another, `side` pixels square."""
    y, x = np.indices((side, side))
    pitch = round(1.6 * diameter)
    inside = (y % pitch - pitch / 2) ** 2 + (x % pitch - pitch / 2) ** 2 < (diameter / 2) ** 2
    labels: np.ndarray = clear_border(ndimage.label(inside)[0].astype(np.int32))
    return labels


def drawn_diameters(images: TargetImages, labels: np.ndarray) -> list[float]:
    """Return the diameters of whole objects in tiles of the images, which are `labels` or crops of them."""
    cropped = {}
    for image in images.images:
        x, y = (int(part[1:]) for part in image.name.split("_")[1:3]) if image.is_crop else (0, 0)
        height, width = image.pixels.shape[:2]
        cropped[image.name] = labels[y : y + height, x : x + width]
    found = []
    for seed in range(20):
        for mask in images.tile(np.random.default_rng(seed), 256, cropped).masks:
            if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()):
                found.append(2 * math.sqrt(mask.sum() / math.pi))
    return found


@pytest.mark.parametrize(("side", "diameter"), [(2048, 150), (2700, 150), (128, 42), (200, 100)])
def test_objects_come_at_the_nominal_size_in_frames_of_any_size(
    tmp_path: Path, side: int, diameter: int
) -> None:
    labels = discs(side, diameter)
    folder = grey(tmp_path, np.where(labels > 0, 200, 20).astype(np.uint8))
    target = target_of(diameter_px=float(diameter), nominal_diameter_px=42.0, jitter=1.4)
    found = drawn_diameters(TargetImages(folder, target, seed=0), labels)
    assert 42 / 1.45 < min(found) <= max(found) < 42 * 1.45


def test_a_crop_whose_scale_is_found_shows_no_more_than_one_whose_scale_was_given(tmp_path: Path) -> None:
    grey(tmp_path, noise(2700, 2800))
    images = TargetImages(tmp_path, target_of(finds_diameter=True), seed=0)
    assert {image.pixels.shape for image in images.images} == {(1024, 1024, 1)}
    first, second, *_ = (image.name for image in images.images)
    images.match({first: 20.0, second: 30.0})
    by_name = {image.name: image.pixels.shape for image in images.images}
    assert by_name[first] == (512, 512, 1)
    assert by_name[second] == (768, 768, 1)


def test_beyond_a_small_image_its_mirror_image_is_labelled_too(tmp_path: Path) -> None:
    labels = np.zeros((90, 90), np.int32)
    labels[20:40, 20:40], labels[60:90, 50:70] = 1, -2  # whole, and at the edge
    images = TargetImages(
        grey(tmp_path, np.where(labels, 200, 20).astype(np.uint8)), target_of(jitter=1.0), 0
    )
    tile = images.tile(np.random.default_rng(0), 160, {"image": labels})
    assert len(tile.masks) == 4  # the object and its mirror images, each one
    assert len(tile.doubtful) == 2  # joined with its mirror image at the edge
    covered = tile.masks.any(axis=0) | tile.doubtful.any(axis=0)
    assert np.array_equal(covered, tile.image[..., 0] == 200)


def test_pixels_that_are_not_square_are_refused_where_their_size_decides(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise(96, 96), resolution=(40_000, 20_000), resolutionunit=3)
    with pytest.raises(InputError, match="not square"):
        TargetImages(tmp_path, target_of("*.tif", mpp=0.25), seed=0)
    assert len(TargetImages(tmp_path, target_of("*.tif", diameter_px=20.0), seed=0).images) == 1


def test_images_of_the_same_name_in_two_sets_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        grey(tmp_path / folder, noise(64, 64))
    images = TargetImages(tmp_path, target_of(sets=(TargetSet("x/*.png"), TargetSet("y/*.png"))), seed=0)
    assert len({image.name for image in images.images}) == 2


def test_a_slide_narrower_than_a_crop_is_sampled(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "narrow.tif", noise(300, 20_000, 3), photometric="rgb")
    images = TargetImages(tmp_path, target_of("*.tif"), seed=0)
    assert all(image.pixels.shape[0] == 300 for image in images.images)


@pytest.mark.parametrize("pattern", ["/nowhere/*.png", ""])
def test_a_pattern_that_leaves_the_data_folder_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError):
        TargetImages(tmp_path, target_of(pattern), seed=0)


# volumes and series


def write_mrc(path: Path, volume: np.ndarray, voxel_angstrom: float = 0.0) -> Path:
    mrcfile = pytest.importorskip("mrcfile", reason="the extra `volumes` is not installed")
    with mrcfile.new(path, volume) as file:
        file.voxel_size = voxel_angstrom
    return path


def ramp(n_planes: int, side: int = 80) -> np.ndarray:
    """Return (Z, Y, X) int16 of noise that grows brighter from plane to plane."""
    rng = np.random.default_rng(0)
    levels = 1000 + 100 * np.arange(n_planes)[:, None, None]
    return (levels + rng.integers(0, 50, (n_planes, side, side))).astype(np.int16)


def test_planes_of_a_volume_come_at_even_steps_through_one_window(tmp_path: Path) -> None:
    volume = ramp(64)
    write_mrc(tmp_path / "tomo.mrc", volume, voxel_angstrom=20_000.0)
    rule = IntensityRule("percentile", 1.0, 99.0)
    images = TargetImages(tmp_path, target_of("*.mrc", intensity=rule, mpp=1.0), seed=0).images
    drawn = list(range(2, 64, 4))
    assert [image.name for image in images] == [f"tomo_z{z:03d}" for z in drawn]
    window = measure_window(rule, volume[drawn].astype(np.float32))
    for image, z in zip(images, drawn, strict=True):
        assert np.array_equal(image.pixels[:, :, 0], apply_window(volume[z].astype(np.float32), window))
        assert image.scale == pytest.approx(2.0)
    means = [image.pixels.mean() for image in images]
    assert means == sorted(means)
    assert means[-1] - means[0] > 200  # a window for each plane would have made them alike


def test_slabs_that_are_learned_from_are_those_of_a_run(tmp_path: Path) -> None:
    volume = np.random.default_rng(0).normal(0, 10, (40, 80, 90)).astype(np.float32)
    path = write_mrc(tmp_path / "tomo.mrc", volume, voxel_angstrom=10.0)
    rule, slab = IntensityRule("percentile", 1, 99), Slab(depth=0.5, smoothing=0.2)
    target = target_of("*.mrc", intensity=rule, mpp=0.0005, slab=slab)  # 20 px are 10 voxels
    images = TargetImages(tmp_path, target, seed=0).images
    assert [image.name for image in images][:2] == ["tomo_z001", "tomo_z003"]
    with open_volume(path, tmp_path) as opened:
        stack = Stack.of(opened, "z", slab, 10.0)
        assert (stack.n_joined, stack.sigma_px) == (5, 2.0)
        window = measure_stack(stack, rule, scale=2.0)
        for image in images:
            z = int(image.name[-3:])
            assert np.array_equal(image.pixels[:, :, 0], apply_window(stack.plane(z), window))
            assert image.scale == pytest.approx(2.0)


def test_a_thin_volume_gives_all_its_planes_whatever_its_format(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="the extra `volumes` is not installed")
    volume = ramp(3)
    write_mrc(tmp_path / "a.mrc", volume)
    nibabel.save(nibabel.Nifti1Image(volume.T, np.eye(4)), tmp_path / "b.nii.gz")
    tifffile.imwrite(tmp_path / "c.ome.tif", volume.astype(np.uint16), metadata={"axes": "ZYX"})
    rule = IntensityRule("percentile", 0.0, 100.0)
    images = TargetImages(tmp_path, target_of("*", intensity=rule), seed=0).images
    assert [image.name for image in images] == [f"{name}_z{z:03d}" for name in "abc" for z in range(3)]
    for first, second, third in zip(images[:3], images[3:6], images[6:], strict=True):
        assert np.array_equal(first.pixels, second.pixels)
        assert np.array_equal(first.pixels, third.pixels)


@pytest.mark.parametrize(
    ("n_t", "n_z", "expected"),
    [(1, 100, 16), (100, 1, 16), (30, 20, 16), (2, 9, 16), (3, 2, 6), (50, 3, 15), (1, 16, 16)],
)
def test_no_file_gives_more_than_sixteen_planes(tmp_path: Path, n_t: int, n_z: int, expected: int) -> None:
    pixels = noise(n_t, n_z, 64, 64)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, metadata={"axes": "TZYX"})
    images = TargetImages(tmp_path, target_of("*.tif"), seed=0).images
    assert len(images) == len({image.name for image in images}) == expected
    axes = {axis for axis, n in (("t", n_t), ("z", n_z)) if n > 1}
    places = [{part[0]: int(part[1:]) for part in image.name.split("_")[1:]} for image in images]
    for image, place in zip(images, places, strict=True):
        assert set(place) == axes
        assert np.array_equal(image.pixels[:, :, 0], pixels[place.get("t", 0), place.get("z", 0)])
    for axis in axes:  # none of them is seen at one place only
        assert len({place[axis] for place in places}) >= min(n_t if axis == "t" else n_z, 4)


def test_names_of_planes_and_of_files_do_not_collide(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    tifffile.imwrite(tmp_path / "x" / "a.tif", noise(2, 64, 64), photometric="minisblack")
    grey(tmp_path / "y", noise(64, 64), "a_z001")
    grey(tmp_path / "y", noise(64, 64), "a")
    for order in (("x/*", "y/*"), ("y/*", "x/*")):
        sets = tuple(TargetSet(pattern) for pattern in order)
        names = [image.name for image in TargetImages(tmp_path, target_of(sets=sets), seed=0).images]
        assert len(names) == len(set(names)) == 4


def test_real_tomograms_become_a_target(shared: Path) -> None:
    pytest.importorskip("mrcfile", reason="the extra `volumes` is not installed")
    data = shared / "data" / "tomograms" / "train"
    if not any(data.glob("volumes/*.mrc")):
        pytest.skip("no tomograms in the folder `shared` beside the checkout")
    rule = IntensityRule("percentile", 1.0, 99.0)
    target = target_of("volumes/*.mrc", diameter_px=10.5, nominal_diameter_px=21.0, intensity=rule)
    images = TargetImages(data, target, seed=0)
    assert len(images.images) == 3 * 16
    assert {image.pixels.shape for image in images.images} == {(288, 288, 1)}
    tile = images.tile(np.random.default_rng(0), 128)
    assert tile.image.shape == (128, 128, 3)
    assert 20 < tile.image.std() < 100


# channels


@pytest.mark.parametrize(
    ("channels", "weights"),
    [
        (2, [[1, 0], [0, 1], [0.5, 0.5]]),
        (3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        (4, [[0.75, 0, 0, 0.25], [0, 0.75, 0, 0.25], [0, 0, 0.75, 0.25]]),
    ],
)
def test_separate_channels_are_scaled_one_by_one_and_mixed_as_the_network_sees_them(
    tmp_path: Path, channels: int, weights: list[list[float]]
) -> None:
    gains = np.array([1, 30, 200, 5], np.uint16)[:channels, None, None]
    raw = noise(channels, 90, 90).astype(np.uint16) * gains
    tifffile.imwrite(tmp_path / "a.ome.tif", raw, metadata={"axes": "CYX"}, photometric="minisblack")
    rule = IntensityRule("percentile", 0.0, 100.0)
    target = target_of("*.tif", channels=channels, intensity=rule, jitter=1.0)
    images = TargetImages(tmp_path, target, seed=0)
    (image,) = images.images
    for channel in range(channels):  # each has its own window
        expected = apply_window(raw[channel], measure_window(rule, raw[channel]))
        assert np.array_equal(image.pixels[:, :, channel], expected)
    tile = images.tile(np.random.default_rng(0), 90)
    mixed = image.pixels.astype(float) @ np.array(weights, float).T
    assert tile.image.dtype == np.uint8
    assert np.abs(tile.image - mixed).max() <= 0.5


def test_labels_follow_an_image_of_two_channels(tmp_path: Path, disc: Callable[..., np.ndarray]) -> None:
    labels = disc(96, 50, 40, 20).astype(np.int32)
    raw = np.stack([labels * 200, noise(96, 96)]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.ome.tif", raw, metadata={"axes": "CYX"}, photometric="minisblack")
    images = TargetImages(tmp_path, target_of("*.tif", channels=2), seed=0)
    tile = images.tile(np.random.default_rng(1), 96, {"a": labels})
    assert len(tile.masks) == 1
    bright = tile.image[..., 0] > 100
    assert (bright & tile.masks[0]).sum() / (bright | tile.masks[0]).sum() > 0.9


@pytest.mark.parametrize(
    ("in_file", "channels", "fix"),
    [
        (1, 2, "at least 2 separate"),
        (3, 4, "at least 4"),
        (2, 1, "one channel or RGB"),
        (2, 3, "RGB, or one"),
    ],
)
def test_an_image_with_other_channels_is_refused_with_the_fix(
    tmp_path: Path, in_file: int, channels: int, fix: str
) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, noise(in_file, 64, 64), metadata={"axes": "CYX"}, photometric="minisblack")
    with pytest.raises(InputError, match=fix) as caught:
        TargetImages(tmp_path, target_of("*.tif", channels=channels), seed=0)
    assert caught.value.where == str(path)


# checks before hours are spent


def test_an_image_that_is_too_small_at_the_networks_scale_is_named(tmp_path: Path) -> None:
    grey(tmp_path, noise(100, 200))
    assert len(TargetImages(tmp_path, target_of(diameter_px=31.0), seed=0).images) == 1  # 64.5 px
    with pytest.raises(InputError, match=r"shorter side, 100 px, is 62 px.*below 64 px") as caught:
        TargetImages(tmp_path, target_of(diameter_px=32.0), seed=0)
    assert caught.value.where == str(tmp_path / "image.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("kind", ["percentile", "full_range"])
def test_images_without_contrast_are_left_out_with_a_warning(
    tmp_path: Path, dtype: Any, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((80, 80), 7, dtype))
    target = target_of("*.tif", intensity=IntensityRule(kind, 1.0, 99.0))
    with pytest.raises(InputError, match="no target image has any contrast"):
        TargetImages(tmp_path, target, seed=0)
    pixels = np.random.default_rng(0).random((80, 80)) * (1 if dtype == np.float32 else 250)
    tifffile.imwrite(tmp_path / "b.tif", pixels.astype(dtype) * (200 if dtype == np.uint16 else 1))
    caplog.clear()
    assert [image.name for image in TargetImages(tmp_path, target, seed=0).images] == ["b"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a.tif'}: no contrast; left out of the training"
    ]


def test_an_image_of_nothing_but_nan_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((80, 80), np.nan, np.float32))
    tifffile.imwrite(tmp_path / "b.tif", noise(80, 80).astype(np.float32))
    rule = IntensityRule("percentile", 1.0, 99.0)
    assert len(TargetImages(tmp_path, target_of("*.tif", intensity=rule), seed=0).images) == 1
    assert "a.tif: no contrast" in caplog.text


def test_empty_planes_of_a_volume_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    volume = noise(8, 70, 70)
    volume[:3] = 0
    tifffile.imwrite(tmp_path / "a.tif", volume, photometric="minisblack")
    images = TargetImages(tmp_path, target_of("*.tif"), seed=0).images
    assert [image.name for image in images] == [f"a_z{z:03d}" for z in range(3, 8)]
    assert "3 parts without contrast; left out" in caplog.text


def test_values_that_are_no_numbers_are_black_and_change_nothing_else(tmp_path: Path) -> None:
    pixels = noise(90, 90).astype(np.float32) * 1e-3
    odd = pixels.copy()
    odd[:5], odd[5:9], odd[9:12] = np.nan, np.inf, -np.inf
    tifffile.imwrite(tmp_path / "odd.tif", odd)
    rule = IntensityRule("percentile", 1.0, 99.0)
    (image,) = TargetImages(tmp_path, target_of("*.tif", intensity=rule), seed=0).images
    window = measure_window(rule, pixels[12:])
    assert not image.pixels[:12].any()
    assert np.array_equal(image.pixels[12:, :, 0], apply_window(pixels[12:], window))


@pytest.mark.parametrize("gain", [1e-4, 1.0, 100.0])
def test_tissue_of_a_slide_is_found_at_any_range_of_values(tmp_path: Path, gain: float) -> None:
    pixels = np.zeros((2100, 2100), np.float32)
    pixels[:800, :800] = noise(800, 800) * gain
    tifffile.imwrite(tmp_path / "large.tif", pixels)
    rule = IntensityRule("percentile", 0.5, 99.9)
    images = TargetImages(tmp_path, target_of("*.tif", intensity=rule), seed=0).images
    assert images
    assert all(image.pixels.std() > 6 for image in images)


def pyramid(path: Path, full: np.ndarray, factor: int) -> np.ndarray:
    """Write `full` with one reduced level, and return that."""
    reduced = full[::factor, ::factor]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(full, subifds=1, tile=(256, 256), photometric="minisblack")
        tiff.write(reduced, subfiletype=1, tile=(256, 256), photometric="minisblack")
    return reduced


def test_a_slide_is_read_at_the_level_that_a_run_reads(tmp_path: Path) -> None:
    reduced = pyramid(tmp_path / "a.tif", noise(3000, 3600), 4)
    (image,) = TargetImages(tmp_path, target_of("*.tif", diameter_px=80.0), seed=0).images
    assert image.scale == pytest.approx(1.0)
    assert np.array_equal(image.pixels[:, :, 0], reduced)


def test_crops_are_named_by_their_place_at_level_0(tmp_path: Path) -> None:
    reduced = pyramid(tmp_path / "a.tif", noise(5000, 5200), 2)
    images = TargetImages(tmp_path, target_of("*.tif", diameter_px=40.0), seed=0).images
    assert len(images) > 3
    for image in images:
        x, y = (int(part[1:]) // 2 for part in image.name.split("_")[1:])
        assert np.array_equal(image.pixels[:, :, 0], reduced[y : y + 512, x : x + 512])


def test_a_camera_of_fewer_bits_is_told_of_before_training(
    tmp_path: Path, with_target: Callable[..., Recipe]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 4000, (100, 120), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    recipe = with_target(sets=(TargetSet("*.tif"),), intensity=IntensityRule("full_range"))
    with pytest.raises(InputError, match=r'values reach .*target\.intensity = \{ kind = "range"'):
        TargetImages(tmp_path, recipe.target, 0)
    told = with_target(sets=(TargetSet("*.tif"),), intensity=IntensityRule("range", 0.0, 4095.0))
    assert len(TargetImages(tmp_path, told.target, 0).images) == 1
