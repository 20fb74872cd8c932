"""The two graphs of a bundle as PyTorch modules: fixed shapes, standard operations, no control flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList

from darcnn.runtime.errors import UsageError
from darcnn.runtime.manifest import MAX_TILE_PX
from darcnn.training.model.heads import BOX_POOL
from darcnn.training.model.network import Darcnn

__all__ = [
    "MAX_TOP_K",
    "NMS_ROUNDS",
    "AtlasPool",
    "DetectGraph",
    "ExportOptions",
    "MaskGraph",
    "decode_boxes",
    "greedy_keep",
    "pack_atlas",
]

MAX_TOP_K = 3840  # what TensorRT's TopK layer takes
NMS_ROUNDS = 16  # even; tiles of tissue need 3 to 8
_SAMPLES = 2  # bilinear samples a cell and side, as training pools
_MIN_UNION_PX2 = 1e-12  # two empty boxes have IoU 0, not 0 / 0
_MIN_DETECTION_PX = 0.01  # torchvision drops detections that are smaller


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The static sizes of the two graphs."""

    channels: int  # 1 to 4
    tile_px: int = 512
    batch: int = 1  # tiles per `detect`
    proposals_per_level: int = 400  # before suppression
    proposals: int = 400  # after it
    detections: int = 256  # slots per tile
    mask_batch: int = 64  # boxes per `mask`
    halo_px: int = 64  # of a tile's core; the graphs do not depend on it

    def check(self, network: Darcnn) -> None:
        """Refuse sizes that the graphs cannot have.

        Raises:
            UsageError: the tile does not fit the network's strides, or a count is too small.
        """
        stride = max(network.preset.strides_px)
        if not 0 < self.tile_px <= MAX_TILE_PX or self.tile_px % stride:
            raise UsageError(
                f"{self.tile_px} px", where="--tile", fix=f"give a multiple of {stride} up to {MAX_TILE_PX}"
            )
        if self.batch < 1:
            raise UsageError(f"{self.batch} tiles", where="--batch", fix="give 1 or more")
        if not 1 <= self.channels <= 4:
            raise UsageError(f"{self.channels} channels", where="target.channels", fix="use 1, 2, 3 or 4")
        candidates = self.proposals_per_level * len(network.preset.strides_px)
        if self.mask_batch < 1:
            raise UsageError(f"{self.mask_batch} objects", where="--mask-batch", fix="give 1 or more")
        if not 0 < self.detections <= self.proposals <= candidates:
            raise UsageError(
                f"{self.detections} detections of {self.proposals} proposals of {candidates} candidates",
                where="export",
                fix="let no count be above the one that it is chosen from",
            )
        largest = max(self.proposals_per_level, self.proposals)
        if largest > MAX_TOP_K:
            raise UsageError(
                f"{largest} candidates are more than TensorRT sorts (TopK)",
                where="--proposals",
                fix=f"give up to {MAX_TOP_K}",
            )


class AtlasPool(nn.Module):
    """RoIAlign (Mask R-CNN, section 3) as one gather: every level lies in one table of rows, the atlas.

    The level of a box follows FPN (arXiv:1612.03144), eq. 1. Sampling is that of torchvision's `roi_align`
    with `aligned=True` and 2 x 2 samples a cell. Bilinear interpolation is separable, so a cell is a sum
    of 4 x 4 rows: two samples with two neighbours each, along y and along x.
    """

    strides: Tensor
    extents: Tensor
    starts: Tensor

    def __init__(self, network: Darcnn, tile_px: int) -> None:
        super().__init__()
        strides = network.preset.strides_px[: len(network.preset.stage_channels)]
        extents = [tile_px // stride for stride in strides]
        starts = [sum(e * e for e in extents[:n]) for n in range(len(extents))]
        self.rows_per_tile = sum(e * e for e in extents)
        self.canonical_size_px = network.preset.canonical_size_px
        self.register_buffer("strides", torch.tensor(strides, dtype=torch.float32), persistent=False)
        self.register_buffer("extents", torch.tensor(extents, dtype=torch.int64), persistent=False)
        self.register_buffer("starts", torch.tensor(starts, dtype=torch.int64), persistent=False)

    def level_of(self, boxes: Tensor) -> Tensor:
        """Return the pyramid level, 0 for P2 to 3 for P5, of `boxes` (N, 4) px.

        FPN, eq. 1: floor(4 + log2(size / canonical)), as comparisons, which every backend rounds alike.
        """
        size = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        ratio = size / self.canonical_size_px + 1e-6
        level = torch.zeros_like(ratio, dtype=torch.int64)
        for number in range(1, len(self.strides)):
            level = level + (ratio >= 2.0 ** (number - 2)).long()
        return level

    def forward(self, atlas: Tensor, boxes: Tensor, tile_index: Tensor, cells: int) -> Tensor:
        """Return (N, C, cells, cells) features.

        Args:
            atlas: (B, P, C), as `pack_atlas` makes it.
            boxes: (N, 4) tile px.
            tile_index: (N,) int64, 0..B-1.
            cells: of the result, a side.
        """
        level = self.level_of(boxes)
        scaled = boxes / self.strides.index_select(0, level)[:, None] - 0.5  # (N, 4) level px
        extent = self.extents.index_select(0, level)[:, None]  # (N, 1)
        column, weight_x = _axis_samples(scaled[:, 0:1], scaled[:, 2:3], extent, cells)  # (N, cells, 4)
        row, weight_y = _axis_samples(scaled[:, 1:2], scaled[:, 3:4], extent, cells)
        start = self.starts.index_select(0, level) + tile_index * self.rows_per_tile  # (N,)
        row = row * extent[:, :, None] + start[:, None, None]  # (N, cells, 4) atlas rows of column 0
        n, channels = boxes.shape[0], atlas.shape[2]
        index = row[:, :, None, :, None] + column[:, None, :, None, :]  # (N, cells, cells, 4, 4)
        weight = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
        table = atlas.reshape(-1, channels)  # (B * P, C)
        gathered = table.index_select(0, index.reshape(-1)).reshape(n * cells * cells, 16, channels)
        pooled = torch.matmul(weight.reshape(n * cells * cells, 1, 16), gathered)  # (N * cells * cells, 1, C)
        return pooled.reshape(n, cells, cells, channels).permute(0, 3, 1, 2)


class DetectGraph(nn.Module):
    """The target branch up to its boxes: `tile` (B, S, S, C) to `boxes`, `scores`, `atlas`, `converged`.

    DARCNN, section 3.1: proposals come from h_c, boxes are refined from h_p.
    """

    def __init__(self, network: Darcnn, options: ExportOptions) -> None:
        super().__init__()
        options.check(network)
        self.network = network
        self.options = options
        self.pool = AtlasPool(network, options.tile_px)
        self._n_levels = len(network.preset.strides_px)
        for number, anchors in enumerate(_anchors(network, options.tile_px)):
            self.register_buffer(f"anchors_{number}", anchors, persistent=False)

    def forward(self, tile: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return `boxes` (B, D, 4) px, `scores` (B, D), `atlas` (B, P, C), `converged` (B,) of `tile`."""
        c2 = self.network.trunk(tile.float().permute(0, 3, 1, 2))  # of (B, C, S, S)
        proposals, valid, is_final = self._propose(self.network.rpn_levels(self.network.shared_encoder(c2)))
        atlas = pack_atlas(self.network.target_encoder(c2))
        boxes, scores, is_final_too = self._detect(atlas, proposals, valid)
        return boxes, scores, atlas, is_final & is_final_too

    def _propose(self, pyramid: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return proposals (B, R, 4) px, which are real (B, R), and whether suppression is complete (B,).

        Region proposal network of Faster R-CNN (arXiv:1506.01497), section 3.1.
        """
        proposer, options = self.network.proposer, self.options
        boxes, logits, valid = [], [], []  # per level (B, K, 4), (B, K), (B, K)
        for number, (logit, delta) in enumerate(zip(*proposer.head(pyramid), strict=True)):
            best, chosen, anchors = self._best_anchors(number, logit, delta)
            decoded = _clip(decode_boxes(proposer.box_coder, chosen, anchors), options.tile_px)
            missing = options.proposals_per_level - best.shape[1]
            is_large = _is_at_least(decoded, proposer.min_size)
            boxes.append(F.pad(decoded, (0, 0, 0, missing)))
            logits.append(F.pad(best, (0, missing)))
            valid.append(F.pad(is_large.float(), (0, missing)))
        by_level = torch.cat(boxes), torch.cat(valid)  # (L * B, K, 4), (L * B, K)
        keep, is_final = greedy_keep(*by_level, threshold=proposer.nms_thresh)
        batch = options.batch
        keep = torch.cat(
            [keep[i * batch : (i + 1) * batch] for i in range(self._n_levels)], dim=1
        )  # (B, L * K)
        probability = torch.where(keep > 0.5, torch.cat(logits, dim=1).sigmoid(), -1.0)
        score, order = probability.topk(options.proposals)
        complete = is_final.reshape(self._n_levels, batch).float().amin(0) > 0.5
        return _take_rows(torch.cat(boxes, dim=1), order), score >= 0, complete

    def _best_anchors(self, number: int, logit: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best logits (B, k) of one level, their deltas (B, k, 4) and anchors (B, k, 4) px."""
        batch, ratios, height, width = logit.shape
        logit = logit.permute(0, 2, 3, 1).reshape(batch, -1)  # (B, H * W * A)
        delta = delta.reshape(batch, ratios, 4, height, width).permute(0, 3, 4, 1, 2)  # (B, H, W, A, 4)
        best, index = logit.topk(min(self.options.proposals_per_level, logit.shape[1]))
        anchors = self.get_buffer(f"anchors_{number}").index_select(0, index.reshape(-1))
        return best, _take_rows(delta.reshape(batch, -1, 4), index), anchors.reshape(batch, -1, 4)

    def _detect(self, atlas: Tensor, proposals: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (B, D, 4) px, scores (B, D) and whether suppression is complete (B,)."""
        heads, options = self.network.target_heads, self.options
        batch, n = valid.shape
        tile_index = torch.arange(batch)[:, None].expand(batch, n).reshape(-1)  # (B * R,)
        features = self.pool(atlas, proposals.reshape(-1, 4), tile_index, BOX_POOL)
        logits, deltas = heads.box_predictor(heads.box_head(features))  # (B * R, 2), (B * R, 8)
        probability = F.softmax(logits, dim=-1)[:, 1].reshape(batch, n)
        boxes = decode_boxes(heads.box_coder, deltas[:, 4:].reshape(batch, n, 4), proposals)
        boxes = _clip(boxes, options.tile_px)
        valid = valid & (probability > heads.score_thresh) & _is_at_least(boxes, _MIN_DETECTION_PX)
        score, order = torch.where(valid, probability, 0.0).topk(n)
        boxes = _take_rows(boxes, order)
        keep, is_final = greedy_keep(boxes, (score > 0).float(), threshold=heads.nms_thresh)
        score, order = (score * keep).topk(options.detections)
        return _take_rows(boxes, order) * (score > 0).float()[:, :, None], score, is_final


class MaskGraph(nn.Module):
    """`atlas`, `boxes` (M, 4), `tile_index` (M,) to `masks` (M, 28, 28).

    Mask R-CNN (arXiv:1703.06870), section 3, on features of h_p.
    """

    def __init__(self, network: Darcnn, options: ExportOptions) -> None:
        super().__init__()
        options.check(network)
        self.mask_head = network.target_heads.mask_head
        self.mask_predictor = network.target_heads.mask_predictor
        self.pool = AtlasPool(network, options.tile_px)
        self.cells = network.preset.mask_cells

    def forward(self, atlas: Tensor, boxes: Tensor, tile_index: Tensor) -> Tensor:
        """Return (M, 28, 28) probabilities of `boxes` (M, 4) px on tiles `tile_index` (M,) int64."""
        logits: Tensor = self.mask_predictor(self.mask_head(self.pool(atlas, boxes, tile_index, self.cells)))
        return logits[:, 1].sigmoid()


def greedy_keep(
    boxes: Tensor, valid: Tensor, *, threshold: float, rounds: int = NMS_ROUNDS
) -> tuple[Tensor, Tensor]:
    """Return which boxes greedy suppression keeps, and whether that is already certain.

    keep <- valid and not (any higher kept box overlaps), repeated. The rule turns supersets of the answer
    into subsets and back, and starts from a superset: after an even number of rounds the result holds all
    that greedy suppression keeps. Once a round changes nothing, it is that, for there is one fixed point.

    Args:
        boxes: (N, K, 4) px, by descending score.
        valid: (N, K), 1 or 0; a box that is not neither stays nor suppresses.
        threshold: IoU above which the lower box goes.
        rounds: even.
    Returns:
        keep (N, K), 1 or 0, and converged (N,) bool.
    """
    x0, y0, x1, y1 = torch.split(boxes, 1, dim=-1)  # (N, K, 1)
    area = (x1 - x0) * (y1 - y0)
    width = torch.minimum(x1, x1.mT) - torch.maximum(x0, x0.mT)  # (N, K, K)
    height = torch.minimum(y1, y1.mT) - torch.maximum(y0, y0.mT)
    shared = torch.relu(width) * torch.relu(height)
    union = area + area.mT - shared
    rank = torch.arange(boxes.shape[1])
    is_below = rank[:, None] > rank[None, :]  # (K, K): the column's box comes first
    overlaps = ((shared / union.clamp(min=_MIN_UNION_PX2) > threshold) & is_below).float()
    real = valid[:, :, None]  # (N, K, 1)
    before = keep = real
    for _ in range(rounds):
        n_above = torch.matmul(overlaps, keep)  # (N, K, 1) kept boxes that overlap from above
        before, keep = keep, real * torch.relu(1.0 - n_above)
    return keep[:, :, 0], (keep - before).abs().amax((1, 2)) < 0.5


def decode_boxes(coder: BoxCoder, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return (..., 4) boxes px that `deltas` (..., 4) make of `anchors` (..., 4) px.

    Faster R-CNN (arXiv:1506.01497), eq. 2, solved for the box, with the weights of `coder`.
    """
    wx, wy, ww, wh = (float(weight) for weight in coder.weights)
    limit = float(coder.bbox_xform_clip)
    width, height = anchors[..., 2] - anchors[..., 0], anchors[..., 3] - anchors[..., 1]
    x = deltas[..., 0] / wx * width + (anchors[..., 0] + 0.5 * width)
    y = deltas[..., 1] / wy * height + (anchors[..., 1] + 0.5 * height)
    half_width = 0.5 * (torch.exp((deltas[..., 2] / ww).clamp(max=limit)) * width)
    half_height = 0.5 * (torch.exp((deltas[..., 3] / wh).clamp(max=limit)) * height)
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def pack_atlas(pyramid: Sequence[Tensor]) -> Tensor:
    """Return (B, P, C): the rows of all levels, P2 first, each in row-major order, channels last."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in pyramid], dim=1)


def _axis_samples(low: Tensor, high: Tensor, extent: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the 4 positions (N, cells, 4) int64 and weights that make each cell along one axis.

    `low`, `high` (N, 1) in level pixels, `extent` (N, 1) int64. A sample more than a pixel outside counts
    as 0, one nearer takes the border's value.
    """
    offset = (torch.arange(cells * _SAMPLES, dtype=torch.float32) + 0.5) / _SAMPLES
    at = low + offset[None] * ((high - low) / cells)  # (N, cells * 2)
    is_near = ((at >= -1.0) & (at <= extent)).float()
    last = extent.float() - 1.0
    at = torch.minimum(torch.relu(at), last)
    lower = torch.floor(at)
    fraction = at - lower
    first = lower.long()
    position = torch.stack([first, torch.minimum(first + 1, extent - 1)], dim=-1)  # (N, cells * 2, 2)
    weight = torch.stack([1.0 - fraction, fraction], dim=-1) * (is_near / _SAMPLES)[:, :, None]
    shape = (low.shape[0], cells, 2 * _SAMPLES)
    return position.reshape(shape), weight.reshape(shape)


def _anchors(network: Darcnn, tile_px: int) -> list[Tensor]:
    """Return the anchors (H * W * A, 4) px of each level, the very numbers that training uses."""
    sides = [math.ceil(tile_px / stride) for stride in network.preset.strides_px]
    levels = [torch.zeros(1, 1, side, side) for side in sides]
    images = ImageList(torch.zeros(1, 1, tile_px, tile_px), [(tile_px, tile_px)])
    (anchors,) = network.proposer.anchor_generator(images, levels)
    per_level = [side * side * len(network.preset.anchor_ratios) for side in sides]
    return [part.clone() for part in anchors.split(per_level)]


def _clip(boxes: Tensor, tile_px: int) -> Tensor:
    return boxes.clamp(0.0, float(tile_px))


def _is_at_least(boxes: Tensor, side_px: float) -> Tensor:
    """Tell which `boxes` (..., 4) are at least `side_px` wide and high."""
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides[..., 0] >= side_px) & (sides[..., 1] >= side_px)


def _take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Return (B, K, C): of each tile's `table` (B, N, C) the rows `index` (B, K)."""
    batch, n, width = table.shape
    if batch > 1:
        index = index + (torch.arange(batch) * n)[:, None]
    return table.reshape(-1, width).index_select(0, index.reshape(-1)).reshape(batch, -1, width)
