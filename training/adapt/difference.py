"""L_diff: the first halves of the shared and the domain-specific features are kept orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from darcnn.training.parallel import gather

__all__ = ["difference_loss"]


def difference_loss(shared: Sequence[Tensor], private: Sequence[Tensor]) -> Tensor:
    """Return L_diff of one domain, a scalar >= 0.

    DARCNN (CVPR 2021), equation (3): || H_c^T H_p ||_F^2 over the first half of the channels; the
    second half is left free. The caller adds the two domains.
    Deviation: rows (spatial positions) are centred over the sample and scaled to unit length, and the
    product is divided by the number of rows, so that the value depends on neither image nor batch size.

    Args:
        shared: levels of h_c, each (B, C, H, W).
        private: levels of h_p of the same images, same shapes.
    """
    levels = [_orthogonality(_rows(c), _rows(p)) for c, p in zip(shared, private, strict=True)]
    return torch.stack(levels).mean()


def _rows(level: Tensor) -> Tensor:
    """Return (B * H * W, C // 2) centred rows of unit length, B that of all processes."""
    half = level[:, : level.shape[1] // 2]
    rows = gather(half.permute(0, 2, 3, 1).reshape(-1, half.shape[1]))
    rows = rows - rows.mean(dim=0, keepdim=True)
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-6)


def _orthogonality(shared: Tensor, private: Tensor) -> Tensor:
    product = shared.T @ private / len(shared)  # (C // 2, C // 2)
    loss: Tensor = product.square().sum()
    return loss
