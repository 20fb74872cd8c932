"""bfloat16 in OpenVINO: which part of a graph computes in it, and what that does to the findings."""

from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from darcnn.runtime import cores
from darcnn.runtime.boxes import pairwise_iou
from darcnn.runtime.engines import openvino as engine_module
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.openvino import OpenVinoEngine, computes_bfloat16
from darcnn.runtime.engines.openvino_parts import cut_for_bfloat16
from darcnn.runtime.engines.openvino_pooling import fuse_pooling
from darcnn.runtime.errors import DeviceError, UsageError
from darcnn.runtime.load import find_bundle

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'darcnn[openvino]'")
GRAPHS = ["detect", "mask"]
# What makes boxes of deltas, says where to pool, and decides between objects.
EXACT = {"Exp", "Sigmoid", "Softmax", "TopK", "Floor", "Sqrt", "Greater", "GreaterEqual", "Less", "Select"}


@pytest.fixture(scope="module")
def bundle():
    return find_bundle("nuclei-he")


@pytest.fixture(scope="module")
def tile(bundle):
    with Image.open("tests/data/tissue/purple_0e21d7b3ee.png") as picture:
        pixels, side = np.asarray(picture.convert("RGB")), bundle.manifest.input.tile_px
    return np.pad(pixels, [(0, side - n) for n in pixels.shape[:2]] + [(0, 0)], "reflect")[None]


@pytest.fixture(scope="module")
def pieces(bundle):
    core = openvino.Core()
    models = {graph: core.read_model(bundle.read(f"{graph}.onnx")) for graph in GRAPHS}
    for model in models.values():
        fuse_pooling(model)
    return {graph: cut_for_bfloat16(model) for graph, model in models.items()}


def types(part):
    return {node.get_type_name() for node in part.model.get_ordered_ops()}


def run(parts, feeds):
    core, values = openvino.Core(), dict(feeds)
    for part in parts:
        compiled = core.compile_model(part.model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled.create_infer_request().infer([values[name] for name in part.inputs])
        values |= {name: np.array(found[place]) for place, name in enumerate(part.outputs)}
    return values


def test_convolutions_are_in_bfloat16_and_what_decides_on_boxes_is_not(pieces):
    for parts in pieces.values():
        for part in parts:
            if part.in_bfloat16:
                assert types(part).isdisjoint(EXACT)
            else:
                assert types(part).isdisjoint({"Convolution", "GroupConvolution", "ConvolutionBackpropData"})
    assert [part.in_bfloat16 for part in pieces["detect"]] == [False, True, False, True, False]
    assert [part.in_bfloat16 for part in pieces["mask"]] == [False, True, False]
    assert "GroupConvolution" in types(pieces["detect"][1])
    assert {"EmbeddingBagPackedSum", "MatMul"} <= types(pieces["detect"][3])  # pooling, and the box head
    assert {"EmbeddingBagPackedSum", "Convolution"} <= types(pieces["mask"][1])


def test_pieces_in_float32_compute_what_the_whole_computes(bundle, pieces, tile):
    with closing(OpenVinoEngine(bundle)) as engine:
        whole = engine.detect(tile)
        boxes = whole.boxes[0, :64]
        masks = engine.masks(whole, boxes, np.zeros(64, np.int64))
    found = run(pieces["detect"], {"tile": tile})
    np.testing.assert_allclose(found["scores"], whole.scores, atol=1e-4)
    np.testing.assert_allclose(found["boxes"], whole.boxes, atol=1e-2)
    np.testing.assert_allclose(found["atlas"], whole.atlas, atol=1e-3)
    assert found["converged"].astype(bool).tolist() == whole.converged.tolist()
    feeds = {"atlas": whole.atlas, "boxes": boxes, "tile_index": np.zeros(64, np.int64)}
    np.testing.assert_allclose(run(pieces["mask"], feeds)["masks"], masks, atol=1e-4)


def test_the_same_objects_are_found_in_bfloat16(bundle, tile):
    if not computes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    found = []
    for bfloat16 in (False, True):
        with closing(OpenVinoEngine(bundle, bfloat16=bfloat16)) as engine:
            detections = engine.detect(tile)
            rows = np.flatnonzero(detections.scores[0] > 0.3)
            boxes = detections.boxes[0, rows]
            masks = engine.masks(detections, boxes, np.zeros(len(rows), np.int64))
            found.append((boxes, detections.scores[0, rows], masks))
            assert engine.spec.name.endswith("bfloat16") is bfloat16
    (boxes, scores, masks), (other_boxes, other_scores, other_masks) = found
    strong = scores > 0.5
    assert strong.sum() > 10
    iou = pairwise_iou(boxes[strong], other_boxes)
    partner = iou.argmax(1)
    assert (iou.max(1) > 0.9).mean() > 0.9
    apart = np.abs(boxes[strong] - other_boxes[partner])
    assert 0 < np.median(apart) < 0.3  # px; it is another precision
    assert np.median(np.abs(scores[strong] - other_scores[partner])) < 0.01
    assert np.abs(masks[strong] - other_masks[partner]).mean() < 0.02


def test_bfloat16_is_refused_where_it_is_not_to_be_had(bundle, monkeypatch):
    with pytest.raises(
        UsageError, match=r"particles-cryoet\.darcnn is in int8 already; pass --backend openvino"
    ):
        OpenVinoEngine(find_bundle("particles-cryoet"), bfloat16=True)
    monkeypatch.setattr(engine_module, "_has_bfloat16", lambda core: False)
    assert not computes_bfloat16()
    with pytest.raises(DeviceError, match="this CPU does not compute in bfloat16; pass --backend openvino"):
        OpenVinoEngine(bundle, bfloat16=True)


def test_the_backend_is_chosen_by_name_and_runs_on_no_gpu(bundle):
    with pytest.raises(UsageError, match="openvino-bf16 does not run on cuda"):
        open_engine(bundle, backend="openvino-bf16", device="cuda")
    if not computes_bfloat16():
        pytest.skip("this CPU does not compute in bfloat16")
    told = []
    open_engine(bundle, backend="openvino-bf16", tell=told.append).close()
    assert told[-1].startswith("runs on openvino ")
    assert told[-1].endswith("CPU bfloat16")


def test_whoever_takes_the_default_is_told_what_is_faster(bundle, tmp_path, monkeypatch):
    def told_of(bundle, flags):
        (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu avx512f{flags} fsrm\n")
        monkeypatch.setattr(cores, "_CPU_INFO", tmp_path / "cpuinfo")
        told = []
        open_engine(bundle, device="cpu", tell=told.append).close()
        return " ".join(told)

    assert "--backend openvino-bf16" in told_of(bundle, " amx_bf16")
    assert "--backend" not in told_of(bundle, "")
    int8 = find_bundle("particles-cryoet")
    assert "OpenVINO is faster in int8: --backend openvino" in told_of(int8, "")
    assert "bf16" not in told_of(int8, " amx_bf16")
