"""L_target: the background of one target image looks the same in every region."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["background_consistency"]

MASK_THRESHOLD = 0.5  # i of equation (4): below it a position is background


def background_consistency(features: Tensor, mask: Tensor, image: Tensor, n_images: int) -> Tensor:
    """Return L_target, a scalar >= 0.

    DARCNN (CVPR 2021), equations (4) to (6): b(r) is the mean of the features over the background
    positions of region r, mu_b the mean of b over the regions of the same image, and the loss the
    mean of | b(r) - mu_b |_1 over regions, divided by the number of channels. The indicator passes no
    gradient; b and mu_b do. An image with fewer than two regions that have background adds zero.

    Args:
        features: (R, C, h, w) features of h_p^t, sampled at mask resolution.
        mask: (R, h, w) mask probabilities of M^t.
        image: (R,) int64, the image each region lies on.
        n_images: images in the batch; the mean over images counts those that add zero.
    """
    background = (mask.detach() < MASK_THRESHOLD).to(features.dtype)[:, None]  # (R, 1, h, w)
    area = background.sum(dim=(2, 3))  # (R, 1)
    mean = (features * background).sum(dim=(2, 3)) / area.clamp_min(1.0)  # (R, C)
    has_background = area[:, 0] > 0
    losses = [features.sum() * 0.0]  # keeps the graph where nothing else adds to it
    for number in range(n_images):
        regions = mean[(image == number) & has_background]
        if len(regions) >= 2:
            losses.append((regions - regions.mean(dim=0, keepdim=True)).abs().mean())
    return torch.stack(losses).sum() / max(n_images, 1)
