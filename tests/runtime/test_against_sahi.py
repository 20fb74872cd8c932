"""The comparison with SAHI runs through on a bundle of a few nodes; its figures say nothing here."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest
import shapely
from PIL import Image


@pytest.fixture
def script(root):
    return root / "benchmarks" / "against_sahi.py"


def test_duplicates_are_pairs_that_share_most_of_their_ground(script):
    count_pairs = runpy.run_path(str(script))["count_pairs"]
    whole = shapely.box(0, 0, 10, 10)
    part, moved, far = shapely.box(0, 0, 3, 3), shapely.box(1, 0, 11, 10), shapely.box(50, 0, 60, 10)
    assert count_pairs(np.array([whole, far, part])) == (0, 1)
    assert count_pairs(np.array([moved, whole, far])) == (1, 1)
    assert count_pairs(np.array([], object)) == (0, 0)


def test_the_benchmark_compares_both(script, tiny_bundle, tmp_path):
    pytest.importorskip("sahi", reason="SAHI is not installed")
    Image.fromarray(np.full((20, 24, 3), 200, np.uint8)).save(tmp_path / "a.png")
    out = tmp_path / "figures.json"
    options = ["--slide", tmp_path / "a.png", "--model", tiny_bundle, "--rounds", "1", "--out", out]
    subprocess.run([sys.executable, script, *options], check=True, env=dict(os.environ), timeout=300)
    figures = json.loads(out.read_text())
    ours, theirs = figures["darcnn"][0], figures["sahi"][0]
    assert ours["engine_calls"] > 0
    assert theirs["engine_calls"] > 4  # slices, and the whole image
    assert theirs["objects"] > 0
    assert figures["sahi_by_darcnn"]["peak_gb"] > 0
