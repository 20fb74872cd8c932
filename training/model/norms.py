"""Convolutions and the frozen batch normalisations behind them: folded into one for running, and unfolded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

__all__ = ["NormedConvolution", "normed_convolutions"]


@dataclass(frozen=True, slots=True)
class NormedConvolution:
    """A convolution without a bias, and the frozen normalisation that follows it."""

    path: str  # of the convolution, from where the search began
    convolution: nn.Conv2d
    norm: FrozenBatchNormAct2d | FrozenBatchNorm2d
    parent: nn.Module  # holds the normalisation
    norm_name: str  # there

    def scale(self) -> Tensor:
        """Return what the normalisation multiplies each channel by, (C,)."""
        variance = self.norm.get_buffer("running_var")
        return self.norm.get_buffer("weight") * (variance + self.norm.eps).rsqrt()

    @torch.no_grad()
    def fold(self) -> None:
        """Let the convolution do the normalisation, and leave only the activation behind it."""
        scale = self.scale()
        shift = self.norm.get_buffer("bias") - self.norm.get_buffer("running_mean") * scale
        self.convolution.weight.mul_(scale[:, None, None, None])
        self.convolution.bias = nn.Parameter(shift, requires_grad=False)
        act = self.norm.act if isinstance(self.norm, FrozenBatchNormAct2d) else nn.Identity()
        self.parent.add_module(self.norm_name, act)

    @torch.no_grad()
    def unfold(self, weight: Tensor, bias: Tensor) -> None:
        """Compute what a folded convolution of `weight` and `bias` (C,) does, with the scale as it is."""
        scale = self.scale()
        self.convolution.weight.copy_(weight / scale[:, None, None, None])
        self.norm.get_buffer("bias").copy_(bias + self.norm.get_buffer("running_mean") * scale)


def normed_convolutions(module: nn.Module, prefix: str = "") -> Iterator[NormedConvolution]:
    """Yield the convolutions in `module` that a frozen normalisation follows; they may be folded meanwhile.

    Args:
        module: where to look, at any depth.
        prefix: begins the paths, with its dot.
    """
    before: tuple[str, nn.Module] = "", module
    for name, child in list(module.named_children()):
        if isinstance(child, (FrozenBatchNormAct2d, FrozenBatchNorm2d)) and isinstance(before[1], nn.Conv2d):
            yield NormedConvolution(prefix + before[0], before[1], child, module, name)
        else:
            yield from normed_convolutions(child, f"{prefix}{name}.")
        before = name, child
