"""Benchmarks say in one line what they cannot measure; figures are no test's business."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import darcnn.runtime
from darcnn.runtime.segmenter import Segmenter

pytest.importorskip("torch", reason="some benchmarks need torch")


@pytest.fixture
def run(root, tmp_path):
    def call(script, *arguments):
        command = [sys.executable, str(root / "benchmarks" / f"{script}.py"), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        ("engines", ["nosuch", "{slide}"], "no such model"),
        ("engines", ["nuclei-he", "{text}", "--backend", "onnxruntime"], "text.svs"),
        ("throughput", ["{slide}", "--model", "nosuch"], "no such model"),
        ("throughput", ["{slide}", "--backend", "nosuch"], "no backend"),
        ("roofline", ["nosuch"], "no such model"),
        ("precision", ["nosuch", "--folder", ".", "--diameter", "9"], "no such model"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_code_2(
    run, example_slide, tmp_path, script, arguments, word
):
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    code, out, err = run(script, *(part.format(slide=example_slide, text=text) for part in arguments))
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert word in err


@pytest.mark.parametrize(
    ("script", "arguments", "word"),
    [
        ("throughput", [], "nothing to measure"),
        ("throughput", ["--sample", "0"], "--sample"),
        ("throughput", ["--synthetic", "0"], "--synthetic"),
        ("throughput", ["--synthetic", "1024", "--filled", "0"], "--filled"),
        ("roofline", ["nuclei-he", "--threads", "-3"], "--threads"),
        ("engines", ["nuclei-he", "{slide}", "--tiles", "0"], "--tiles"),
    ],
)
def test_an_option_out_of_range_is_a_mistake_of_usage(run, example_slide, script, arguments, word):
    code, out, err = run(script, *(part.format(slide=example_slide) for part in arguments))
    assert (code, out, "Traceback" in err) == (2, "", False), err
    assert word in err.splitlines()[-1]


@pytest.mark.slow
def test_backends_are_timed_on_a_single_tile(run, example_slide):
    code, out, err = run("engines", "nuclei-he", example_slide, "--tiles", 1, "--backend", "onnxruntime")
    assert code == 0, err
    assert "Mpx/s" in out


@pytest.mark.slow
def test_a_run_on_a_volume_is_timed_beside_the_bare_engine(run, shared, tmp_path):
    folder = shared / "data" / "tomograms" / "val"
    code, _, err = run(
        "volumes", "particles-cryoet", "--folder", folder, "--shape", "9,64,64", "--out", "figures.json"
    )
    assert code == 0, err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0.5 < figures["find_over_bare"] < 20
    assert len(figures["quartiles_of_blocks"]) == 3
    assert figures["bare_seconds"] > 0


@pytest.mark.slow
def test_what_the_graphs_cost_is_called_an_estimate(run, tmp_path):
    code, out, err = run("roofline", "nuclei-he", "--out", "costs.json")
    assert code == 0, err
    assert "times the estimate" in out
    assert "bound" not in out


def test_an_engine_that_is_replayed_gives_the_same_objects_and_is_not_asked(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from replayed_engine import ReplayedEngine

    pixels = np.asarray(Image.open(root / "tests" / "data" / "target" / "u2os_2abc40c118.png"))
    with darcnn.runtime.load("nuclei-fluorescence") as loaded:
        replayed = ReplayedEngine(loaded.engine)
        segmenter = Segmenter(replayed, loaded.manifest)
        before = segmenter(pixels, diameter_px=25.0)
        replayed.is_recording = True
        kept = segmenter(pixels, diameter_px=25.0)
        monkeypatch.setattr(loaded.engine, "detect", None)
        monkeypatch.setattr(loaded.engine, "masks", None)
        again = segmenter(pixels, diameter_px=25.0)
    assert len(before) > 2
    for one in (kept, again):
        assert np.array_equal(one.labels(), before.labels())
        assert np.array_equal(one.scores, before.scores)
