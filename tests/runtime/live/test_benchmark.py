"""The benchmark runs through on a bundle of a few nodes; its figures say nothing here."""

import json
import runpy

import pytest
from click.testing import CliRunner

IMAGE = "tests/data/target/u2os_2abc40c118.png"


@pytest.fixture
def run(root, tiny_bundle, tmp_path):
    script = runpy.run_path(str(root / "benchmarks" / "live.py"))

    def run_(*arguments):
        out = tmp_path / "figures.json"
        command = [str(tiny_bundle), str(root / IMAGE), "--device", "cpu", "--out", str(out), *arguments]
        result = CliRunner().invoke(script["main"], command)
        assert result.exit_code == 0, result.output
        return json.loads(out.read_text())

    return run_


def test_the_benchmark_times_frames_alone_and_at_rising_rates(run, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot is drawn with matplotlib")
    plot = tmp_path / "plot.png"
    figures = run("--size", "8", "--size", "16", "--frames", "3", "--plot", str(plot))
    assert [row["tiles"] for row in figures["alone"]] == [1, 9]
    assert len(figures["rates"]) == 2 * 5
    assert all(row["dropped"] + row["max_waiting"] >= 0 for row in figures["rates"])
    assert [row["policy"] for row in figures["flood"]] == ["drop_oldest", "drop_newest"]
    assert plot.stat().st_size > 1000


def test_the_soak_watches_memory_threads_and_files(run):
    soak = run("--soak", "20", "--soak-px", "8")["soak"]
    assert soak["done"] == 20
    assert soak["threads"][0] == soak["threads"][1]
    assert soak["files"][0] == soak["files"][1]


def test_the_bounds_count_a_convolution_and_a_product(root):
    onnx = pytest.importorskip("onnx")
    script = runpy.run_path(str(root / "benchmarks" / "gpu_bounds.py"))
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[1, 3, 8, 8] x, float[5, 3, 3, 3] w, float[4, 6] a, float[6, 2] b)
            => (float[1, 5, 6, 6] y, float[4, 2] z)
        { y = Conv (x, w)  z = MatMul (a, b) }"""
    )
    cost = script["count"](model.SerializeToString())
    assert cost.gflop * 1e9 == pytest.approx(2 * (5 * 6 * 6) * (3 * 3 * 3) + 2 * (4 * 2) * 6)
    assert cost.megabytes * 1e6 == pytest.approx(4 * (5 * 6 * 6 + 4 * 2))


def test_the_bounds_count_what_is_written_in_its_own_type(root):
    onnx = pytest.importorskip("onnx")
    script = runpy.run_path(str(root / "benchmarks" / "gpu_bounds.py"))
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (float[4, 6] a) => (uint8[24] y, float[1] z) <int64[1] flat = {-1}, float16[1] stored = {1}>
        { bytes = Cast <to = 2> (a)  y = Reshape (bytes, flat)  z = Cast <to = 1> (stored) }"""
    )
    assert script["count"](model.SerializeToString()).megabytes * 1e6 == pytest.approx(4 * 6)
