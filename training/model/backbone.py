"""Encoders: the frozen trunk that all domains share, and the trainable rest with its feature pyramid."""

from __future__ import annotations

from collections import OrderedDict

import timm
import torch
from timm.layers.norm_act import FrozenBatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from darcnn.runtime.errors import ShapeError
from darcnn.training.model.presets import Preset

__all__ = ["Encoder", "Trunk", "make_trunk_and_stages", "to_three_channels"]

_LAST_SHARE = 0.25  # of the fourth channel in each of the three inputs


class Trunk(nn.Module):
    """Channels, normalisation, stem and first stage: frozen, hence the same in all three encoders.

    They are computed once; detectron2 calls this FREEZE_AT = 2.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: nn.Sequential, preset: Preset) -> None:
        super().__init__()
        self.layers = layers
        self.register_buffer("mean", torch.tensor(preset.mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preset.std).reshape(1, 3, 1, 1), persistent=False)
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return C2, (B, C, H / 4, W / 4), of `images` (B, 1 to 4, H, W) float32 in 0..255."""
        c2: Tensor = self.layers((to_three_channels(images) - self.mean) / self.std)
        return c2


def to_three_channels(images: Tensor) -> Tensor:
    """Return (B, 3, H, W), what the stem sees of `images` (B, C, H, W) with one to four channels.

    The stem is frozen and was made for photographs. The map is linear, fixed, and keeps the range 0..255:
    one channel goes to all three inputs; two are the first two inputs, their mean is the third; three stay
    as they are; of four, the first three are an input each, and the fourth has a quarter of every input,
    so that each channel has the same share in all (three quarters of an input). What is lost of four is a
    change in the fourth that the three others undo.

    >>> to_three_channels(torch.tensor([[40.0, 80.0]]).reshape(1, 2, 1, 1)).flatten().tolist()
    [40.0, 80.0, 60.0]
    >>> to_three_channels(torch.tensor([[0.0, 0.0, 80.0, 40.0]]).reshape(1, 4, 1, 1)).flatten().tolist()
    [10.0, 10.0, 70.0]
    """
    n_channels = images.shape[1]
    if n_channels == 3:
        return images
    if n_channels == 1:
        return images.expand(-1, 3, -1, -1)
    if n_channels == 2:
        return torch.cat([images, 0.5 * (images[:, :1] + images[:, 1:])], dim=1)
    if n_channels == 4:
        return (1.0 - _LAST_SHARE) * images[:, :3] + _LAST_SHARE * images[:, 3:]
    raise ShapeError(f"images with {n_channels} channels; the network sees one to four")


class Encoder(nn.Module):
    """The stages above the trunk and a feature pyramid (FPN, arXiv:1612.03144)."""

    def __init__(self, stages: nn.ModuleList, preset: Preset) -> None:
        super().__init__()
        self.stages = stages
        self.pyramid = FeaturePyramidNetwork(list(preset.stage_channels), preset.pyramid_channels)

    def forward(self, c2: Tensor) -> list[Tensor]:
        """Return the pyramid of C2: P2 to P5, each (B, pyramid_channels, H / stride, W / stride)."""
        levels = OrderedDict([("p2", c2)])
        for number, stage in enumerate(self.stages, start=3):
            c2 = stage(c2)
            levels[f"p{number}"] = c2
        pyramid: OrderedDict[str, Tensor] = self.pyramid(levels)
        return list(pyramid.values())


class _FrozenNorm(FrozenBatchNormAct2d):
    """timm's frozen normalisation in one pass over memory instead of two."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        activated: Tensor = self.act(y)
        return activated


def make_trunk_and_stages(preset: Preset) -> tuple[nn.Sequential, nn.ModuleList]:
    """Return the layers of the trunk and of the three stages above it, not yet initialised by a checkpoint.

    All batch normalisations are frozen, so that no batch statistics mix domains (DARCNN, section 3.1).
    """
    if preset.name == "resnet50":
        body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        if preset.has_stride_in_1x1:
            for first in (body.layer2[0], body.layer3[0], body.layer4[0]):
                first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        stem = nn.Sequential(
            OrderedDict(
                conv1=body.conv1, bn1=body.bn1, relu=body.relu, maxpool=body.maxpool, layer1=body.layer1
            )
        )
        return stem, nn.ModuleList([body.layer2, body.layer3, body.layer4])
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    body = freeze_batch_norm_2d(body)  # type: ignore[no-untyped-call]  # timm leaves it untyped
    for module in body.modules():
        if isinstance(module, FrozenBatchNormAct2d):
            module.__class__ = _FrozenNorm
    blocks = list(body.blocks.children())
    stem = nn.Sequential(
        OrderedDict(conv_stem=body.conv_stem, bn1=body.bn1, block0=blocks[0], block1=blocks[1])
    )
    stages = [blocks[2:3], blocks[3:5], blocks[5:7]]  # strides 8, 16, 32
    return stem, nn.ModuleList([nn.Sequential(*stage) for stage in stages])
