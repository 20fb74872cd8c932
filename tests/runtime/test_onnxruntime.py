"""The ONNX Runtime engine gives what the graphs compute, or says in one line why it cannot."""

from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from darcnn.runtime.bundle import open_bundle, write_bundle
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.errors import BundleError, DeviceError, UsageError


@pytest.fixture
def engine(tiny_bundle):
    engine = OnnxRuntimeEngine(open_bundle(tiny_bundle), device="cpu")
    yield engine
    engine.close()


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def unknown(name):
    raise metadata.PackageNotFoundError(name)


def rewrite(path, manifest, members):
    write_bundle(path, manifest, members)
    return open_bundle(path)


def test_engine_fits_the_protocol_and_names_itself(engine):
    assert isinstance(engine, Engine)
    spec = engine.spec
    assert spec.name == f"onnxruntime {onnxruntime.__version__} CPUExecutionProvider"
    assert (spec.batch, spec.tile_px, spec.channels) == (2, 8, 3)
    assert (spec.detections, spec.mask_batch, spec.mask_px) == (5, 4, 6)


def test_unknown_device_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="choose one of auto, cpu, cuda"):
        OnnxRuntimeEngine(open_bundle(tiny_bundle), device="tpu")


def test_auto_takes_the_cpu_where_there_is_no_cuda(tiny_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    engine = OnnxRuntimeEngine(open_bundle(tiny_bundle), device="auto")
    assert engine.spec.name.endswith("CPUExecutionProvider")


def test_cuda_names_the_extra_where_onnxruntime_lacks_it(tiny_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(metadata, "version", unknown)
    with pytest.raises(DeviceError, match=r"pip install 'darcnn\[cuda\]'"):
        OnnxRuntimeEngine(open_bundle(tiny_bundle), device="cuda")


def test_cuda_says_so_where_pip_overwrote_it(tiny_bundle, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1")
    with pytest.raises(DeviceError, match="--force-reinstall --no-deps onnxruntime-gpu"):
        OnnxRuntimeEngine(open_bundle(tiny_bundle), device="cuda")


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_cuda_that_does_not_start_is_never_a_silent_cpu(tiny_bundle, monkeypatch):
    # ONNX Runtime offers CUDA, then starts a session without it: what a missing driver looks like
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    bundle = open_bundle(tiny_bundle)
    with pytest.warns(UserWarning, match="not in available provider"):  # noqa: SIM117  # two claims
        with pytest.raises(DeviceError, match="CUDA does not start"):
            OnnxRuntimeEngine(bundle, device="cuda")
    with pytest.warns(UserWarning, match="not in available provider"):
        engine = OnnxRuntimeEngine(bundle, device="auto")
    assert engine.spec.name.endswith("CPUExecutionProvider")


@pytest.mark.gpu
def test_cuda_gives_what_the_cpu_gives(tiny_bundle, tiles):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    bundle = open_bundle(tiny_bundle)
    results = [OnnxRuntimeEngine(bundle, device=device).detect(tiles) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(results[0].scores, results[1].scores, rtol=1e-5)


def test_damaged_graph_is_refused(tmp_path, manifest, members):
    bundle = rewrite(tmp_path / "a.darcnn", manifest, {**members, "mask.onnx": b"not a graph"})
    with pytest.raises(BundleError, match=r"a\.darcnn: ONNX Runtime .* cannot load mask\.onnx"):
        OnnxRuntimeEngine(bundle, device="cpu")


def test_exhausted_memory_is_said_in_one_line(engine, tiles):
    class Exhausted:
        def run(self, outputs, feeds):
            from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

            raise RuntimeException("Failed to allocate memory for requested buffer of size 9\nstack")

    engine._sessions = {"detect": Exhausted()}
    with pytest.raises(DeviceError, match="Failed to allocate") as caught:
        engine.detect(tiles)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "advice"),
    [(2, "or make a model with `darcnn-export bundle MODEL --batch 1`"), (1, "pass --device cpu")],
)
def test_memory_that_gives_out_is_one_line_that_says_what_to_do(engine, tiles, monkeypatch, batch, advice):
    def give_out(*_):
        raise RuntimeException("Failed to allocate memory for requested buffer of size 99\nat line 7")

    monkeypatch.setattr(engine, "_spec", replace(engine.spec, batch=batch))
    monkeypatch.setattr(engine, "_sessions", {"detect": SimpleNamespace(run=give_out)})
    with pytest.raises(
        DeviceError, match=r"detect graph \(Failed to allocate .* 99\); free memory"
    ) as caught:
        engine.detect(tiles[:batch])
    assert str(caught.value).endswith(advice)
