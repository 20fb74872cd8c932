"""The steps that docs/export.md tells a client are enough: what follows them finds what darcnn finds."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import darcnn.runtime
from darcnn.export import cli
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
from darcnn.runtime.geometry import Region
from darcnn.runtime.load import find_bundle, shipped_models
from darcnn.runtime.segmenter import Segmenter

HERE = Path(__file__).resolve().parent


def make_client(model, folder, slots):
    """Return the client, which sees the Triton repository of `model` and nothing else of darcnn."""
    from reference_client import Client

    with pytest.raises(SystemExit) as done:
        cli.main(["triton", str(model), "--out", str(folder)])
    assert done.value.code == 0
    sessions = {
        path.name.rpartition("_")[2]: onnxruntime.InferenceSession(path / "1" / "model.onnx")
        for path in folder.iterdir()
    }
    (config,) = folder.glob("*_detect/config.pbtxt")
    stated = re.search(r'key: "manifest" value: \{ string_value: ("(?:[^"\\]|\\.)*")', config.read_text())
    names = ["boxes", "scores", "atlas", "converged"]

    def detect(tile):
        boxes, scores, atlas, converged = sessions["detect"].run(names, {"tile": tile})
        return *best_of(boxes, scores, slots), atlas, converged

    return Client(
        json.loads(json.loads(stated[1])),
        detect,
        lambda atlas, boxes, index: sessions["mask"].run(
            ["masks"], {"atlas": atlas, "boxes": boxes, "tile_index": index}
        )[0],
    )


@pytest.fixture(autouse=True)
def _find_client(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def share_matched(instances, found):
    """Return the share of both sides' objects that have a partner with IoU above 0.9."""
    ours = [
        {(y + top, x + left) for y, x in np.argwhere(mask)}
        for (left, top), mask in zip(instances.origins, instances.masks, strict=True)
    ]
    theirs = [one.pixels for one in found]
    iou = np.array([[len(a & b) / len(a | b) for b in theirs] for a in ours])
    n_matched = (iou.max(axis=1) > 0.9).sum() + (iou.max(axis=0) > 0.9).sum()
    return n_matched / (len(ours) + len(theirs))


def test_the_client_is_made_of_numpy_and_pillow():
    tree = ast.parse((HERE / "reference_client.py").read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert imported == {"PIL", "collections", "itertools", "math", "numpy"}


def best_of(boxes, scores, slots):
    """Return the boxes and scores of a model that reports so many objects of a tile."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :slots]
    return np.take_along_axis(boxes, order[..., None], 1), np.take_along_axis(scores, order, 1)


class FewSlots(OnnxRuntimeEngine):
    slots = 256

    def detect(self, tiles):
        found = super().detect(tiles)
        boxes, scores = best_of(found.boxes, found.scores, self.slots)
        return replace(found, boxes=boxes, scores=scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "slots", "side"),
    [("nuclei-he", 256, 700), ("nuclei-he", 32, 450), ("nuclei-fluorescence", 256, 500)],
)
def test_a_client_finds_what_darcnn_finds_on_real_images(model, slots, side, example_slide, root, tmp_path):
    if model not in shipped_models():
        pytest.skip(f"the model {model} is not in this checkout")
    if model == "nuclei-he":
        with darcnn.runtime.open_source(example_slide) as slide:
            image = slide.read(Region(600, 900, 600 + side, 900 + side), level=0)
        size, scale = {"mpp": 0.499}, 0.499 / 0.25
    else:
        field = np.asarray(Image.open(root / "tests/data/target/u2os_2abc40c118.png"))
        image = np.pad(field, (0, side - len(field)), "symmetric")[..., None]  # 4 tiles
        size, scale = {"diameter_px": 27.0}, 42 / 27
    client = make_client(model, tmp_path / "repository", slots)
    found = client(image, scale)
    bundle = find_bundle(model)
    engine = FewSlots(bundle, device="cpu")
    engine.slots = slots
    with Segmenter(engine, bundle.manifest) as segmenter:
        instances = segmenter(image, **size)
    assert len(instances) >= 50
    assert share_matched(instances, found) > 0.98
