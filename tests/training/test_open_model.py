"""A model to judge: which of its kinds need PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from darcnn.runtime.errors import InputError
from darcnn.training.open_model import open_model

PROGRAM = """
import sys
from darcnn.training.open_model import is_checkpoint, open_model
assert not is_checkpoint("nuclei-he")
with open_model("nuclei-he", min_score=0.9) as segmenter:
    assert segmenter.min_score == 0.9
assert "torch" not in sys.modules
"""


def test_a_bundle_is_judged_without_loading_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_that_is_not_finished_is_told_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapt").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is a run that is not finished; finish it with --resume"):
        open_model(str(tmp_path / "run"))
