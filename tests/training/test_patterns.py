"""Patterns of a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from darcnn.runtime.errors import InputError
from darcnn.training.data.patterns import find_files


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
