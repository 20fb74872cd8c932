"""Slides through OpenSlide: the facts of a real one, paper under glass, damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from darcnn.runtime.errors import InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.readers.slide import SlideReader, detect_vendor, flatten_on_white

SVS = Path(__file__).parents[2] / "examples" / "CMU-1-Small-Region.svs"


def test_the_facts_of_a_real_slide() -> None:
    with SlideReader(SVS) as reader:
        info = reader.info
    assert (info.width_px0, info.height_px0) == (2220, 2967)
    assert (info.mpp, info.mpp_source) == ((0.499, 0.499), "openslide.mpp-x")
    assert (info.name, info.path, info.is_rgb) == ("CMU-1-Small-Region", SVS, True)
    assert (info.channel_names, info.dtype) == (("red", "green", "blue"), np.uint8)


def test_tissue_agrees_with_another_decoder() -> None:
    region = Region(1000, 1500, 1400, 1800)
    with SlideReader(SVS) as reader:
        pixels = reader.read(region, level=0).astype(int)
    other = tifffile.imread(SVS, series=0)[1500:1800, 1000:1400].astype(int)
    assert np.abs(pixels - other).max() <= 3  # two JPEG decoders may round differently


def test_a_pixel_size_given_by_the_user_wins() -> None:
    with SlideReader(SVS, mpp=0.25) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == ((0.25, 0.25), "--mpp")


def test_a_slide_without_pixel_size_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), photometric="rgb", tile=(32, 32), metadata=None)
    with SlideReader(path) as reader:
        assert (reader.info.mpp, reader.info.mpp_source) == (None, None)


def test_glass_that_was_not_scanned_is_white() -> None:
    rgba = np.array([[[0, 0, 0, 0], [200, 100, 50, 255], [200, 100, 50, 128]]], np.uint8)
    half = np.rint(np.array([200, 100, 50]) * 128 / 255 + 127).astype(int).tolist()
    assert flatten_on_white(rgba).tolist() == [[[255, 255, 255], [200, 100, 50], half]]


@pytest.mark.parametrize("alpha", [0, 1, 127, 254, 255])
def test_white_on_white_is_white(alpha: int) -> None:
    rgba = np.full((2, 2, 4), 255, np.uint8)
    rgba[:, :, 3] = alpha
    assert (flatten_on_white(rgba) == 255).all()


def test_a_slide_has_one_plane() -> None:
    SlideReader(SVS, z=0, t=0).close()
    with pytest.raises(InputError, match="leave --z out"):
        SlideReader(SVS, z=1)


def test_the_vendor_is_told_by_content(tmp_path: Path) -> None:
    text = tmp_path / "a.svs"
    text.write_text("not a slide")
    assert detect_vendor(SVS) == "aperio"
    assert detect_vendor(text) is None


@pytest.mark.parametrize("name", ["a.mrxs", "a.dcm", "a.svs"])
def test_a_text_file_is_no_slide(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("not a slide")
    with pytest.raises(InputError, match=f"{name}: is no slide") as caught:
        SlideReader(path)
    assert "\n" not in str(caught.value)


def test_damaged_tiles_are_told_with_the_file_and_place(tmp_path: Path) -> None:
    path = tmp_path / "damaged.svs"
    content = bytearray(SVS.read_bytes())
    with tifffile.TiffFile(SVS) as tiff:
        page = tiff.pages.first
        for start, n in zip(page.dataoffsets[:4], page.databytecounts[:4], strict=True):
            content[start : start + n] = bytes(n)
    path.write_bytes(content)
    with SlideReader(path) as reader, pytest.raises(InputError, match=r"damaged\.svs: is damaged near x 0"):
        reader.read(Region(0, 0, 100, 100), level=0)
