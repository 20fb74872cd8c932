"""`open_source` finds the reader, and tells every bad file by name and fix."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from darcnn.runtime.errors import DarcnnError, InputError, UsageError
from darcnn.runtime.readers import Reader, open_source
from darcnn.runtime.readers.open import SUFFIXES
from darcnn.runtime.readers.picture import PictureReader
from darcnn.runtime.readers.slide import SlideReader
from darcnn.runtime.readers.tiff import TiffReader

SVS = Path(__file__).parents[2] / "examples" / "CMU-1-Small-Region.svs"
PIXELS = np.zeros((64, 64, 3), np.uint8)


def tiff_file(path: Path) -> Path:
    tifffile.imwrite(path, PIXELS, photometric="rgb", tile=(32, 32))
    return path


def picture_file(path: Path) -> Path:
    Image.fromarray(PIXELS).save(path, "PNG")
    return path


def kind_of(path: Path) -> type[Reader]:
    with open_source(path) as reader:
        return type(reader)


@pytest.mark.parametrize("name", ["a.svs", "a.SVS", "a.tif", "a.tiff", "a.unknown", "a"])
def test_a_scanners_tiff_goes_to_openslide_under_any_name(tmp_path: Path, name: str) -> None:
    assert kind_of(Path(shutil.copy(SVS, tmp_path / name))) is SlideReader


@pytest.mark.parametrize("name", ["a.tif", "a.ome.TIFF", "a.svs", "a.unknown", "a"])
def test_any_other_tiff_goes_to_tifffile(tmp_path: Path, name: str) -> None:
    assert kind_of(tiff_file(tmp_path / name)) is TiffReader


def test_a_scanners_tiff_of_sixteen_bits_keeps_them(tmp_path: Path) -> None:
    path, values = tmp_path / "a.svs", np.arange(4096, dtype=np.uint16).reshape(64, 64)
    said = "Aperio Image Library v12.0.16\r\n64x64 (32x32) RAW|AppMag = 20|MPP = 0.5"
    tifffile.imwrite(path, values, tile=(32, 32), description=said, metadata=None, photometric="minisblack")
    with open_source(path) as reader:
        assert (reader.info.dtype, reader.info.channel_names) == (np.uint16, ("grey",))
        assert (reader.info.mpp, reader.info.mpp_source) == ((0.5, 0.5), "Aperio MPP")
        np.testing.assert_array_equal(reader.read(reader.info.whole, level=0)[:, :, 0], values)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.unknown", "a"])
def test_a_picture_goes_to_pillow(tmp_path: Path, name: str) -> None:
    assert kind_of(picture_file(tmp_path / name)) is PictureReader


def test_a_path_may_be_text() -> None:
    with open_source(str(SVS)) as reader:
        assert reader.info.path == SVS


def test_the_pixel_size_of_the_user_reaches_every_reader(tmp_path: Path) -> None:
    for path in (SVS, tiff_file(tmp_path / "a.tif"), picture_file(tmp_path / "a.png")):
        with open_source(path, mpp=0.3) as reader:
            assert (reader.info.mpp, reader.info.mpp_source) == ((0.3, 0.3), "--mpp")
        with pytest.raises(UsageError, match="--mpp"):
            open_source(path, mpp=-0.3)


@pytest.mark.parametrize(("z", "t", "option"), [(3, None, "--z"), (None, 1, "--t"), (-1, None, "--z")])
def test_a_plane_that_does_not_exist_is_refused_by_every_reader(
    tmp_path: Path, z: int | None, t: int | None, option: str
) -> None:
    for path in (SVS, tiff_file(tmp_path / "a.tif"), picture_file(tmp_path / "a.png")):
        with pytest.raises(InputError, match=f"leave {option} out"):
            open_source(path, z=z, t=t)


def refusal(path: Path) -> DarcnnError:
    with pytest.raises(InputError) as caught:
        open_source(path)
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_an_empty_file_and_a_folder_are_told(tmp_path: Path, suffix: str) -> None:
    assert refusal(tmp_path / f"missing{suffix}").problem == "no such file"
    empty = tmp_path / f"empty{suffix}"
    empty.touch()
    assert "empty" in refusal(empty).problem
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "folder" in refusal(folder).problem


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".xyz", ""])
@pytest.mark.parametrize(
    "content", [b"just some text\n" * 100, b"\0" * 4096, b"I", b"II*\0", b"BM", b"\x89PNG"]
)
def test_what_is_no_image_is_told(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refusal(path)


def test_an_unknown_format_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("a,b\n1,2\n")
    assert ".svs" in refusal(path).fix


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_told(tmp_path: Path) -> None:
    path = tiff_file(tmp_path / "a.tif")
    path.chmod(0)
    assert "may not be read" in refusal(path).problem


@pytest.mark.parametrize(
    ("error", "problem"), [(PermissionError(13, "denied"), "may not"), (OSError(5, "I/O error"), "I/O error")]
)
def test_what_the_system_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, problem: str
) -> None:
    path = tiff_file(tmp_path / "a.tif")

    def refuse(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Path, "open", refuse)
    assert problem in refusal(path).problem


@pytest.mark.parametrize("kept", [100, 3000, 200_000, 1_000_000, 1_900_000])
def test_a_truncated_slide_is_told(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(SVS.read_bytes()[:kept])
    refusal(path)
