"""The region proposal network and the box and mask heads: torchvision's, opened where DARCNN needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import (
    AnchorGenerator,
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)
from torchvision.ops import roi_align

from darcnn.training.model.presets import Preset

__all__ = ["BOX_POOL", "MASK_POOL", "Heads", "Proposer", "RoiPool", "make_heads", "make_proposer"]

BOX_POOL = 7  # cells a side, Mask R-CNN (arXiv:1703.06870)
MASK_POOL = 14
_SAMPLES = 2  # bilinear samples a cell and side; 0 lets their number follow the size of the box
_POOLED_STRIDES = (4, 8, 16, 32)
_MAX_TRAINING_PROPOSALS = 500
_SCORE_THRESHOLD = 0.05  # below it a detection is not even looked at

Target = dict[str, Tensor]  # boxes (N, 4) px, labels (N,) int64 of ones, masks (N, H, W) uint8


class RoiPool(nn.Module):
    """RoIAlign on the level that FPN's rule gives each box (FPN, eq. 1), with half-pixel alignment.

    The same call as torchvision's pooler, but the strides are known instead of guessed from shapes.
    """

    def __init__(self, cells: int, canonical_size_px: float, samples: int = _SAMPLES) -> None:
        super().__init__()
        self.cells = cells
        self.canonical_size_px = canonical_size_px
        self.samples = samples

    def level_of(self, boxes: Tensor) -> Tensor:
        """Return the pyramid level, 0 for P2 to 3 for P5, of `boxes` (N, 4) px."""
        size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        level = torch.floor(4 + torch.log2(size / self.canonical_size_px + 1e-6))
        return level.clamp(2, 5).long() - 2

    def forward(
        self,
        pyramid: Sequence[Tensor],
        boxes: Sequence[Tensor],
        shapes: object = None,
        cells: int | None = None,
    ) -> Tensor:
        """Return (N, C, cells, cells) features of `boxes`, one (n, 4) tensor an image."""
        cells = cells or self.cells
        every_box = torch.cat(list(boxes))
        image = torch.cat([torch.full((len(b), 1), float(i), device=b.device) for i, b in enumerate(boxes)])
        rois = torch.cat([image.to(every_box.dtype), every_box], dim=1)
        level = self.level_of(every_box)
        pooled = pyramid[0].new_zeros((len(rois), pyramid[0].shape[1], cells, cells))
        for number, stride in enumerate(_POOLED_STRIDES):
            rows = torch.where(level == number)[0]
            if len(rows):
                part = roi_align(pyramid[number], rois[rows], cells, 1.0 / stride, self.samples, aligned=True)
                pooled = pooled.index_copy(0, rows, part.to(pooled.dtype))
        return pooled


class _ExactAnchors(AnchorGenerator):  # type: ignore[misc]  # torchvision is untyped
    """torchvision's anchors before it rounds them to whole pixels."""

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        ratios = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()  # height / width
        sizes = torch.tensor(scales, dtype=dtype, device=device)
        half_width, half_height = ((r[:, None] * sizes / 2).flatten() for r in (1 / ratios, ratios))
        return torch.stack([-half_width, -half_height, half_width, half_height], dim=1)


class Proposer(RegionProposalNetwork):  # type: ignore[misc]  # torchvision is untyped
    """The shared region proposal network R: Faster R-CNN (arXiv:1506.01497), eq. 1 is its loss."""

    def propose(
        self, pyramid: list[Tensor], image_size: tuple[int, int], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return proposals (n, 4) px and objectness probabilities (n,) per image, and the RPN losses.

        Without `targets` there are no losses.
        """
        objectness, deltas = self.head(pyramid)
        batch = pyramid[0].shape[0]
        images = ImageList(pyramid[0].new_empty((batch, 3, *image_size)), [image_size] * batch)
        anchors = self.anchor_generator(images, pyramid)
        per_level = [o.shape[1] * o.shape[2] * o.shape[3] for o in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        decoded = self.box_coder.decode(deltas.detach(), anchors).view(batch, -1, 4)
        boxes, scores = self.filter_proposals(decoded, objectness, images.image_sizes, per_level)
        if targets is None:
            return boxes, scores, {}
        labels, matched = self.assign_targets_to_anchors(anchors, targets)
        wanted = self.box_coder.encode(matched, anchors)
        loss_objectness, loss_box = self.compute_loss(objectness, deltas, labels, wanted)
        return boxes, scores, {"rpn_objectness": loss_objectness, "rpn_box": loss_box}


class Heads(RoIHeads):  # type: ignore[misc]  # torchvision is untyped
    """Box and mask heads of one domain, M^s or M^t: Mask R-CNN (arXiv:1703.06870), section 3."""

    def losses(
        self,
        pyramid: list[Tensor],
        proposals: list[Tensor],
        image_size: tuple[int, int],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Return the three losses: objectness, box deltas, mask."""
        if not self.training:
            raise RuntimeError("losses of heads that are in evaluation mode")
        _, losses = self(pyramid, proposals, [image_size] * len(proposals), targets)
        return {
            "head_objectness": losses["loss_classifier"],
            "head_box": losses["loss_box_reg"],
            "head_mask": losses["loss_mask"],
        }

    def detect(
        self, pyramid: list[Tensor], proposals: list[Tensor], image_size: tuple[int, int]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return boxes (n, 4) px and scores (n,) per image, after NMS, by descending score."""
        features = self.box_head(self.box_roi_pool(pyramid, proposals))
        logits, deltas = self.box_predictor(features)
        boxes, scores, _ = self.postprocess_detections(
            logits, deltas, proposals, [image_size] * len(proposals)
        )
        return boxes, scores

    def mask_probabilities(self, pyramid: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """Return (N, 28, 28) mask probabilities of `boxes`, (n, 4) px per image."""
        features = self.mask_roi_pool(pyramid, boxes)
        logits = cast(Tensor, self.mask_predictor(self.mask_head(features)))
        return logits[:, 1].sigmoid()


def make_proposer(preset: Preset) -> Proposer:
    """Return the region proposal network of a preset."""
    make_anchors = AnchorGenerator if preset.has_whole_anchors else _ExactAnchors
    anchors = make_anchors(
        tuple((size,) for size in preset.anchor_sizes_px),
        (preset.anchor_ratios,) * len(preset.anchor_sizes_px),
    )
    return Proposer(
        anchors,
        RPNHead(preset.pyramid_channels, len(preset.anchor_ratios)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": _MAX_TRAINING_PROPOSALS, "testing": 400},
        post_nms_top_n={"training": _MAX_TRAINING_PROPOSALS, "testing": 400},
        nms_thresh=0.7,
    )


def make_heads(preset: Preset, *, n_classes: int = 1) -> Heads:
    """Return the box and mask heads of a preset: of one class, or of many to be compared with."""
    width = preset.pyramid_channels
    mask_width = preset.mask_head_layers[-1]
    return Heads(
        RoiPool(BOX_POOL, preset.canonical_size_px),
        TwoMLPHead(width * BOX_POOL**2, preset.box_head_width),
        FastRCNNPredictor(preset.box_head_width, n_classes + 1),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=96,
        positive_fraction=1 / 3,
        bbox_reg_weights=None,  # torchvision's default: 10, 10, 5, 5
        score_thresh=_SCORE_THRESHOLD,
        nms_thresh=0.5,
        detections_per_img=256,  # a 512 px tile of dense tissue holds some 130 nuclei
        mask_roi_pool=RoiPool(MASK_POOL, preset.canonical_size_px),
        mask_head=MaskRCNNHeads(width, preset.mask_head_layers, 1),
        mask_predictor=MaskRCNNPredictor(mask_width, mask_width, n_classes + 1),
    )
