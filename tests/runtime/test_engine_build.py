"""What is refused before an engine is built, what is said where a build fails, and how Ctrl-C ends one."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from darcnn.runtime.bundle import open_bundle, write_bundle
from darcnn.runtime.engines import engine_cache, tensorrt, tensorrt_build
from darcnn.runtime.engines.engine_cache import read_facts
from darcnn.runtime.engines.offsets import has_offsets
from darcnn.runtime.engines.tensorrt import has_engine
from darcnn.runtime.engines.tensorrt_build import (
    BuildOptions,
    _configure,
    build_engine,
    build_plans,
    load_backend,
)
from darcnn.runtime.errors import BundleError, DeviceError, OutputError, UsageError
from darcnn.runtime.load import find_bundle

RTX = "tensorrt-rtx"
QUANTISED = """<ir_version: 9, opset_import: ["" : 18]>
mask (float[2] x) => (float[2] y)
<float scale = {1}, %s zero = {0}>
{
    q = QuantizeLinear (x, scale, zero)
    y = DequantizeLinear (q, scale, zero)
}"""
WITH_BIAS = """<ir_version: 9, opset_import: ["" : 18]>
mask (float[2] x) => (float[2] y)
<float scale = {1}, int32[2] bias = {1, 2}>
{
    b = DequantizeLinear (bias, scale)
    y = Add (x, b)
}"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_cache, "_cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def with_mask_graph(bundle, text):
    onnx = pytest.importorskip("onnx", reason="the tiny graphs are made with onnx")
    return bundle.with_graphs(
        {"mask.onnx": onnx.parser.parse_model(text).SerializeToString()}, precision="int8"
    )


def test_graphs_with_offsets_are_told_from_those_without(bundle):
    assert has_offsets(with_mask_graph(bundle, QUANTISED % "uint8"))
    assert has_offsets(with_mask_graph(bundle, WITH_BIAS))
    assert not has_offsets(with_mask_graph(bundle, QUANTISED % "int8"))
    assert not has_offsets(bundle)
    for wrong in (b"not a graph", b"\xff" * 100, b"\x3a\xff\x01", b"\x38\x07", b""):
        assert not has_offsets(bundle.with_graphs({"mask.onnx": wrong}, precision="int8"))


def test_int8_made_for_cpus_is_refused_before_it_is_compiled(trt, tmp_path):
    with pytest.raises(UsageError, match=r"made in int8 for CPUs.*darcnn-export bundle") as caught:
        build_engine(find_bundle("particles-cryoet"), BuildOptions(RTX, ("sm86",)), out=tmp_path / "engine")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "engine").exists()


def test_a_bundle_whose_manifest_or_graph_is_wrong_is_not_compiled(
    trt, tmp_path, manifest, members, make_members
):
    write_bundle(tmp_path / "a.darcnn", replace(manifest, graphs={}), members)
    with pytest.raises(BundleError, match="does not say what atlas is"):
        build_plans(open_bundle(tmp_path / "a.darcnn"), BuildOptions(RTX, ("sm86",)))
    write_bundle(tmp_path / "b.darcnn", manifest, make_members(slots=7))
    with pytest.raises(BundleError, match=r"detect\.onnx has boxes float32 \[2, 7, 4\]"):
        build_plans(open_bundle(tmp_path / "b.darcnn"), BuildOptions(RTX, ("sm86",)))


@pytest.mark.parametrize("workspace_mib", [0, -1, 99999999999999])
def test_a_workspace_that_cannot_be_is_refused(trt, bundle, workspace_mib):
    with pytest.raises(UsageError, match=r"--workspace: .* MiB is not between 1 and 1048576"):
        build_plans(bundle, BuildOptions(RTX, ("sm86",), workspace_mib))


def test_a_workspace_that_is_too_small_is_said(trt):
    with pytest.raises(BundleError, match="; raise --workspace or leave it out, or run"):
        build_plans(find_bundle("nuclei-he"), BuildOptions(RTX, ("sm86",), 1))


def test_float32_for_turing_is_said_to_need_half_precision(trt):
    with pytest.raises(BundleError, match="; pass --precision fp16 to `darcnn-export engine`, as sm75"):
        build_plans(find_bundle("nuclei-he"), BuildOptions(RTX, ("SM75", "sm86")))


def test_the_same_targets_are_the_same_engine(trt, bundle, cache):
    folders = {
        build_engine(bundle, BuildOptions(RTX, targets))
        for targets in (("sm89", "SM86"), ("sm86", "sm89", "sm86"))
    }
    assert len(folders) == 1
    assert read_facts(folders.pop()).targets == ("sm86", "sm89")


def test_a_folder_that_is_taken_is_refused_before_the_build(trt, bundle, tmp_path):
    told, options = [], BuildOptions(RTX, ("sm86",))
    build_engine(bundle, options, out=tmp_path / "engine")
    with pytest.raises(OutputError, match="pass --overwrite"):
        build_engine(bundle, options, out=tmp_path / "engine", progress=lambda *step: told.append(step))
    assert told == []
    build_engine(bundle, options, out=tmp_path / "engine", overwrite=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
@pytest.mark.parametrize("begun", ["detect", "mask"])
def test_ctrl_c_ends_a_build_and_nothing_is_written(trt, bundle, tmp_path, begun, heeds_ctrl_c):
    sent = []

    def press(phase, done, total):
        if phase.startswith(begun) and not sent:
            sent.append(phase)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        build_engine(bundle, BuildOptions(RTX, ("sm86",)), out=tmp_path / "engine", progress=press)
    assert sent
    assert not (tmp_path / "engine").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_build_in_another_thread_leaves_ctrl_c_alone(trt, bundle):
    plans = []
    thread = threading.Thread(target=lambda: plans.append(build_plans(bundle, BuildOptions(RTX, ("sm86",)))))
    thread.start()
    thread.join()
    assert set(plans[0][0]) == {"detect", "mask"}


def test_a_bundle_is_named_as_a_shell_takes_it(bundle, tmp_path):
    assert find_bundle("nuclei-he").argument == "nuclei-he"
    path = tmp_path / "it's mine.darcnn"
    assert shlex.split(replace(bundle, path=path).argument) == [str(path)]


def test_float32_is_not_computed_in_fewer_digits(trt):
    backend = load_backend(RTX)
    config = backend.Builder(backend.Logger(backend.Logger.INTERNAL_ERROR)).create_builder_config()
    _configure(backend, config, BuildOptions(RTX, ("sm86",)))
    assert not config.get_flag(backend.BuilderFlag.TF32)


def test_an_engine_is_kept_where_the_times_of_its_build_are_not(trt, bundle, tmp_path, monkeypatch):
    """TensorRT itself needs a GPU to build: its plans are played."""
    monkeypatch.setattr(tensorrt_build, "load_backend", lambda name: SimpleNamespace(__version__="11.0"))
    monkeypatch.setattr(tensorrt_build, "gpu_name", lambda: "a GPU")
    plans = {"detect": b"d", "mask": b"m"}
    monkeypatch.setattr(tensorrt_build, "build_plans", lambda *given, **options: (plans, b"times"))
    (tmp_path / "file").touch()
    monkeypatch.setattr(tensorrt_build, "timing_cache_path", lambda *facts: tmp_path / "file" / "times.bin")
    folder = build_engine(bundle, BuildOptions("tensorrt"), out=tmp_path / "engine")
    assert (folder / "detect.plan").read_bytes() == b"d"


def test_a_gpu_that_rtx_does_not_know_is_told_of(trt, bundle, monkeypatch):
    monkeypatch.setattr(tensorrt, "gpu_capability", lambda: "sm90")
    monkeypatch.setattr(tensorrt, "gpu_name", lambda: "a large GPU")
    with pytest.raises(DeviceError, match=r"does not know sm90, this GPU; choose another --backend"):
        has_engine(bundle, RTX)
    monkeypatch.setattr(tensorrt, "gpu_capability", lambda: "sm89")
    assert not has_engine(bundle, RTX)
