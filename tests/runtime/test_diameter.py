"""How large the objects are: told by the model, and asked for only where nobody says it."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import darcnn.runtime
from darcnn.runtime import Segmenter
from darcnn.runtime.diameter import (
    _choose_tiles,
    choose_diameter,
    estimate_diameter,
    finds_unasked,
    settle_diameter,
)
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.fit import warn_of_size
from darcnn.runtime.geometry import Region
from darcnn.runtime.pipeline import run_slide
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.run_options import RunOptions

NAMES = ("u2os_212b858a66", "dim_1f00080601")


@pytest.fixture(scope="module")
def segmenter():
    if "nuclei-fluorescence" not in darcnn.runtime.shipped_models():
        pytest.skip("the model is not in this checkout")
    with darcnn.runtime.load("nuclei-fluorescence", device="cpu") as segmenter:
        yield segmenter


@pytest.fixture(scope="module", params=NAMES)
def picture(request: pytest.FixtureRequest, root: Path):
    """A real image, enlarged so that the model sees enough objects whole, and the diameter in it."""
    folder = root / "tests" / "data" / "evaluate"
    image = Image.open(folder / "images" / f"{request.param}.png")
    labels = np.asarray(Image.open(folder / "labels" / f"{request.param}.png"))
    areas = np.bincount(labels.ravel())[1:]
    return image, float(np.median(2 * np.sqrt(areas[areas > 0] / np.pi)))


def estimate(segmenter: Segmenter, image: Image.Image, enlarged: float) -> float | None:
    size = (round(image.width * enlarged), round(image.height * enlarged))
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    with ArrayReader(pixels) as reader:
        return estimate_diameter(segmenter, reader)


@pytest.mark.parametrize("enlarged", [1.0, 2.0])
def test_the_estimate_is_near_the_truth_and_grows_with_the_image(segmenter, picture, enlarged) -> None:
    image, truth = picture
    found = estimate(segmenter, image, enlarged)
    assert found is not None
    assert (
        1 / 1.7 < found / (enlarged * truth) < 1.7
    )  # of a dozen nuclei between 13 and 42 px, half of them cut


def test_a_few_large_nuclei_are_not_outvoted_by_specks(segmenter, root: Path) -> None:
    """Enlarged, the noise between nuclei looks like specks: 8 px was measured where 71 are right."""
    with Image.open(root / "tests" / "data" / "target" / "u2os_2abc40c118.png") as picture:
        image = picture.convert("L")
    small = estimate(segmenter, image, 1.0)
    for enlarged in (3.0, 6.0, 8.0):
        assert estimate(segmenter, image, enlarged) == pytest.approx(enlarged * small, rel=0.25)


@given(
    st.lists(st.floats(10, 60), min_size=4, max_size=20),
    st.floats(10, 300),
    st.integers(0, 400),
)
@example([10.0, 10.0, 10.0, 30.087170610521596], 10.0, 0)  # times the model's size, by it, is more
def test_the_typical_size_is_of_what_covers_the_image(
    sizes: list[float], factor: float, n_specks: int
) -> None:
    """Whatever the number of specks of 3 px: the objects cover more ground unless there are many of them."""
    model = make_oracle_manifest(OracleEngine(tile_px=32), halo_px=8).input
    large = factor * np.array(sizes)

    def look(scale: float) -> tuple[np.ndarray, np.ndarray]:
        both = np.concatenate([large, np.full(n_specks, 3.0)])
        return both, np.ones(len(both))

    found = settle_diameter(model, look)
    assert found is not None
    assert 3.0 <= found <= large.max()
    if n_specks * 3.0 < large.sum() and large.min() > 1.5 * 3.0 and n_specks > len(sizes):
        assert found >= large.min() * (1 - 1e-9)


def test_what_could_not_be_measured_is_told() -> None:
    model = replace(make_oracle_manifest(OracleEngine(tile_px=32), halo_px=8).input, mpp=0.5)
    for size, has_pixel_size, words in (
        (None, False, "and pixels were taken as they are"),
        (None, True, "and the pixel size was taken to tell the scale"),
        (model.nominal_diameter_px, False, f"taken to be {model.nominal_diameter_px:.0f} px wide"),
    ):
        assert words in warn_of_size(model, size, has_pixel_size=has_pixel_size)
    assert warn_of_size(model, 13.1, has_pixel_size=False) is None


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_smooth_noise_has_no_diameter(segmenter, reach: int) -> None:
    noise = np.random.default_rng(0).poisson(1000, (600, 600)).astype(np.float32)
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-reach, reach + 1))
    with ArrayReader(noise) as reader:
        assert estimate_diameter(segmenter, reader) is None


def test_an_image_without_objects_has_no_diameter(segmenter) -> None:
    with ArrayReader(np.zeros((300, 200), np.uint8)) as reader:
        assert estimate_diameter(segmenter, reader) is None


def test_a_given_size_is_taken_as_it_is(segmenter) -> None:
    with ArrayReader(np.zeros((64, 64), np.uint8)) as reader:
        given = choose_diameter(segmenter, reader, diameter_px=17.0)
        nothing = choose_diameter(segmenter, reader, diameter_px=None, pixels=True)
    assert given == 17.0
    assert nothing is None


@pytest.mark.parametrize(
    ("finds", "model_mpp", "file_mpp", "expected"),
    [
        (True, None, None, True),
        (True, None, 0.5, True),  # the model knows no pixel size: that of the file says nothing to it
        (True, 0.25, None, True),
        (True, 0.25, 0.5, False),
        (False, 0.25, None, False),
    ],
)
def test_pixel_sizes_that_tell_the_scale_make_an_estimate_needless(
    segmenter, finds: bool, model_mpp: float | None, file_mpp: float | None, expected: bool
) -> None:
    model = replace(segmenter.manifest.input, finds_diameter=finds, mpp=model_mpp)
    with ArrayReader(np.zeros((8, 8), np.uint8), mpp=file_mpp) as reader:
        assert finds_unasked(model, reader.info.mpp is not None) is expected


def test_an_empty_picture_of_no_pixel_size_is_taken_as_it_is(segmenter) -> None:
    model = replace(segmenter.manifest, input=replace(segmenter.manifest.input, mpp=0.25))
    nominal = model.input.nominal_diameter_px
    for mpp, asked, expected in ((None, None, nominal), (None, "auto", nominal), (0.5, "auto", None)):
        with ArrayReader(np.zeros((300, 200), np.uint8), mpp=mpp) as reader:
            found = choose_diameter(Segmenter(segmenter.engine, model), reader, diameter_px=asked)
        assert found == expected


def test_a_given_pixel_size_tells_a_model_without_one_nothing(segmenter, picture) -> None:
    assert segmenter.manifest.input.mpp is None
    image = np.asarray(picture[0])
    plain, told = segmenter(image), segmenter(image, mpp=0.7)
    assert np.array_equal(plain.labels(), told.labels())
    with ArrayReader(image) as reader:
        unasked = choose_diameter(segmenter, reader, diameter_px=None)
        assert choose_diameter(segmenter, reader, diameter_px=None, mpp=0.7) == unasked is not None
        knowing = replace(segmenter.manifest, input=replace(segmenter.manifest.input, mpp=0.25))
        there = Segmenter(segmenter.engine, knowing)
        assert choose_diameter(there, reader, diameter_px=None, mpp=0.7) is None


def test_auto_is_what_a_call_without_a_size_does_where_the_model_is_made_for_it(segmenter, picture) -> None:
    image = np.asarray(picture[0])
    unasked, asked = segmenter(image), segmenter(image, diameter_px="auto")
    assert segmenter.manifest.input.finds_diameter
    assert np.array_equal(unasked.labels(), asked.labels())
    with ArrayReader(image) as reader:
        size = estimate_diameter(segmenter, reader)
    assert np.array_equal(unasked.labels(), segmenter(image, diameter_px=size).labels())


def test_a_run_tells_the_size_that_it_measured_and_keeps_quiet_of_one_that_it_was_given(
    segmenter, picture, tmp_path: Path
) -> None:
    image = np.asarray(picture[0])
    for name, options, expected in (
        ("unasked", RunOptions(), True),
        ("asked", RunOptions(diameter_px="auto"), True),
        ("given", RunOptions(diameter_px=25), False),
        ("pixels", RunOptions(pixels=True), False),
    ):
        with ArrayReader(image, name=name) as reader:
            summary = run_slide(segmenter, reader, tmp_path, options=options)
            size = estimate_diameter(segmenter, reader)
            again = run_slide(segmenter, reader, tmp_path, options=options)
        assert summary.measured_px == again.measured_px == (size if expected else None)


def test_pixels_are_taken_as_they_are_when_told(segmenter, picture) -> None:
    image = np.asarray(picture[0])
    nominal = segmenter.manifest.input.nominal_diameter_px
    assert np.array_equal(
        segmenter(image, pixels=True).labels(), segmenter(image, diameter_px=nominal).labels()
    )


def test_what_a_model_found_is_what_it_is_told_that_it_finds(root: Path) -> None:
    if "nuclei-he" not in darcnn.runtime.shipped_models():
        pytest.skip("the model is not in this checkout")
    script = runpy.run_path(str(root / "benchmarks" / "found_diameter.py"))
    arguments = ["nuclei-he", str(root / "tests" / "data" / "tissue"), "--diameter", "19", "--every", "3"]
    result = CliRunner().invoke(script["main"], arguments)
    assert result.exit_code == 0
    first, *_, last = (float(line.split()[2]) for line in result.output.splitlines())
    assert 19 < first < 80
    assert last == pytest.approx(first, rel=0.3)  # it settles


@pytest.mark.parametrize("n_rows", [16, 30])
def test_of_a_large_image_tiles_on_its_ground_are_looked_at_wherever_they_lie(n_rows: int) -> None:
    engine = OracleEngine(tile_px=64, channels=1)
    with Segmenter(engine, make_oracle_manifest(engine, halo_px=16)) as segmenter:
        with ArrayReader(np.zeros((32 * n_rows, 32 * 30), np.uint8)) as reader:
            info, plan = reader.info, segmenter.plan(reader.info)
        model = segmenter.manifest.input
        everywhere = _choose_tiles(model, plan, info, None)
        assert len(everywhere) == 8
        assert len({tile.core.x0 for tile in everywhere}) > 4
        assert len({tile.core.y0 for tile in everywhere}) > 4
        ground = Region(600, 100, 700, 200)

        def touches(region: Region) -> bool:
            x, y = (region.x0 + region.x1) // 2, (region.y0 + region.y1) // 2
            return ground.contains(x, y)

        chosen = _choose_tiles(model, plan, info, touches)
        assert 4 < len(chosen) <= 8
        assert all(touches(tile.core) for tile in chosen)
        assert _choose_tiles(model, plan, info, lambda region: False) == everywhere  # better than nothing


def test_objects_are_measured_on_the_ground_that_is_asked_for(segmenter, root: Path) -> None:
    image = Image.open(root / "tests" / "data" / "evaluate" / "images" / f"{NAMES[0]}.png")
    wide = np.zeros((5000, 5000), np.uint8)

    def paste(x: int, y: int, size: int, enlarged: float) -> None:
        sides = (round(image.width * enlarged), round(image.height * enlarged))
        patch = np.asarray(image.convert("L").resize(sides, Image.Resampling.BICUBIC))
        patch = np.tile(patch, (-(-size // patch.shape[0]), -(-size // patch.shape[1])))[:size, :size]
        wide[y : y + size, x : x + size] = patch

    paste(0, 0, 1300, 3.0)
    paste(2400, 2400, 2600, 1.0)
    ground = Region(2400, 2400, 5000, 5000)

    def touches(region: Region) -> bool:
        x, y = (region.x0 + region.x1) // 2, (region.y0 + region.y1) // 2
        return ground.contains(x, y)

    with ArrayReader(wide) as reader:
        found = estimate_diameter(segmenter, reader, touches=touches)
    with ArrayReader(wide[2400:, 2400:]) as reader:
        alone = estimate_diameter(segmenter, reader)
    assert found == pytest.approx(alone, rel=0.25)
