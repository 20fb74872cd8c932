"""Two graphs of a few nodes whose results can be worked out by hand, and a folder behind a URL."""

import functools
import http.server
import json
import signal
import threading

import pytest

from darcnn.runtime.bundle import open_bundle, write_bundle
from darcnn.runtime.engines.engine_cache import EngineFacts
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import FORMAT, Anchors, Limits, Manifest, ModelInput

B, S, C, D, M, m = 2, 8, 3, 5, 4, 6  # tiles, tile px, channels, slots, boxes per `mask`, mask px


def tiny_manifest():
    return Manifest(
        format=FORMAT,
        name="tiny",
        preset="tiny",
        input=ModelInput(
            tile_px=S,
            halo_px=2,
            stride_px=1,
            batch=B,
            channels=C,
            intensity=IntensityRule("full_range"),
            nominal_diameter_px=3.0,
            mpp=None,
        ),
        anchors=Anchors(sizes_px=(3.0,), ratios=(1.0,), strides_px=(1,)),
        limits=Limits(
            proposals_per_level=D,
            proposals=D,
            detections=D,
            mask_batch=M,
            mask_px=m,
            score_threshold=0.1,
            nms_threshold=0.5,
            min_score=0.5,
        ),
        graphs={
            "detect": {
                "tile": ("uint8", (B, S, S, C)),
                "boxes": ("float32", (B, D, 4)),
                "scores": ("float32", (B, D)),
                "atlas": ("float32", (B, S, S)),
                "converged": ("bool", (B,)),
            },
            "mask": {
                "atlas": ("float32", (B, S, S)),
                "boxes": ("float32", (M, 4)),
                "tile_index": ("int64", (M,)),
                "masks": ("float32", (M, m, m)),
            },
        },
        files={},
    )


def tiny_members(*, slots=D, mask_px=m):
    """Return the members of a bundle but for the manifest; sizes can be made to differ from it."""
    return {
        "detect.onnx": detect_graph(slots),
        "mask.onnx": mask_graph(mask_px),
        "training.json": json.dumps({"recipe": {}}).encode(),
        "LICENSE": b"for tests only\n",
    }


def detect_graph(slots):
    """Scores are a tile's mean / 255, boxes 1 2 3 4, the atlas its mean channel; a dark tile converges."""
    return serialise(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        detect (uint8[{B},{S},{S},{C}] tile) =>
            (float[{B},{slots},4] boxes, float[{B},{slots}] scores, float[{B},{S},{S}] atlas,
             bool[{B}] converged)
        <int64[1] channel = {{3}}, int64[3] all = {{1, 2, 3}},
         int64[2] row = {{{B}, 1}}, int64[1] flat = {{{B}}},
         int64[2] slots = {{{B}, {slots}}}, int64[3] shape = {{{B}, {slots}, 4}},
         float[4] box = {{1, 2, 3, 4}}, float full = {{255}}, float half = {{0.5}}>
        {{
            pixels = Cast <to = 1> (tile)
            atlas = ReduceMean <keepdims = 0> (pixels, channel)
            mean = ReduceMean <keepdims = 0> (pixels, all)
            level = Div (mean, full)
            column = Reshape (level, row)
            scores = Expand (column, slots)
            boxes = Expand (box, shape)
            dark = Less (level, half)
            converged = Reshape (dark, flat)
        }}"""
    )


def mask_graph(size):
    """In each cell of a mask lies the mean of the box's tile of the atlas, plus the x0 of the box."""
    return serialise(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        mask (float[{B},{S},{S}] atlas, float[{M},4] boxes, int64[{M}] tile_index) =>
            (float[{M},{size},{size}] masks)
        <int64[2] plane = {{1, 2}}, int64[1] first = {{0}}, int64[3] one = {{{M}, 1, 1}},
         int64[3] shape = {{{M}, {size}, {size}}}>
        {{
            tiles = Gather <axis = 0> (atlas, tile_index)
            mean = ReduceMean <keepdims = 0> (tiles, plane)
            x0 = Gather <axis = 1> (boxes, first)
            height = Reshape (mean, one)
            offset = Reshape (x0, one)
            value = Add (height, offset)
            masks = Expand (value, shape)
        }}"""
    )


def serialise(text):
    onnx = pytest.importorskip("onnx", reason="the tiny graphs are made with onnx")
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@pytest.fixture
def heeds_ctrl_c():
    """Let Ctrl-C reach the test, also where the shell that runs it in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def manifest():
    return tiny_manifest()


@pytest.fixture(scope="session")
def members():
    return tiny_members()


@pytest.fixture
def make_members():
    return tiny_members


@pytest.fixture
def tiny_bundle(tmp_path, manifest, members):
    path = tmp_path / "tiny.darcnn"
    write_bundle(path, manifest, members)
    return path


@pytest.fixture
def bundle(tiny_bundle):
    return open_bundle(tiny_bundle)


@pytest.fixture
def facts(bundle):
    sizes = bundle.manifest.input
    return EngineFacts(
        bundle_name=bundle.manifest.name,
        bundle_sha256=bundle.sha256,
        backend="tensorrt-rtx",
        version="1.7.1",
        targets=("sm86",),
        device=None,
        batch=sizes.batch,
        tile_px=sizes.tile_px,
    )


@pytest.fixture
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing of each request."""


@pytest.fixture
def served(tmp_path):
    """Return a folder, its address, and what stops the server."""
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop():
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()

    yield folder, f"http://127.0.0.1:{server.server_port}", stop
    stop()
