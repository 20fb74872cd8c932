"""Classes made one, and torchvision's Mask R-CNN in its place here."""

from __future__ import annotations

import math
from typing import Any
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.ops import FrozenBatchNorm2d

from darcnn.runtime.errors import InputError
from darcnn.training.model.foreign_weights import collapse_classes
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_coco

LAYERS = {"box_predictor.cls_score": 1, "box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
N_FEATURES = 16


def class_layers(n_classes: int) -> dict[str, Tensor]:
    tensors = {}
    for layer, n_rows in LAYERS.items():
        tail = (N_FEATURES, 1, 1) if "mask" in layer else (N_FEATURES,)
        tensors[f"source_heads.{layer}.weight"] = torch.randn(n_rows * (1 + n_classes), *tail)
        tensors[f"source_heads.{layer}.bias"] = torch.randn(n_rows * (1 + n_classes))
    return tensors


def predict(tensors: dict[str, Tensor], layer: str, features: Tensor) -> Tensor:
    weight, bias = (tensors[f"source_heads.{layer}.{kind}"] for kind in ("weight", "bias"))
    return features @ weight.flatten(1).T + bias


def test_score_of_the_object_is_at_most_that_of_all_classes() -> None:
    tensors, features = class_layers(80), torch.randn(500, N_FEATURES)
    many = predict(tensors, "box_predictor.cls_score", features).softmax(1)
    one = predict(collapse_classes(tensors), "box_predictor.cls_score", features).softmax(1)
    assert one.shape == (500, 2)
    assert (one[:, 1] <= many[:, 1:].sum(1) + 1e-6).all()


def test_score_of_the_object_is_that_of_all_classes_where_they_are_equal() -> None:
    tensors, features = class_layers(80), torch.randn(500, N_FEATURES)
    for kind in ("weight", "bias"):
        rows = tensors[f"source_heads.box_predictor.cls_score.{kind}"]
        rows[1:] = rows[1]
    many = predict(tensors, "box_predictor.cls_score", features).softmax(1)
    one = predict(collapse_classes(tensors), "box_predictor.cls_score", features).softmax(1)
    torch.testing.assert_close(one[:, 1], many[:, 1:].sum(1))


def test_deltas_and_masks_of_the_object_are_the_means_of_the_classes() -> None:
    tensors, features = class_layers(80), torch.randn(50, N_FEATURES)
    for layer, n_rows in (("box_predictor.bbox_pred", 4), ("mask_predictor.mask_fcn_logits", 1)):
        many = predict(tensors, layer, features).reshape(50, 81, n_rows)
        one = predict(collapse_classes(tensors), layer, features).reshape(50, 2, n_rows)
        torch.testing.assert_close(one[:, 1], many[:, 1:].mean(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one[:, 0], many[:, 0])


def test_classes_that_do_not_count_change_nothing() -> None:
    tensors = class_layers(5)
    before = collapse_classes(tensors, [1, 2, 4])
    for layer, n_rows in LAYERS.items():
        for kind in ("weight", "bias"):
            for number in (3, 5):
                tensors[f"source_heads.{layer}.{kind}"][number * n_rows : (number + 1) * n_rows] = math.nan
    after = collapse_classes(tensors, [1, 2, 4])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def coco_model() -> nn.Module:
    """torchvision's Mask R-CNN with 91 classes, seeded random weights and statistics of its own."""
    torch.manual_seed(0)
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5).mul_(1e-3)  # so small that an epsilon shows
        elif name.endswith("running_mean"):
            tensor.uniform_(-0.1, 0.1)
        elif ".bn" in name and name.endswith("weight"):
            tensor.uniform_(0.005, 0.015)
    return model.eval()


@pytest.fixture(scope="module")
def coco_network(coco_model: nn.Module) -> Darcnn:
    network = Darcnn.from_name("resnet50", "coco").eval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MaskRCNN_ResNet50_FPN_Weights, "get_state_dict", lambda self, **_: coco_model.state_dict()
        )
        load_coco(network)
    return network


def test_coco_features_and_proposals_are_those_of_torchvision(coco_network: Darcnn, coco_model: Any) -> None:
    images = torch.rand(1, 3, 64, 96) * 255
    freeze(coco_model)
    overwrite_eps(coco_model, 0.0)  # as torchvision does with these weights
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        theirs = list(coco_model.backbone((images / 255 - mean) / std).values())
        shared = coco_network.shared_encoder(coco_network.trunk(images))
        ours = coco_network.rpn_levels(shared)
        pairs = [*zip(ours, theirs, strict=True)]
        for a, b in zip(coco_network.proposer.head(ours), coco_model.rpn.head(theirs), strict=True):
            pairs += zip(a, b, strict=True)
    for our_map, their_map in pairs:
        spread = float(their_map.std())
        assert spread > 1e-3
        torch.testing.assert_close(our_map, their_map, atol=1e-3 * spread, rtol=0)


def freeze(model: nn.Module) -> None:
    """Put in torchvision's frozen batch norms, which it has where weights are given."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(model, name, frozen)
        else:
            freeze(child)


def test_coco_heads_count_the_80_classes_and_not_the_gaps(coco_network: Darcnn, coco_model: Any) -> None:
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    real = [n for n, name in enumerate(names) if name not in ("__background__", "N/A")]
    assert (len(names), len(real)) == (91, 80)
    theirs, ours = coco_model.roi_heads.box_predictor, coco_network.source_heads.box_predictor
    expected = torch.stack([theirs.cls_score.weight[0], theirs.cls_score.weight[real].mean(0)])
    torch.testing.assert_close(ours.cls_score.weight, expected)
    torch.testing.assert_close(
        ours.cls_score.bias[1], theirs.cls_score.bias[real].mean() + math.log(len(real))
    )
    deltas = theirs.bbox_pred.weight.reshape(91, 4, -1)[real].mean(0)
    torch.testing.assert_close(ours.bbox_pred.weight[4:], deltas)
    masks = coco_model.roi_heads.mask_predictor.mask_fcn_logits.weight[real].mean(0)
    torch.testing.assert_close(coco_network.source_heads.mask_predictor.mask_fcn_logits.weight[1], masks)
    torch.testing.assert_close(
        coco_network.target_heads.box_head.fc6.weight, coco_model.roi_heads.box_head.fc6.weight
    )


@pytest.mark.parametrize("error", [URLError("no network"), RuntimeError("invalid hash value")])
def test_weights_that_cannot_be_downloaded_are_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: object, **_: object) -> None:
        raise error

    monkeypatch.setattr(MaskRCNN_ResNet50_FPN_Weights, "get_state_dict", fail)
    with torch.device("meta"):
        network = Darcnn.from_name("resnet50", "coco")
    with pytest.raises(InputError, match="COCO weights cannot be downloaded") as caught:
        load_coco(network)
    assert "\n" not in str(caught.value)
