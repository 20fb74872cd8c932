"""The images that the tests ship: few, small, and each with its origin."""

from __future__ import annotations

import re
from pathlib import Path

FOLDERS = ("source", "target", "tissue", "evaluate")
MAX_BYTES = 300_000


def test_every_file_is_listed_with_its_origin(data: Path) -> None:
    folders = (*FOLDERS, "detectron2")
    files = {
        path.relative_to(data).as_posix() for f in folders for path in (data / f).rglob("*") if path.is_file()
    }
    listed = set(re.findall(r"^\| `([^`]+)` \|", (data / "PROVENANCE.md").read_text(encoding="utf-8"), re.M))
    assert files == listed


def test_all_images_together_are_small(data: Path) -> None:
    assert sum(path.stat().st_size for f in FOLDERS for path in (data / f).rglob("*")) < MAX_BYTES
