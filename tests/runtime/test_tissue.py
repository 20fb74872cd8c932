"""The tissue mask loses no tissue, leaves out glass and dark background, and says where it sees neither."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.tissue import TissueMask, find_tissue

GLASS, PINK, PURPLE, GREY = (243, 243, 240), (225, 170, 200), (90, 60, 120), (120, 120, 121)


def on_glass(pieces, shape=(1200, 1500), noise=1.0):
    """Return a picture with rectangles (x0, y0, x1, y1, colour) on glass."""
    picture = np.empty((*shape, 3))
    picture[:] = GLASS
    for x0, y0, x1, y1, colour in pieces:
        picture[y0:y1, x0:x1] = colour
    picture += np.random.default_rng(0).normal(0, noise, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def mask_of(picture, diameter=14.0, channels=None):
    with ArrayReader(picture) as reader:
        return find_tissue(reader, diameter_px0=diameter, channels=channels)


def lies_on(mask, x, y):
    return bool(mask.contains(np.array([float(x)]), np.array([float(y)]))[0])


def test_stain_is_tissue_and_glass_is_not():
    mask = mask_of(on_glass([(300, 200, 900, 700, PINK)]))
    assert mask.rule == "stain on glass"
    assert mask.area_px0 == pytest.approx(600 * 500, rel=0.05)
    assert lies_on(mask, 310, 210)
    assert not lies_on(mask, 1400, 1100)


@pytest.mark.parametrize("white", [np.uint16(65535), np.float32(1)])
def test_tissue_does_not_depend_on_how_colours_are_stored(white):
    picture = on_glass([(300, 200, 900, 700, PINK)])
    expected = mask_of(picture)
    with ArrayReader(picture * (white / 255).astype(white.dtype), is_rgb=True) as reader:
        found = find_tissue(reader, diameter_px0=14.0)
    assert found.rule == "stain on glass"
    assert (found.seen == expected.seen).mean() > 0.999  # means of pixels round otherwise


def test_a_speck_far_from_tissue_is_left_out_and_a_long_thin_strand_is_not():
    strand = (700, 400, 1300, 420, PINK)
    mask = mask_of(on_glass([(200, 200, 700, 700, PINK), strand, (1300, 1000, 1330, 1030, GREY)]))
    assert lies_on(mask, 1295, 410)
    assert not lies_on(mask, 1315, 1015)


def test_in_a_smear_of_single_cells_no_cell_is_a_speck():
    cells = [(x, y, x + 14, y + 14, PURPLE) for x in range(100, 1400, 300) for y in range(100, 1100, 300)]
    mask = mask_of(on_glass(cells))
    assert all(lies_on(mask, x + 7, y + 7) for x, y, *_ in cells)
    assert not lies_on(mask, 250, 250)


def test_without_glass_everything_is_tissue():
    mask = mask_of(on_glass([(0, 0, 1500, 1200, PINK)]))
    assert mask.rule == "no background seen"
    assert mask.cells.all()
    assert mask.area_px0 == 1500 * 1200


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_on_a_dark_background_what_is_bright_is_tissue(dtype):
    generator = np.random.default_rng(1)
    picture = generator.normal(20, 2, (1000, 1400))
    picture[300:340, 400:440] += 5  # a dim nucleus, beside a bright one that sets the range
    picture[700:760, 1000:1060] += 180
    mask = mask_of(np.clip(picture, 0, 255).astype(dtype), diameter=40.0, channels=(0,))
    assert mask.rule == "bright on dark"
    assert lies_on(mask, 420, 320)
    assert lies_on(mask, 1030, 730)
    assert mask.cells.mean() < 0.4


def test_colours_on_dark_that_show_different_things_are_told():
    nuclei, cytoplasm = np.zeros((2, 800, 1000))
    for x in range(100, 1000, 200):
        nuclei[300:340, x : x + 40], cytoplasm[280:380, x : x + 100] = 150, 120
    nothing = np.zeros_like(nuclei)
    for channels, rule in (
        ((nothing, cytoplasm, nuclei), "colours on dark"),
        ((nothing, nothing, nuclei), "bright on dark"),
        ((nuclei, 0.5 * nuclei, nothing), "bright on dark"),  # one channel in orange
        ((nuclei, nuclei, nuclei), "bright on dark"),
        ((nothing, nothing, nothing), "bright on dark"),
    ):
        picture = np.stack(channels, axis=2).astype(np.uint8)
        assert mask_of(picture, diameter=40.0).rule == rule
        assert mask_of(picture, diameter=40.0, channels=(2,)).rule == "bright on dark"  # the one that is seen


def test_a_picture_that_is_neither_dark_nor_on_glass_counts_as_tissue():
    grey = np.random.default_rng(2).normal(130, 20, (600, 600)).clip(0, 255).astype(np.uint8)
    assert mask_of(grey, channels=(0,)).rule == "no background seen"


@pytest.mark.parametrize("pale", [((241, 226, 236), (241, 226, 236)), ((243, 238, 241), (225, 205, 222))])
def test_pale_tissue_on_glass_that_is_white_itself_is_tissue(pale):
    def area(white):
        picture = np.full((1200, 1500, 3), white, np.uint8)
        picture[200:800, 200:1000] = np.linspace(*pale, 800)
        mask = mask_of(picture)
        assert mask.rule == "stain on glass"
        return mask.area_px0

    assert area(255) > 200 * 600
    assert area(255) >= 0.95 * area(254)  # as it was seen before margins were thought of


def nuclei_on_shaded_background(side=1500):
    """Return a dark picture of a camera with an offset, in shaded fields, and where its nuclei lie."""
    rng = np.random.default_rng(5)
    shade = 1.0 + 0.1 * np.sin(np.arange(side) * np.pi / 250.0) ** 2
    picture = 200.0 * shade[:, None] * shade[None] + rng.normal(0, 8, (side, side))
    places = rng.integers(100, side - 100, (60, 2))
    for y, x in places:
        picture[y - 9 : y + 9, x - 9 : x + 9] += 900
    return picture, places


@pytest.mark.parametrize("padded", [0.1, 0.4])
def test_black_outside_of_a_scan_is_neither_tissue_nor_background(padded):
    picture, places = nuclei_on_shaded_background()
    alone = mask_of(picture.astype(np.uint16), channels=(0,))
    side = len(picture)
    wide = np.zeros((side, round(side / (1.0 - padded))), np.uint16)
    wide[:, :side] = picture
    mask = mask_of(wide, channels=(0,))
    assert mask.rule == "bright on dark"
    assert mask.area_px0 == pytest.approx(alone.area_px0, rel=0.1)
    assert mask.area_px0 < 0.1 * picture.size
    assert all(lies_on(mask, x, y) for y, x in places)
    assert not lies_on(mask, wide.shape[1] - 20, 700)


@pytest.mark.parametrize("colour", [0, 255])
@pytest.mark.parametrize("glass", [(240, 238, 228), (208, 207, 206), GLASS])
def test_white_or_black_outside_of_a_scan_is_neither_tissue_nor_glass(colour, glass):
    picture = on_glass([(300, 200, 900, 700, PINK)]).astype(np.int16) + np.subtract(glass, GLASS)
    wide = np.full((1200, 3750, 3), colour, np.uint8)
    wide[:, :1500] = picture.clip(0, 254)
    mask = mask_of(wide)
    assert mask.rule == "stain on glass"
    assert mask.area_px0 == pytest.approx(600 * 500, rel=0.06)
    assert lies_on(mask, 310, 210)


@pytest.mark.parametrize("side", [1, 10, 100, 270])
def test_a_picture_of_few_objects_counts_as_tissue(side):
    nucleus = np.zeros((side, side), np.uint8)
    nucleus[: side // 2, : side // 2] = 200
    assert mask_of(nucleus, channels=(0,)).cells.all() == (side**2 < 400 * 7**2)


def test_values_that_are_not_finite_count_as_dark():
    picture = np.zeros((400, 400), np.float32)
    picture[100:140, 100:140] = 5
    picture[300:, 300:] = np.nan
    mask = mask_of(picture, diameter=40.0, channels=(0,))
    assert lies_on(mask, 120, 120)
    assert not lies_on(mask, 390, 390)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 99.9), st.floats(0, 79.9)), min_size=1, max_size=5), st.integers(1, 9))
def test_a_region_with_a_point_on_tissue_touches_it(points, reach):
    cells = np.random.default_rng(3).random((8, 10)) < 0.3
    mask = TissueMask(cells, cells, 100, 80, "bright on dark")
    x, y = np.array(points).T
    for at_x, at_y, inside in zip(x, y, mask.contains(x, y), strict=True):
        region = Region(int(at_x) - reach, int(at_y) - reach, int(at_x) + reach, int(at_y) + reach)
        assert mask.touches(region) or not inside


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "diameter"), [("fluorescence/val", 27), ("histology/val", 18), ("kumar/test", 28)]
)
def test_no_labelled_nucleus_lies_outside(shared, folder, diameter):
    images = sorted((shared / "data" / folder / "images").iterdir())
    for path in images:
        with Image.open(shared / "data" / folder / "labels" / f"{path.stem}.png") as picture:
            labels = np.asarray(picture).astype(np.int64)
        ys, xs = np.nonzero(labels)
        counts = np.bincount(labels[ys, xs])
        present = counts > 0
        x, y = (np.bincount(labels[ys, xs], at)[present] / counts[present] + 0.5 for at in (xs, ys))
        with open_source(path) as reader:
            mask = find_tissue(reader, diameter_px0=diameter, channels=None if reader.info.is_rgb else (0,))
        assert mask.contains(x, y).all(), path.name
