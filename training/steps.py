"""One optimisation step of each stage: which losses, and through which parts their gradient flows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from darcnn.training.adapt.consistency import background_consistency
from darcnn.training.adapt.difference import difference_loss
from darcnn.training.adapt.similarity import project, similarity_loss
from darcnn.training.data.batches import Batch
from darcnn.training.model.heads import Heads
from darcnn.training.model.network import Darcnn
from darcnn.training.parallel import mean_over_processes

__all__ = [
    "AdaptWeights",
    "adapt_losses",
    "learning_parts",
    "mask_rcnn_losses",
    "refine_losses",
    "source_losses",
]

_MIN_OBJECTNESS = 0.5  # k of DARCNN, section 3.2
_MAX_REGIONS = 64  # proposals an image in L_target


class AdaptWeights(Protocol):
    """The weights of equation (1) that do not move."""

    @property
    def beta(self) -> float: ...

    @property
    def gamma(self) -> float: ...


def learning_parts(network: Darcnn, stage: str, *, few: bool = False) -> Sequence[nn.Module]:
    """Return the parts that learn in a stage; the trunk never does.

    Of "refine" they may be `few`: the first stage and the pyramid of E_p^t, R, and what is small of M^t, a
    twentieth of the weights of `lite`; all others stay as they are.
    """
    if few:
        encoder, heads = network.target_encoder, network.target_heads
        return (
            encoder.stages[0],
            encoder.pyramid,
            network.proposer,
            heads.box_head.fc7,
            heads.box_predictor,
            heads.mask_predictor,
        )
    return {
        "source": (network.shared_encoder, network.proposer, network.source_heads),
        "adapt": (
            network.shared_encoder,
            network.source_encoder,
            network.target_encoder,
            network.proposer,
            network.source_heads,
            network.projection,
        ),
        "refine": (
            network.shared_encoder,
            network.target_encoder,
            network.proposer,
            network.target_heads,
        ),
    }[stage]


def mask_rcnn_losses(
    network: Darcnn,
    shared: list[Tensor],
    private: list[Tensor],
    heads: Heads,
    batch: Batch,
) -> dict[str, Tensor]:
    """Return L_source's terms: proposals are made on h_c, refined on h_p."""
    proposals, _, losses = network.proposer.propose(
        network.rpn_levels(shared), batch.image_size, batch.targets
    )
    return losses | heads.losses(private, proposals, batch.image_size, batch.targets)


def source_losses(network: Darcnn, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of the source stage: a Mask R-CNN with one encoder, from which all encoders start."""
    pyramid = network.shared_encoder(network.trunk(batch.images))
    return mask_rcnn_losses(network, pyramid, pyramid, network.source_heads, batch)


def refine_losses(network: Darcnn, batch: Batch) -> dict[str, Tensor]:
    """Return the losses of stage 2: Mask R-CNN on the target branch alone (DARCNN, section 3.3)."""
    c2 = network.trunk(batch.images)
    return mask_rcnn_losses(
        network, network.shared_encoder(c2), network.target_encoder(c2), network.target_heads, batch
    )


def adapt_losses(
    network: Darcnn,
    source: Batch,
    target: Tensor,
    weights: AdaptWeights,
    alpha: float,
    observed: dict[str, float] | None = None,
) -> dict[str, Tensor]:
    """Return the weighted terms of stage 1, whose sum is DARCNN, equation (1).

    Args:
        network: the network in training mode.
        source: labelled photographs.
        target: (N, 3, S, S) unlabelled images of the same size.
        weights: beta and gamma.
        alpha: the weight of L_sim at this step.
        observed: is told the number of `regions` an image that L_target looked at.
    """
    n_source = len(source.images)
    c2 = network.trunk(torch.cat([source.images, target]))
    shared = network.shared_encoder(c2)
    shared_source = [level[:n_source] for level in shared]
    shared_target = [level[n_source:] for level in shared]
    private_source = network.source_encoder(c2[:n_source])
    private_target = network.target_encoder(c2[n_source:])
    losses = mask_rcnn_losses(network, shared_source, private_source, network.source_heads, source)
    with torch.autocast(c2.device.type, enabled=False):  # these three compare features: in float32
        shared_source, shared_target, private_source, private_target = (
            [level.float() for level in pyramid]
            for pyramid in (shared_source, shared_target, private_source, private_target)
        )
        losses["similarity"] = alpha * similarity_loss(
            project(shared_source, network.projection), project(shared_target, network.projection)
        )
        losses["difference"] = weights.beta * (
            difference_loss(shared_source, private_source) + difference_loss(shared_target, private_target)
        )
        regions = _confident_regions(network, shared_target)
        losses["consistency"] = weights.gamma * _consistency(network, private_target, regions)
    if observed is not None:
        n_regions = torch.tensor([float(len(boxes)) for boxes in regions], device=c2.device)
        observed["regions"] = float(mean_over_processes(n_regions.mean()))
    return losses


def _confident_regions(network: Darcnn, shared: list[Tensor]) -> list[Tensor]:
    """Return up to 64 proposals (n, 4) an image with an objectness above k, best first, without gradient."""
    height, width = shared[0].shape[2] * 4, shared[0].shape[3] * 4
    with torch.no_grad():
        boxes, scores, _ = network.proposer.propose(network.rpn_levels(shared), (height, width))
    return [b[s > _MIN_OBJECTNESS][:_MAX_REGIONS] for b, s in zip(boxes, scores, strict=True)]


def _consistency(network: Darcnn, private: list[Tensor], regions: list[Tensor]) -> Tensor:
    """Return L_target, equations (4) to (6) of DARCNN; its gradient reaches E_p^t and nothing else."""
    if sum(len(boxes) for boxes in regions) == 0:
        return private[0].sum() * 0.0
    with torch.no_grad():
        masks = network.target_heads.mask_probabilities(private, regions)
    features = network.target_heads.mask_roi_pool(private, regions, cells=network.preset.mask_px, samples=1)
    image = torch.cat([torch.full((len(boxes),), i, device=boxes.device) for i, boxes in enumerate(regions)])
    return background_consistency(features, masks, image, len(regions))
