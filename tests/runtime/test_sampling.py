"""Tiles at network resolution: one lattice, one window, reflected edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime import sampling
from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Level, Region
from darcnn.runtime.intensity import IntensityRule, Window, apply_window
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.sampling import SlidePlan, TileSampler, measure_slide, read_ahead
from darcnn.runtime.tiling import plan_tiles

BYTES = Window(0.0, 255.0)


def make_plan(level: Level, width: int, height: int, *, tile_px: int = 24, halo_px: int = 4) -> SlidePlan:
    return SlidePlan(
        level=level,
        scale=width / level.width_px,
        width=width,
        height=height,
        span_px0=(level.width_px, level.height_px),
        tiles=plan_tiles(width, height, tile_px=tile_px, halo_px=halo_px),
        channel=None,
        mpp=None,
        mpp_source=None,
    )


def noise(height: int, width: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@settings(deadline=None, max_examples=25)
@given(st.integers(9, 80), st.integers(9, 60), st.sampled_from([0.13, 0.37, 0.5, 0.71, 1.0, 1.6, 3.0]))
def test_a_tile_is_made_of_its_source_and_nothing_else(width: int, height: int, scale: float) -> None:
    image = noise(height, width)
    plan = make_plan(
        Level(0, width, height, 1.0), max(1, round(width * scale)), max(1, round(height * scale))
    )
    for tile in plan.tiles:
        with ArrayReader(image) as reader:
            sampler = TileSampler(reader, plan, BYTES, channels=1)
            source, expected = sampler.source(tile), sampler.read(tile)
        elsewhere = 255 - image
        inside = (slice(source.y0, source.y1), slice(source.x0, source.x1))
        elsewhere[inside] = image[inside]
        with ArrayReader(elsewhere) as reader:
            np.testing.assert_array_equal(TileSampler(reader, plan, BYTES, channels=1).read(tile), expected)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(9, 80), st.integers(9, 60), st.sampled_from([0.13, 0.37, 0.5, 0.71, 1.6, 3.0]), st.booleans()
)
def test_tiles_agree_where_they_overlap(width: int, height: int, scale: float, is_rgb: bool) -> None:
    image = noise(height, width, 3 if is_rgb else 1)
    plan = make_plan(
        Level(0, width, height, 1.0), max(1, round(width * scale)), max(1, round(height * scale))
    )
    lowest = np.full((plan.height, plan.width, image.shape[2]), 255, np.int64)
    highest = np.zeros_like(lowest)
    with ArrayReader(image) as reader:
        sampler = TileSampler(reader, plan, BYTES, channels=image.shape[2])
        for tile in plan.tiles:
            pixels = sampler.read(tile)
            assert pixels.shape == (24, 24, image.shape[2])
            inside = tile.read.clip(plan.width, plan.height)
            part = pixels[
                inside.y0 - tile.read.y0 : inside.y1 - tile.read.y0,
                inside.x0 - tile.read.x0 : inside.x1 - tile.read.x0,
            ]
            at = np.s_[inside.y0 : inside.y1, inside.x0 : inside.x1]
            lowest[at] = np.minimum(lowest[at], part)
            highest[at] = np.maximum(highest[at], part)
    assert (highest - lowest).max() <= 1  # grey levels: rounding of the weights


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 5), (7, 3), (30, 41)])
def test_beyond_the_edges_pixels_are_reflected(width: int, height: int) -> None:
    image = noise(height, width)
    plan = make_plan(Level(0, width, height, 1.0), width, height)
    padded = np.pad(image, ((60, 60), (60, 60), (0, 0)), mode="reflect")
    with ArrayReader(image) as reader:
        sampler = TileSampler(reader, plan, BYTES, channels=1)
        for tile in plan.tiles:
            expected = padded[tile.read.y0 + 60 : tile.read.y1 + 60, tile.read.x0 + 60 : tile.read.x1 + 60]
            assert np.array_equal(sampler.read(tile), expected)


def test_halving_takes_means_without_shift() -> None:
    ramp = np.tile(np.arange(0, 240, 2, dtype=np.uint8), (40, 1))[:, :, None]  # 2 grey levels a pixel
    plan = make_plan(Level(0, 120, 40, 1.0), 60, 20)
    with ArrayReader(ramp) as reader:
        pixels = TileSampler(reader, plan, BYTES, channels=1).read(plan.tiles[1])
    # network pixel k covers pixels 2k and 2k + 1, whose mean is 4k + 1
    expected = 4 * np.arange(plan.tiles[1].read.x0, plan.tiles[1].read.x1) + 1
    assert np.abs(pixels[10, :, 0].astype(int) - expected).max() <= 1


def test_a_strong_reduction_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    image = noise(300, 400)
    plan = make_plan(Level(0, 400, 300, 1.0), 40, 30, tile_px=48)
    areas: list[int] = []

    class Watched(ArrayReader):
        def read(self, region: Region, *, level: int) -> Any:
            areas.append(region.width * region.height)
            return super().read(region, level=level)

    with Watched(image) as reader:
        whole = TileSampler(reader, plan, BYTES, channels=1).read(plan.tiles[0])
        monkeypatch.setattr(sampling, "MAX_BLOCK_PX", 50)
        areas.clear()
        blocks = TileSampler(reader, plan, BYTES, channels=1).read(plan.tiles[0])
    assert len(areas) > 10
    assert max(areas) < 100 * 100
    assert np.abs(whole.astype(int) - blocks).max() <= 1


def test_the_window_comes_before_the_resampling() -> None:
    image = np.tile(np.array([[0, 3000]], np.uint16), (20, 10))
    plan = make_plan(Level(0, 20, 20, 1.0), 10, 10)
    with ArrayReader(image) as reader:
        pixels = TileSampler(reader, plan, Window(1000, 3000), channels=3).read(plan.tiles[0])
    assert pixels.shape[2] == 3
    # the mean of 0 and 255; the other order would give (1500 - 1000) / 2000 of 255
    assert np.abs(pixels[4:6, 4:6].astype(int) - 128).max() <= 1


def test_rules_without_statistics_read_nothing() -> None:
    image = noise(30, 30).astype(np.uint8)
    with ArrayReader(image) as reader:
        plan = make_plan(reader.info.levels[0], 30, 30)
        info_only = type("Blind", (), {"info": reader.info})()
        assert measure_slide(info_only, plan, IntensityRule("full_range"), channels=1) == Window(0, 255)
        assert measure_slide(info_only, plan, IntensityRule("range", 3, 9), channels=1) == Window(3, 9)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colours_of_cameras_with_few_bits_are_refused_where_nobody_says_what_is_white(bits: int) -> None:
    image = np.random.default_rng(0).integers(0, 2**bits, (40, 50, 3)).astype(np.uint16)
    rule = IntensityRule("full_range")
    for dark in (image, np.zeros_like(image)):
        with ArrayReader(dark, is_rgb=True) as reader:
            plan = make_plan(reader.info.levels[0], 50, 40)
            if bits == 16 or not dark.any():
                assert measure_slide(reader, plan, rule, channels=3) == Window(0, 65535)
            else:
                fix = rf"65535 is white; give window=Window\(0, {2**bits - 1}\) if the camera has {bits}"
                with pytest.raises(InputError, match=fix):
                    measure_slide(reader, plan, rule, channels=3)


def test_colours_with_fractions_end_at_one_or_are_refused() -> None:
    image = np.random.default_rng(0).uniform(0, 1.05, (40, 50, 3)).astype(np.float32)
    image[3, 4] = np.nan
    rule = IntensityRule("full_range")
    for factor in (1.0, 255.0):
        with ArrayReader(image * np.float32(factor), is_rgb=True) as reader:
            plan = make_plan(reader.info.levels[0], 50, 40)
            if factor == 1.0:
                assert measure_slide(reader, plan, rule, channels=3) == Window(0.0, 1.0)
            else:
                with pytest.raises(InputError, match=r"reach 26\d.*0 is black and 1 is white"):
                    measure_slide(reader, plan, rule, channels=3)


def test_separate_channels_are_measured_one_by_one_and_colours_together() -> None:
    image = noise(40, 30, 3).astype(np.uint16) * np.array([1, 20, 200], np.uint16)
    rule = IntensityRule("percentile", 0, 100)
    windows = {}
    for is_rgb in (True, False):
        with ArrayReader(image, is_rgb=is_rgb) as reader:
            plan = make_plan(reader.info.levels[0], 30, 40)
            windows[is_rgb] = measure_slide(reader, plan, rule, channels=3)
            pixels = TileSampler(reader, plan, windows[is_rgb], channels=3).read(plan.tiles[0])
            assert np.array_equal(pixels, apply_window(image, windows[is_rgb])[:24, :24])
    assert windows[True] == Window(float(image.min()), float(image.max()))
    assert windows[False].high == tuple(float(image[..., channel].max()) for channel in range(3))


def test_a_small_image_is_measured_whole() -> None:
    image = noise(60, 50)
    with ArrayReader(image) as reader:
        plan = make_plan(reader.info.levels[0], 50, 60)
        window = measure_slide(reader, plan, IntensityRule("percentile", 1, 99), channels=1)
    assert window == Window(float(np.percentile(image, 1)), float(np.percentile(image, 99)))


def test_a_large_level_is_measured_by_regions_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "MAX_SAMPLE_PX", 4000)
    ramp = np.tile(np.linspace(0, 60000, 400).astype(np.uint16), (300, 1))
    read: list[Region] = []

    class Watched(ArrayReader):
        def read(self, region: Region, *, level: int) -> Any:
            read.append(region)
            return super().read(region, level=level)

    with Watched(ramp) as reader:
        plan = make_plan(reader.info.levels[0], 400, 300)
        window = measure_slide(reader, plan, IntensityRule("percentile", 10, 90), channels=1)
    assert len(read) == 64
    assert sum(r.width * r.height for r in read) <= 4000
    assert window.low == pytest.approx(6000, abs=2000)
    assert window.high == pytest.approx(54000, abs=2000)


@pytest.mark.parametrize(
    ("width", "scale", "expected"),
    [(8192, 1.0, 2), (8192, 0.5, 3), (8192, 0.1, 4), (400, 1.0, 0)],  # of 0.25 Mpx, or else the finest
)
def test_brightness_comes_from_a_level_that_still_shows_objects(
    width: int, scale: float, expected: int
) -> None:
    levels = tuple(Level(k, width >> k, width >> k, float(1 << k)) for k in range(7))
    asked: list[int] = []

    class Pyramid:
        def __init__(self) -> None:
            with ArrayReader(np.zeros((8, 8), np.uint16)) as array:
                info = array.info
            self.info = type(info)(
                path=None,
                name="pyramid",
                levels=levels,
                channel_names=info.channel_names,
                dtype=info.dtype,
                is_rgb=False,
            )

        def read(self, region: Region, *, level: int) -> Any:
            asked.append(level)
            assert region.x1 <= levels[level].width_px
            return np.zeros((region.height, region.width, 1), np.uint16)

    reader: Any = Pyramid()
    side = round(width * scale)
    plan = make_plan(levels[0], side, side, tile_px=512)
    measure_slide(reader, plan, IntensityRule("percentile", 1, 99), channels=1)
    assert set(asked) == {expected}  # at most 4 times coarser than the model's pixels


def test_tiles_are_read_ahead_in_their_order_and_errors_are_raised():
    tiles = plan_tiles(100, 100, tile_px=16, halo_px=4)

    class Sampler:
        n_read = 0

        def read(self, tile):
            self.n_read += 1
            if tile.index == 40:
                raise InputError("damaged", where="x", fix="y")
            return np.full((16, 16, 1), tile.index, np.uint8)

    sampler, seen = Sampler(), []

    def read_all():
        for batch, pixels in read_ahead(sampler, tiles, batch=3):
            assert [tile.index for tile in batch] == [int(one[0, 0, 0]) for one in pixels]
            seen.extend(tile.index for tile in batch)

    with pytest.raises(InputError, match="damaged"):
        read_all()
    assert seen == list(range(39))
    assert sampler.n_read <= 39 + 3 * 3
