"""The sheet of synthesized tiles, a toy run."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image


def test_the_sheet_shows_sixteen_tiles_and_says_how_long_one_took(root: Path, tmp_path: Path) -> None:
    script = runpy.run_path(str(root / "benchmarks" / "synthesis_sheet.py"))
    out = tmp_path / "sheet.png"
    arguments = [str(root / "tests" / "data"), "tissue/*.png", "--nominal", "19", "--tile-px", "64"]
    result = CliRunner().invoke(script["main"], [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "ms a tile of 64 px" in result.output
    with Image.open(out) as sheet:
        assert sheet.size == (4 * 64 + 3 * 4, 4 * 64 + 3 * 4)
        outlined = (np.asarray(sheet) == (255, 255, 0)).all(axis=2)
    assert outlined.any()
    assert not outlined[:64, :64].any()  # the first is shown as it is, the second outlined
