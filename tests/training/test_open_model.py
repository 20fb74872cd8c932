"""A model to judge: which of its kinds need PyTorch."""

from __future__ import annotations

import subprocess
import sys

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
