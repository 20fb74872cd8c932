"""Benchmarks say in one line what they cannot measure; figures are no test's business."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
def test_what_the_graphs_cost_is_called_an_estimate(run, tmp_path):
    code, out, err = run("roofline", "nuclei-he", "--out", "costs.json")
    assert code == 0, err
    assert "times the estimate" in out
    assert "bound" not in out
