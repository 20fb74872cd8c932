"""TensorRT as far as a machine without a GPU goes: engines are built, kept and refused, names exist."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from darcnn.runtime.bundle import open_bundle, write_bundle
from darcnn.runtime.engines import cuda, tensorrt, tensorrt_build, tensorrt_graph
from darcnn.runtime.engines.engine_cache import (
    EngineFacts,
    engine_folder,
    find_engines,
    read_engine,
    write_engine,
)
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_plans, load_backend
from darcnn.runtime.errors import BundleError, DeviceError, UsageError

PLANS = {"detect": b"one", "mask": b"two"}


def test_both_graphs_compile_without_a_gpu(trt, bundle):
    told = []
    options = BuildOptions("tensorrt-rtx", ("sm86", "sm89"))
    plans, cache = build_plans(bundle, options, progress=lambda *step: told.append(step))
    assert set(plans) == {"detect", "mask"}
    assert min(len(plan) for plan in plans.values()) > 1000
    assert cache == b""  # TensorRT-RTX times nothing
    assert all(0 < done <= total for _, done, total in told)


def test_a_graph_that_is_none_is_refused_in_one_line(trt, tmp_path, manifest, members):
    write_bundle(tmp_path / "a.darcnn", manifest, {**members, "mask.onnx": b"not a graph"})
    with pytest.raises(BundleError, match=r"tensorrt_rtx .* cannot compile mask\.onnx") as caught:
        build_plans(open_bundle(tmp_path / "a.darcnn"), BuildOptions("tensorrt-rtx"))
    assert "\n" not in str(caught.value)


BUILD_AFTER_A_FAILURE = """
import gc, sys
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_plans
from darcnn.runtime.errors import UsageError

def fail():
    try:
        build_plans(bundle, BuildOptions("tensorrt-rtx", ("sm99",)))
    except UsageError as err:
        kept = [err]  # a circle: only a collection frees the builder in its traceback
        kept.append(kept)

bundle = open_bundle(sys.argv[1])
for n in range(1, 60):
    gc.disable()
    gc.collect()
    fail()
    gc.set_threshold(gc.get_count()[0] + n)  # it comes after so many new objects: some time in the next build
    gc.enable()
    fail()
print("ended")
"""


def test_a_build_after_one_that_failed_does_not_wait_for_ever(trt, bundle):
    command = [sys.executable, "-c", BUILD_AFTER_A_FAILURE, str(bundle.path)]
    assert "ended" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (BuildOptions("tensorrt-rtx", ("sm99",)), "use some of .*sm86"),
        (BuildOptions("tensorrt-rtx", ("CURRENT",)), "no target 'CURRENT'"),
        (BuildOptions("tensorrt-rtx", is_version_compatible=True), "leave it out"),
        (BuildOptions("tensorrt_lite"), "use one of tensorrt, tensorrt-rtx"),
    ],
)
def test_options_that_cannot_be_are_refused(trt, bundle, options, words):
    with pytest.raises(UsageError, match=words):
        build_plans(bundle, options)


def test_a_missing_backend_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(DeviceError, match=r"pip install 'darcnn\[tensorrt-rtx\]'"):
        load_backend("tensorrt-rtx")


def test_a_missing_library_is_said_as_a_missing_backend(monkeypatch):
    def fail(name):
        raise FileNotFoundError(f"Could not find: {name}.dll. Is it on your PATH?\nand more")

    monkeypatch.setattr(tensorrt_build.importlib, "import_module", fail)
    with pytest.raises(DeviceError, match="is not installed") as caught:
        load_backend("tensorrt-rtx")
    assert "\n" not in str(caught.value)


def test_an_engine_is_read_as_it_was_written(tmp_path, bundle, facts):
    folder = engine_folder(facts, tmp_path)
    write_engine(folder, facts, PLANS)
    write_engine(folder, facts, PLANS, overwrite=True)
    found = read_engine(folder, bundle, version="1.7.1", capability="sm86")
    assert (found.facts, found.plans) == (facts, PLANS)
    assert list(find_engines(bundle, "tensorrt-rtx", tmp_path)) == [folder]
    assert list(find_engines(bundle, "tensorrt", tmp_path)) == []


def test_what_an_engine_is_for_decides_where_it_lies(tmp_path, facts):
    others = [
        replace(facts, **change)
        for change in (
            {"bundle_sha256": "0" * 64},
            {"version": "1.8"},
            {"targets": ("sm89",)},
            {"device": "a GPU"},
            {"batch": 9},
            {"backend": "tensorrt"},
            {"precision": "fp16"},
        )
    ]
    assert len({engine_folder(one, tmp_path) for one in (facts, *others)}) == 1 + len(others)


@pytest.mark.parametrize(
    ("change", "asked", "words"),
    [
        ({"bundle_sha256": "0" * 64}, {}, "made of another tiny"),
        ({"version": "1.6"}, {}, "built by tensorrt-rtx 1.6, this is 1.7.1"),
        ({}, {"capability": "sm120"}, "built for sm86, this GPU is sm120"),
        ({"tile_px": 64}, {}, "64 px, the model 2 x 8"),
        ({"version": "0.9", "is_version_compatible": True}, {}, "built by tensorrt-rtx 0.9"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason(
    tmp_path, bundle, facts, change, asked, words
):
    folder = tmp_path / "engine"
    write_engine(folder, replace(facts, **change), PLANS)
    with pytest.raises(DeviceError, match=words):
        read_engine(folder, bundle, **{"version": "1.7.1", "capability": "sm86", **asked})


def test_version_compatible_engines_fit_later_versions(tmp_path, bundle, facts):
    write_engine(tmp_path / "engine", replace(facts, version="1.2", is_version_compatible=True), PLANS)
    assert read_engine(tmp_path / "engine", bundle, version="1.7.1").plans == PLANS


def test_damaged_engines_are_refused(tmp_path, bundle, facts):
    folder = tmp_path / "engine"
    write_engine(folder, facts, PLANS)
    (folder / "mask.plan").write_bytes(b"other")
    with pytest.raises(DeviceError, match=r"mask\.plan is damaged"):
        read_engine(folder, bundle, version="1.7.1")
    content = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**content, "format": 99}))
    with pytest.raises(DeviceError, match="another darcnn"):
        read_engine(folder, bundle, version="1.7.1")
    (folder / "engine.json").write_text("{")
    with pytest.raises(DeviceError, match="no readable engine"):
        read_engine(folder, bundle, version="1.7.1")


def attributes_of(module, names):
    """Return (variable, attribute) for every `variable.attribute` in the module's source."""
    tree = ast.parse(inspect.getsource(module))
    return {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    } | {
        (node.value.attr.lstrip("_"), node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr.lstrip("_") in names
    }


def test_all_names_that_the_code_uses_are_in_the_real_bindings(trt):
    kinds = {
        "trt": trt,
        "builder": trt.Builder,
        "network": trt.INetworkDefinition,
        "parser": trt.OnnxParser,
        "config": trt.IBuilderConfig,
        "cache": trt.ITimingCache,
        "runtime": trt.Runtime,
        "engine": trt.ICudaEngine,
        "context": trt.IExecutionContext,
    }
    used = set().union(*(attributes_of(one, kinds) for one in (tensorrt_build, tensorrt, tensorrt_graph)))
    assert {"execute_async_v3", "set_tensor_address", "create_timing_cache"} <= {name for _, name in used}
    missing = sorted((kind, name) for kind, name in used if not hasattr(kinds[kind], name))
    assert missing == []


def test_all_cuda_names_that_the_code_uses_are_in_the_real_bindings():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'darcnn[tensorrt-rtx]'")
    text = inspect.getsource(cuda)
    names = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    used = {name for name in names if isinstance(name, str) and name.startswith("cuda") and name.isalnum()}
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphLaunch"} <= used
    assert [name for name in sorted(used) if not hasattr(runtime, name)] == []
    kinds = {"cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"}
    assert kinds <= set(dir(runtime.cudaMemcpyKind))
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


def has_gpu():
    try:
        cuda.gpu_capability()
    except DeviceError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="this machine has a GPU")
def test_without_a_gpu_the_backend_says_so(trt, bundle):
    pytest.importorskip("cuda.bindings.runtime", reason="pip install 'darcnn[tensorrt-rtx]'")
    with pytest.raises(DeviceError, match="GPU"):
        tensorrt.open_tensorrt(bundle, "tensorrt-rtx")


@pytest.mark.gpu
def test_an_engine_gives_what_onnx_runtime_gives(trt, bundle, tmp_path, monkeypatch):
    from darcnn.runtime.engines import engine_cache
    from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine

    monkeypatch.setattr(engine_cache, "_cache_root", lambda: tmp_path)
    sizes = bundle.manifest.input
    facts = EngineFacts(
        bundle.manifest.name,
        bundle.sha256,
        "tensorrt-rtx",
        trt.__version__,
        (),
        None,
        sizes.batch,
        sizes.tile_px,
    )
    write_engine(engine_folder(facts), facts, build_plans(bundle, BuildOptions("tensorrt-rtx"))[0])
    ours, theirs = tensorrt.open_tensorrt(bundle, "tensorrt-rtx"), OnnxRuntimeEngine(bundle, device="cpu")
    tiles = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    boxes, index = np.float32([[0, 0, 8, 8], [1, 2, 3, 4]]), np.array([1, 0])
    for _ in range(4):  # recorded and launched as one from the third on
        one, other = ours.detect(tiles), theirs.detect(tiles)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
        np.testing.assert_allclose(
            ours.masks(one, boxes, index), theirs.masks(other, boxes, index), rtol=1e-4
        )
    ours.close()
    theirs.close()
