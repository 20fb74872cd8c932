"""What the losses ask of the network: which anchors and regions are drawn, what is left out, mask targets."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torchvision.ops import roi_align

__all__ = ["Target", "crop_masks", "draw_balanced", "generator_of", "leave_doubtful"]

# boxes (N, 4) px, labels (N,) int64 of ones, masks (N, H, W) uint8, doubtful (K, 4) px: boxes that may be
# objects, seed () int64: of what is drawn at random
Target = dict[str, Tensor]

_DOUBTFUL_COVER = 0.3  # share of a box that lies on something doubtful, from which on it counts for nothing


def generator_of(target: Target, use: int) -> torch.Generator:
    """Return the random generator of one image for one `use`: the same in whatever batch or process it is."""
    return torch.Generator().manual_seed(int(target["seed"]) * 8 + use)


def leave_doubtful(labels: Tensor, boxes: Tensor, target: Target) -> Tensor:
    """Return `labels` (N,) with -1, "neither", for background `boxes` (N, 4) that lie on something doubtful.

    Not in the paper. A pseudo-label that was not sure enough may be an object all the same: to teach it as
    background would keep the next round from finding it.
    """
    doubtful = target["doubtful"]
    if len(doubtful) == 0:
        return labels
    low = torch.maximum(boxes[:, None, :2], doubtful[None, :, :2])  # (N, K, 2)
    high = torch.minimum(boxes[:, None, 2:], doubtful[None, :, 2:])
    inside = (high - low).clamp_min(0).prod(dim=2).amax(dim=1)  # (N,) px^2
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    return torch.where((labels == 0) & (inside > _DOUBTFUL_COVER * area), -1, labels)


def draw_balanced(labels: Tensor, n: int, positive_fraction: float, generator: torch.Generator) -> Tensor:
    """Return up to `n` indices into `labels` (N,), drawn at random: at most that fraction positive (>= 1).

    The rest is negative (0); what is neither is ignored.
    """
    positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
    n_positive = min(len(positive), int(n * positive_fraction))
    n_negative = min(len(negative), n - n_positive)
    drawn = [
        rows[torch.randperm(len(rows), generator=generator)[:k].to(rows.device)]
        for rows, k in ((positive, n_positive), (negative, n_negative))
    ]
    return torch.cat(drawn)


def crop_masks(masks: Tensor, boxes: Tensor, matched: Tensor, cells: int) -> Tensor:
    """Return what the mask head should say of `boxes`, (N, cells, cells) in 0..1.

    Mask R-CNN (arXiv:1703.06870), section 3: the part of its object's mask that a box encloses.
    Deviation from torchvision, whose `project_masks_on_boxes` takes the centre of pixel i to lie at i and so
    shifts every mask by half a pixel: an object of ten pixels then loses a tenth of its overlap.

    Args:
        masks: (M, H, W) uint8.
        boxes: (N, 4) px; x1 and y1 exclusive.
        matched: (N,) int64, the object of each box.
        cells: side of the result.
    """
    if len(masks) == 0:
        return boxes.new_zeros((len(boxes), cells, cells))
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    return cast(Tensor, roi_align(masks[:, None].to(boxes.dtype), rois, cells, aligned=True)[:, 0])
