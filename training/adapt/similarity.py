"""L_sim: maximum mean discrepancy between the shared features of both domains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darcnn.training.parallel import gather

__all__ = ["maximum_mean_discrepancy", "project", "similarity_loss"]

_BANDWIDTH_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # a family of kernels: one scale saturates on far domains
_MAX_SIDE = 32  # larger levels are pooled to at most 32 x 32 before they are flattened


def maximum_mean_discrepancy(source: Tensor, target: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of two samples, a scalar >= 0.

    DARCNN (CVPR 2021), equation (2): the three double means of a Gaussian kernel, biased estimator.
    Deviation: the paper does not state the bandwidth. Here exp(-d^2 / (f * m)), averaged over the
    factors f, with m the median squared distance of the joint batch (without gradient), so that the
    kernel is never saturated, however far the domains are. In an unequal batch most pairs may lie
    within one domain; m is then at least the distance of the closest pair across.

    Args:
        source: (n, d) float32, one row an image of the source.
        target: (m, d) float32, one row an image of the target.
    """
    joint = torch.cat([source, target])
    distances = (joint[:, None] - joint[None]).square().sum(dim=2)  # (n + m, n + m)
    apart = ~torch.eye(len(joint), dtype=torch.bool, device=joint.device)
    n = len(source)
    closest = distances.detach()[:n, n:].min()
    median = torch.maximum(distances.detach()[apart].median(), closest).clamp_min(1e-12)
    kernel = torch.stack([torch.exp(-distances / (f * median)) for f in _BANDWIDTH_FACTORS]).mean(dim=0)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2.0 * kernel[:n, n:].mean()


def project(pyramid: Sequence[Tensor], projection: nn.ModuleList) -> list[Tensor]:
    """Return each level of h_c as one channel, flattened per image: (B, at most 1024).

    DARCNN, section 3.2: a 1x1 convolution with one filter, the same for both domains.
    """
    flat = []
    for level, layer in zip(pyramid, projection, strict=True):
        one_channel = layer(level)  # (B, 1, H, W)
        height, width = one_channel.shape[2:]
        if max(height, width) > _MAX_SIDE:
            one_channel = F.adaptive_avg_pool2d(one_channel, (min(height, _MAX_SIDE), min(width, _MAX_SIDE)))
        flat.append(one_channel.flatten(1))
    return flat


def similarity_loss(source: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Return L_sim, the mean of equation (2) of DARCNN over the levels of two projected pyramids.

    The samples are the images of all processes.
    """
    levels = [maximum_mean_discrepancy(gather(s), gather(t)) for s, t in zip(source, target, strict=True)]
    return torch.stack(levels).mean()
