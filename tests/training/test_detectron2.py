"""detectron2's checkpoints: the network computes what detectron2 computes, and refuses other checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import box_iou, nms

from darcnn.runtime.errors import InputError
from darcnn.training.checkpoint import load_network
from darcnn.training.config import Recipe
from darcnn.training.model.detectron2 import load_detectron2, name_in_detectron2, tensors_of_detectron2
from darcnn.training.model.foreign_weights import CLASS_ROWS, collapse_classes
from darcnn.training.model.heads import Heads, make_heads
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import PRESETS, Preset, preset_named
from darcnn.training.model.tensor_file import read_tensors
from darcnn.training.run import Run
from darcnn.training.stages import run_source

N_CLASSES = 80
SIZE = (192, 256)
STEPS = {"p2": 4, "p3": 2}  # of the two finest levels, every fourth and second row and column is kept
CLS_SCORE = "roi_heads.box_predictor.cls_score.weight"
BBOX_PRED = "roi_heads.box_predictor.bbox_pred.weight"
MASKS = "roi_heads.mask_head.predictor.weight"


class Reference(NamedTuple):
    """A picture (1, 3, H, W) in red, green, blue, and what detectron2 computes from it."""

    image: Tensor
    found: dict[str, Tensor]


@pytest.fixture(scope="session")
def checkpoint(data: Path) -> Path:
    return data / "detectron2" / "narrow.pth"


@pytest.fixture(scope="session")
def stored(checkpoint: Path) -> dict[str, Tensor]:
    return read_tensors(checkpoint)


@pytest.fixture(scope="session")
def narrow() -> Preset:
    """The preset of recipes that start from detectron2, at an eighth of the width."""
    return replace(
        preset_named("resnet50", "model.pth"),
        stage_channels=(32, 64, 128, 256),
        pyramid_channels=32,
        box_head_width=64,
        mask_head_layers=(32, 32, 32, 32),
    )


def narrow_resnet50(weights: None, norm_layer: Callable[[int], nn.Module]) -> ResNet:
    """Return torchvision's ResNet-50 at an eighth of the width."""
    body = ResNet(Bottleneck, [3, 4, 6, 3], norm_layer=norm_layer)
    body.inplanes = 8
    body.conv1, body.bn1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), norm_layer(8)
    body.layer1 = body._make_layer(Bottleneck, 8, 3)
    for n, n_blocks in ((1, 4), (2, 6), (3, 3)):
        setattr(body, f"layer{n + 1}", body._make_layer(Bottleneck, 8 * 2**n, n_blocks, stride=2))
    return body


def make_narrow_network(preset: Preset) -> Darcnn:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("darcnn.training.model.backbone.resnet50", narrow_resnet50)
        return Darcnn(preset).eval()


@pytest.fixture
def fresh(narrow: Preset) -> Darcnn:
    return make_narrow_network(narrow)


@pytest.fixture(scope="module")
def loaded(narrow: Preset, checkpoint: Path) -> Darcnn:
    """The narrow network, started from the checkpoint, with the limits that detectron2 was run with."""
    network = make_narrow_network(narrow)
    load_detectron2(network, checkpoint)
    network.proposer._pre_nms_top_n = {"training": 200, "testing": 200}
    network.proposer._post_nms_top_n = {"training": 100, "testing": 100}
    network.source_heads.detections_per_img = 50
    return network


@pytest.fixture(scope="module")
def class_heads(narrow: Preset, stored: dict[str, Tensor], loaded: Darcnn) -> Heads:
    """Heads that keep the checkpoint's 80 classes and pool as detectron2 does."""
    heads = make_heads(narrow, n_classes=N_CLASSES).eval()
    tensors = tensors_of_detectron2(stored, loaded, where="narrow.pth")
    prefix = "source_heads."
    heads.load_state_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)})
    heads.box_roi_pool.samples = heads.mask_roi_pool.samples = 0
    heads.detections_per_img = 50
    return heads


@pytest.fixture(scope="module", params=["astronaut", "coffee"])
def reference(request: pytest.FixtureRequest, data: Path) -> Reference:
    with np.load(data / "detectron2" / f"{request.param}.npz", allow_pickle=False) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    return Reference(found.pop("picture_bgr").flip(2).permute(2, 0, 1)[None].float(), found)


@pytest.fixture(autouse=True)
def _no_gradient() -> object:
    with torch.no_grad():
        yield


def thin(name: str, level: Tensor) -> Tensor:
    step = STEPS.get(name, 1)
    return level[..., ::step, ::step]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_feature_maps_and_rpn_are_those_of_detectron2(loaded: Darcnn, reference: Reference) -> None:
    levels = loaded.rpn_levels(loaded.shared_encoder(loaded.trunk(reference.image)))
    logits, deltas = loaded.proposer.head(levels)
    for number, level in enumerate(levels):
        name = f"p{number + 2}"
        assert reference.found[f"fpn_{name}"].std() > 0.1
        assert_close(thin(name, level), reference.found[f"fpn_{name}"])
        assert_close(thin(name, logits[number]), reference.found[f"rpn_logits_{name}"])
        assert_close(thin(name, deltas[number]), reference.found[f"rpn_deltas_{name}"])


def test_heads_with_all_classes_are_those_of_detectron2(
    loaded: Darcnn, class_heads: Heads, reference: Reference
) -> None:
    found = reference.found
    pyramid = loaded.shared_encoder(loaded.trunk(reference.image))
    pooled = class_heads.box_roi_pool(pyramid, [found["proposals"][::5]])
    logits, deltas = class_heads.box_predictor(class_heads.box_head(pooled))
    assert_close(logits[:, 1:], found["class_logits"][:, :N_CLASSES])
    assert_close(logits[:, 0], found["class_logits"][:, N_CLASSES])
    assert_close(deltas[:, 4:], found["box_deltas"])
    pooled = class_heads.mask_roi_pool(pyramid, [found["boxes"][::5]])
    masks = class_heads.mask_predictor(class_heads.mask_head(pooled)).sigmoid()
    classes = found["classes"][::5] + 1
    assert_close(masks[torch.arange(len(classes)), classes], found["masks_28"])


@pytest.mark.parametrize("samples", [0, 2])
def test_detections_with_all_classes_are_those_of_detectron2(
    loaded: Darcnn, class_heads: Heads, reference: Reference, samples: int
) -> None:
    found = reference.found
    pyramid = loaded.shared_encoder(loaded.trunk(reference.image))
    proposals, _, _ = loaded.proposer.propose(loaded.rpn_levels(pyramid), SIZE)
    class_heads.box_roi_pool.samples = samples  # 2 is what training and export take
    predicted = class_heads.box_predictor(class_heads.box_head(class_heads.box_roi_pool(pyramid, proposals)))
    class_heads.box_roi_pool.samples = 0
    boxes, scores, classes = class_heads.postprocess_detections(*predicted, proposals, [SIZE])
    assert len(found["boxes"]) == len(boxes[0]) == 50
    overlap = box_iou(found["boxes"], boxes[0]) * (found["classes"][:, None] + 1 == classes[0][None])
    best = overlap.max(dim=1)
    assert (best.values > 0.9).float().mean() >= 0.95
    if samples == 0:
        assert_close(scores[0][best.indices], found["scores"])


def test_the_collapsed_network_finds_the_objects_as_one_class(loaded: Darcnn, reference: Reference) -> None:
    pyramid = loaded.shared_encoder(loaded.trunk(reference.image))
    proposals, _, _ = loaded.proposer.propose(loaded.rpn_levels(pyramid), SIZE)
    boxes, scores = loaded.source_heads.detect(pyramid, proposals, SIZE)
    theirs = reference.found["boxes"]
    objects = theirs[nms(theirs, reference.found["scores"], 0.5)]  # one box where several classes had one
    assert (box_iou(objects, boxes[0]).max(dim=1).values > 0.5).float().mean() >= 0.95
    assert (scores[0] > 0.5).all()


def test_all_encoders_and_both_heads_start_equal(loaded: Darcnn) -> None:
    parts = loaded.state_dict()
    for name, tensor in parts.items():
        for twin in ("source_encoder.", "target_encoder."):
            if name.startswith(twin):
                assert torch.equal(tensor, parts[name.replace(twin, "shared_encoder.")])
        if name.startswith("target_heads."):
            assert torch.equal(tensor, parts[name.replace("target_", "source_")])


def test_a_pickle_of_the_model_zoo_starts_the_same_network(
    loaded: Darcnn, stored: dict[str, Tensor], fresh: Darcnn, tmp_path: Path
) -> None:
    arrays = {name: tensor.numpy() for name, tensor in stored.items()}
    content = {"model": arrays, "__author__": "a person", "matching_heuristics": True}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    load_detectron2(fresh, path)
    for name, tensor in fresh.state_dict().items():
        if not name.startswith("projection."):
            assert torch.equal(tensor, loaded.state_dict()[name])


def test_one_class_needs_no_collapse(stored: dict[str, Tensor], fresh: Darcnn) -> None:
    rows = {"cls_score": [7, 80], "bbox_pred": [28, 29, 30, 31], "mask_head.predictor": [7]}
    for name in stored:
        for layer, chosen in rows.items():
            if layer in name:
                stored = stored | {name: stored[name][chosen]}
    tensors = tensors_of_detectron2(stored, fresh, where="x")
    collapsed = collapse_classes(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(collapsed[name], tensor, atol=0, rtol=0)


def test_boxes_and_masks_that_know_no_class_serve_all(stored: dict[str, Tensor], fresh: Darcnn) -> None:
    agnostic = {
        name: tensor[: 4 if "bbox_pred" in name else 1]
        for name, tensor in stored.items()
        if "bbox_pred" in name or "mask_head.predictor" in name
    }
    collapsed = collapse_classes(tensors_of_detectron2(stored | agnostic, fresh, where="x"))
    torch.testing.assert_close(
        collapsed["source_heads.box_predictor.bbox_pred.weight"][4:], agnostic[BBOX_PRED]
    )
    torch.testing.assert_close(
        collapsed["source_heads.mask_predictor.mask_fcn_logits.weight"][1:], agnostic[MASKS]
    )


def test_an_older_checkpoint_says_how_pixels_were_scaled(stored: dict[str, Tensor], fresh: Darcnn) -> None:
    std = torch.tensor([2.0, 3.0, 4.0])[:, None, None]  # blue, green, red
    there, here = "backbone.bottom_up.stem.conv1.weight", "trunk.layers.conv1.weight"
    older = stored | {
        there: stored[there] * std,
        "pixel_std": std,
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675])[:, None, None],
        "proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4),
    }
    ours = tensors_of_detectron2(older, fresh, where="x")[here]
    torch.testing.assert_close(ours, tensors_of_detectron2(stored, fresh, where="x")[here])


def test_names_and_shapes_of_the_model_zoo_fit_the_preset_at_full_width(stored: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        network = Darcnn.from_name("resnet50", "model_final_f10217.pkl")
    full = {}
    for name, tensor in network.state_dict().items():
        if not name.startswith(("trunk.", "shared_encoder.", "proposer.", "source_heads.")):
            continue
        n_rows = CLASS_ROWS.get(name.rpartition(".")[0])
        n_classes = N_CLASSES + ("cls_score" in name)
        shape = tensor.shape if n_rows is None else (n_rows * n_classes, *tensor.shape[1:])
        full[name_in_detectron2(name)] = torch.empty(shape, device="meta")
    assert full.keys() == stored.keys()
    known = {
        "backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7),
        "backbone.bottom_up.res2.0.shortcut.weight": (256, 64, 1, 1),
        "backbone.bottom_up.res5.2.conv2.norm.running_var": (512,),
        "backbone.fpn_lateral5.weight": (256, 2048, 1, 1),
        "proposal_generator.rpn_head.anchor_deltas.weight": (12, 256, 1, 1),
        "roi_heads.box_head.fc1.weight": (1024, 256 * 7 * 7),
        CLS_SCORE: (81, 1024),
        BBOX_PRED: (320, 1024),
        MASKS: (80, 256, 1, 1),
    }
    assert {name: tuple(full[name].shape) for name in known} == known
    collapsed = collapse_classes(tensors_of_detectron2(full, network, where="x"))
    parts = network.state_dict()
    assert all(tensor.shape == parts[name].shape for name, tensor in collapsed.items())


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: {k: t for k, t in stored.items() if k != name}


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda stored: stored | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("backbone.fpn_lateral2.bias"), "lacks the tensor backbone.fpn_lateral2.bias"),
        (without(CLS_SCORE), f"lacks the tensor {CLS_SCORE}"),
        (with_tensor("backbone.fpn_output3.weight", 64, 32, 3, 3), "(64, 32, 3, 3), not (32, 32, 3, 3)"),
        (with_tensor("roi_heads.box_head.fc1.weight", 64), "shape (64,), not (64, 1568)"),
        (with_tensor(CLS_SCORE, 81, 65), "shape (81, 65), not"),
        (with_tensor("backbone.bottom_up.res4.22.conv1.weight", 1), "no place for the tensor backbone"),
        (with_tensor("roi_heads.keypoint_head.conv.weight", 1), "no place for the tensor roi_heads.keypoint"),
        (with_tensor(BBOX_PRED, 318, 64), "has 318 rows, not 320"),
        (with_tensor(MASKS, 79, 32, 1, 1), "has 79 rows, not 80"),
        (with_tensor(CLS_SCORE, 41, 64), "has 41 rows, not 81"),
        (with_tensor("pixel_mean", 3, 1, 1), "less [0.0, 0.0, 0.0]"),
        (with_tensor("pixel_std", 3, 1, 1), "zoo"),
    ],
)  # fmt: skip
def test_another_network_is_refused_by_the_name_of_a_tensor(
    stored: dict[str, Tensor],
    fresh: Darcnn,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
) -> None:
    with pytest.raises(InputError) as caught:
        tensors_of_detectron2(change(stored), fresh, where="model.pth")
    assert str(caught.value).startswith("model.pth: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_full_width_preset_refuses_the_narrow_checkpoint(checkpoint: Path) -> None:
    with torch.device("meta"):
        network = Darcnn.from_name("resnet50", str(checkpoint))
    with pytest.raises(InputError, match=r"has shape \(8, 3, 7, 7\), not \(64, 3, 7, 7\)"):
        load_detectron2(network, checkpoint)


@pytest.fixture
def narrow_recipe(recipe: Recipe, narrow: Preset, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe of one source step whose resnet50 is narrow."""
    plain = replace(narrow, has_stride_in_1x1=False, has_whole_anchors=True)
    monkeypatch.setitem(PRESETS, "resnet50", plain)
    monkeypatch.setattr("darcnn.training.model.backbone.resnet50", narrow_resnet50)
    source_stage = replace(recipe.source_stage, steps=1)
    return replace(
        recipe, preset="resnet50", weights="detectron2/narrow.pth", tile_px=64, source_stage=source_stage
    )


def test_a_run_starts_from_the_checkpoint_in_the_data_folder_and_is_read_back(
    narrow_recipe: Recipe, data: Path, tmp_path: Path, loaded: Darcnn
) -> None:
    with torch.enable_grad():
        trained = run_source(Run(narrow_recipe, data, tmp_path))
    again, _ = load_network(tmp_path / "source")
    assert again.preset == trained.preset == loaded.preset
    image = torch.rand(1, 3, 64, 64) * 255
    assert torch.equal(again.trunk(image), loaded.trunk(image))  # frozen, hence still the checkpoint's
    ours, theirs = trained.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_whose_checkpoint_is_not_there_says_where_it_looked(
    narrow_recipe: Recipe, data: Path, tmp_path: Path
) -> None:
    recipe = replace(narrow_recipe, weights="detectron2/none.pkl")
    with pytest.raises(InputError, match=r"detectron2.none\.pkl: No such file"):
        run_source(Run(recipe, data, tmp_path))
