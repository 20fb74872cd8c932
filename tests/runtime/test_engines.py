"""One suite for every engine: it gives what the graphs compute, whatever runs them."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from darcnn.runtime.bundle import open_bundle, write_bundle
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.engines.openvino import OpenVinoEngine, computes_bfloat16
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.errors import BundleError, DeviceError, ShapeError


def make_onnxruntime(bundle):
    return OnnxRuntimeEngine(bundle, device="cpu")


def make_openvino(bundle):
    pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'darcnn[openvino]'")
    return OpenVinoEngine(bundle)


def make_openvino_in_bfloat16(bundle):
    if not computes_bfloat16():
        pytest.skip("OpenVINO is not installed, or this CPU does not compute in bfloat16")
    return OpenVinoEngine(bundle, bfloat16=True)


@pytest.fixture(params=[make_onnxruntime, make_openvino, make_openvino_in_bfloat16])
def make_engine(request):
    return request.param


@pytest.fixture
def engine(make_engine, tiny_bundle):
    engine = make_engine(open_bundle(tiny_bundle))
    yield engine
    engine.close()


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def rewrite(path, manifest, members):
    write_bundle(path, manifest, members)
    return open_bundle(path)


def test_engine_fits_the_protocol(engine):
    assert isinstance(engine, Engine)
    spec = engine.spec
    assert spec.name.split(" ")[0] in ("onnxruntime", "openvino")
    assert (spec.batch, spec.tile_px, spec.channels) == (2, 8, 3)
    assert (spec.detections, spec.mask_batch, spec.mask_px) == (5, 4, 6)


def test_detect_gives_what_the_graph_computes(engine, tiles):
    tiles[0] //= 4
    tiles[1] |= 128
    found = engine.detect(tiles)
    means = tiles.mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(found.scores, np.tile(means[:, None], (1, 5)), rtol=1e-5)
    np.testing.assert_array_equal(found.boxes, np.tile(np.float32([1, 2, 3, 4]), (2, 5, 1)))
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.converged.tolist() == [True, False]


def test_detect_takes_tiles_that_are_not_contiguous(engine, tiles):
    mirrored = tiles[:, :, ::-1]
    np.testing.assert_array_equal(engine.detect(mirrored).atlas, engine.detect(mirrored.copy()).atlas)


@pytest.mark.parametrize("n_boxes", [0, 1, 3, 4, 5, 8, 11])
def test_masks_takes_any_number_of_boxes(engine, tiles, n_boxes):
    generator = np.random.default_rng(n_boxes)
    boxes = generator.uniform(0, 8, (n_boxes, 4)).astype(np.float32)
    tile_index = generator.integers(0, 2, n_boxes)
    masks = engine.masks(engine.detect(tiles), boxes, tile_index)
    expected = tiles.mean(axis=(1, 2, 3))[tile_index] + boxes[:, 0]
    assert masks.shape == (n_boxes, 6, 6)
    assert masks.dtype == np.float32
    np.testing.assert_allclose(masks, np.broadcast_to(expected[:, None, None], masks.shape), rtol=1e-5)


def test_results_stay_when_the_engine_goes_on(engine, tiles):
    first = engine.detect(tiles)
    scores = first.scores.copy()
    engine.detect(np.zeros_like(tiles))
    np.testing.assert_array_equal(first.scores, scores)


def test_wrong_shapes_are_refused(engine, tiles):
    for wrong in (tiles[:1], tiles.astype(np.int16), tiles[..., :1]):
        with pytest.raises(ShapeError, match="not uint8"):
            engine.detect(wrong)
    found = engine.detect(tiles)
    one = np.zeros((1, 4), np.float32)
    with pytest.raises(ShapeError, match="do not fit"):
        engine.masks(found, one, np.zeros(2, np.int64))
    for index in (-1, 2):
        with pytest.raises(ShapeError, match="tile_index"):
            engine.masks(found, one, np.array([index]))


def test_closed_engine_runs_no_more(engine, tiles):
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.detect(tiles)


def test_graph_that_differs_from_the_manifest_is_refused(tmp_path, manifest, make_members, make_engine):
    bundle = rewrite(tmp_path / "a.darcnn", manifest, make_members(slots=7))
    with pytest.raises(BundleError, match=r"detect\.onnx has boxes float32 \[2, 7, 4\]"):
        make_engine(bundle)
    bundle = rewrite(tmp_path / "b.darcnn", manifest, make_members(mask_px=28))
    with pytest.raises(BundleError, match=r"mask\.onnx has masks float32 \[4, 28, 28\]"):
        make_engine(bundle)


def test_manifest_that_contradicts_itself_is_refused(tmp_path, manifest, members, make_engine):
    limits = replace(manifest.limits, detections=9)
    bundle = rewrite(tmp_path / "a.darcnn", replace(manifest, limits=limits), members)
    with pytest.raises(BundleError, match=r"manifest\.json has boxes .* ask for boxes float32 \[2, 9, 4\]"):
        make_engine(bundle)
    bundle = rewrite(tmp_path / "b.darcnn", replace(manifest, graphs={}), members)
    with pytest.raises(BundleError, match="does not say what atlas is"):
        make_engine(bundle)


@pytest.mark.parametrize("lacking", ["openvino", "openvino.opset8"])
def test_openvino_that_is_missing_or_old_is_said_with_what_to_install(tiny_bundle, monkeypatch, lacking):
    monkeypatch.setitem(sys.modules, lacking, None)
    with pytest.raises(DeviceError, match=r"pip install 'darcnn\[openvino\]'"):
        OpenVinoEngine(open_bundle(tiny_bundle))


def test_a_graph_that_openvino_cannot_compile_is_refused(tmp_path, manifest, members):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    bundle = rewrite(tmp_path / "a.darcnn", manifest, {**members, "mask.onnx": b"not a graph"})
    with pytest.raises(BundleError, match=r"a\.darcnn: OpenVINO .* cannot compile mask\.onnx"):
        OpenVinoEngine(bundle)


ENGINE = """
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.choose import open_engine
open_engine(open_bundle({path!r}), device="cpu", backend={backend!r}).close()
"""


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("onnxruntime", ENGINE),
        ("openvino", ENGINE),
        ("onnx", "import darcnn.export.quantise"),
    ],
)
def test_nothing_reports_to_its_maker(tiny_bundle, tmp_path, package, code):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    home = tmp_path / "home"  # what reports keeps an identifier there, or in the cache
    home.mkdir()
    # without what tells of a CI, where nothing is reported
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "SYSTEMROOT") if name in os.environ}
    folders = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"), str(home))
    code = code.format(path=str(tiny_bundle), backend=package)
    subprocess.run([sys.executable, "-c", code], check=True, env=kept | folders, timeout=120)
    assert list(home.iterdir()) == []


def test_whoever_wants_onnx_runtime_to_report_may(monkeypatch):
    code = "import os, darcnn.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for value, expected in ((None, "1"), ("0", "0")):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        if value is not None:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == expected
