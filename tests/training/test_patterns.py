"""Patterns of a recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from darcnn.runtime.errors import InputError
from darcnn.training.data.patterns import find_files, find_images, images_of_folder


def test_a_pattern_is_relative_to_the_data_folder_with_a_slash_or_without(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("b.png", "a.png", "c.txt"):
        (tmp_path / "images" / name).touch()
    for pattern in ("images/*.png", "/images/*.png"):
        assert [path.name for path in find_files(tmp_path, pattern, key="x")] == ["a.png", "b.png"]
    assert find_files(tmp_path, "", key="x") == []


def test_what_is_no_pattern_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^target\.sets\.images: '\.' is no pattern"):
        find_files(tmp_path, ".", key="target.sets.images")


def test_a_pattern_may_be_an_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a.png").touch()
    pattern = str(tmp_path / "else" / "*.png")
    assert find_files(tmp_path / "data", pattern, key="x") == [tmp_path / "else" / "a.png"]


def test_a_folder_stands_for_its_images_and_an_ome_zarr_for_itself(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.png", "a.png", "._a.png", "notes.txt", "Thumbs.db"):
        (folder / name).touch()
    with tifffile.TiffWriter(folder / "c.tif", ome=True) as file:
        for value in (1, 2):
            file.write(np.full((8, 9), value, np.uint8), metadata={"axes": "YX"})
    zarr.create_group(folder / "d.zarr", zarr_format=2)
    expected = ["a.png", "b.png", "c.tif/0", "c.tif/1", "d.zarr"]
    for found in (images_of_folder(folder), find_images(tmp_path, "images", key="x")):
        assert [path.relative_to(folder).as_posix() for path in found] == expected
    (tmp_path / "images" / "labels").mkdir()
    (tmp_path / "images" / "labels" / "a.png").touch()
    found = find_images(tmp_path, "images/*", key="x")
    assert [path.name for path in found if path.suffix == ".png"] == ["a.png", "b.png"]
    (one,) = find_images(tmp_path, "images/d.zarr", key="x")
    assert one.name == "d.zarr"


def test_one_of_the_images_of_each_file_may_be_meant(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif"):
        (tmp_path / name).touch()
    found = find_images(tmp_path, "*.tif/1", key="x")
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["a.tif/1", "b.tif/1"]


def test_what_macos_leaves_beside_images_is_none(tmp_path: Path) -> None:
    for name in ("a.png", "._a.png"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path, "*.png", key="x")] == ["a.png"]
