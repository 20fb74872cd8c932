"""The network in training as an engine of the runtime: validation and pseudo-labels run the shipped path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.manifest import FORMAT, Anchors, Limits, Manifest, ModelInput
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.tiling import halo_for
from darcnn.training.config import Export, Target
from darcnn.training.model.network import Darcnn

__all__ = ["TorchEngine", "make_manifest", "make_segmenter", "tile_for_images"]

_TILE_PX = 512  # what a whole image is cut into, unless its objects need larger tiles


class TorchEngine:
    """Runs the target branch, or the branch that the source stage trained, with PyTorch."""

    def __init__(self, network: Darcnn, *, tile_px: int, channels: int, source_branch: bool = False) -> None:
        self._network = network.eval()
        self._source_branch = source_branch
        self._device = next(network.parameters()).device
        self._spec = EngineSpec(
            name=f"pytorch {torch.__version__}",
            batch=1,
            tile_px=tile_px,
            channels=channels,
            detections=network.target_heads.detections_per_img,
            mask_batch=64,
            mask_px=network.preset.mask_px,
        )

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._spec

    @torch.no_grad()
    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8."""
        network, heads = self._network, self._heads
        images = torch.from_numpy(tiles).to(self._device).permute(0, 3, 1, 2).float()  # (B, C, S, S)
        c2 = network.trunk(images)
        shared = network.shared_encoder(c2)
        private = shared if self._source_branch else network.target_encoder(c2)
        size = (images.shape[2], images.shape[3])
        proposals, _, _ = network.proposer.propose(network.rpn_levels(shared), size)
        boxes, scores = heads.detect(private, proposals, size)
        slots = self._spec.detections
        padded_boxes = np.zeros((len(tiles), slots, 4), np.float32)
        padded_scores = np.zeros((len(tiles), slots), np.float32)
        for index, (b, s) in enumerate(zip(boxes, scores, strict=True)):
            padded_boxes[index, : len(b)], padded_scores[index, : len(s)] = b.cpu().numpy(), s.cpu().numpy()
        return Detections(padded_boxes, padded_scores, np.ones(len(tiles), np.bool_), private)

    @torch.no_grad()
    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return (M, 28, 28) mask probabilities for `boxes` (M, 4) on tiles `tile_index`."""
        pyramid: Sequence[Tensor] = detections.atlas
        result = np.zeros((len(boxes), self._spec.mask_px, self._spec.mask_px), np.float32)
        for index in np.unique(tile_index):
            rows = np.flatnonzero(tile_index == index)
            on_tile = [level[index : index + 1] for level in pyramid]
            chosen = torch.from_numpy(np.ascontiguousarray(boxes[rows])).to(self._device)
            result[rows] = self._heads.mask_probabilities(on_tile, [chosen]).cpu().numpy()
        return result

    def close(self) -> None:
        """Nothing is held beside the network."""

    @property
    def _heads(self) -> Any:
        return self._network.source_heads if self._source_branch else self._network.target_heads


def make_manifest(
    network: Darcnn,
    target: Target,
    *,
    name: str,
    tile_px: int,
    batch: int = 1,
    min_score: float = 0.5,
    max_diameters: float | None = None,
    found_diameter_px: float | None = None,
) -> Manifest:
    """Return what a model of this network says of itself; hashes and graphs come with the bundle."""
    preset, heads, proposer = network.preset, network.target_heads, network.proposer
    stride = preset.strides_px[-1]
    return Manifest(
        format=FORMAT,
        name=name,
        preset=preset.name,
        input=ModelInput(
            tile_px=tile_px,
            halo_px=halo_for(target.nominal_diameter_px, stride),
            stride_px=stride,
            batch=batch,
            channels=target.channels,
            intensity=target.intensity,
            nominal_diameter_px=target.nominal_diameter_px,
            mpp=target.mpp,
            finds_diameter=target.finds_diameter,
            found_diameter_px=found_diameter_px,
            slab=target.slab,
        ),
        anchors=Anchors(preset.anchor_sizes_px, preset.anchor_ratios, preset.strides_px),
        limits=Limits(
            proposals_per_level=proposer.pre_nms_top_n(),
            proposals=proposer.post_nms_top_n(),
            detections=heads.detections_per_img,
            mask_batch=64,
            mask_px=preset.mask_px,
            score_threshold=heads.score_thresh,
            nms_threshold=heads.nms_thresh,
            min_score=min_score,
            max_diameter_px=None if max_diameters is None else max_diameters * target.nominal_diameter_px,
        ),
        graphs={},
        files={},
    )


def tile_for_images(export: Export) -> int:
    """Return the side of the tiles that whole images are cut into to be labelled or shown."""
    return max(_TILE_PX, export.tile_px)


def make_segmenter(
    network: Darcnn,
    target: Target,
    *,
    min_score: float,
    tile_px: int = _TILE_PX,
    source_branch: bool = False,
    max_diameters: float | None = None,
    found_diameter_px: float | None = None,
) -> Segmenter:
    """Return a segmenter that runs `network` with PyTorch.

    `source_branch` is for a network that only the source stage trained: it has no target branch yet. What
    is larger than `max_diameters` nominal diameters is not reported. `found_diameter_px` is what the network
    takes objects of the nominal diameter for.
    """
    network.eval()
    manifest = make_manifest(
        network,
        target,
        name="in-training",
        tile_px=tile_px,
        min_score=min_score,
        max_diameters=max_diameters,
        found_diameter_px=found_diameter_px,
    )
    engine = TorchEngine(network, tile_px=tile_px, channels=target.channels, source_branch=source_branch)
    return Segmenter(engine, manifest)
