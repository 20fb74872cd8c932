"""The DARCNN network: three encoders on one frozen trunk, a shared RPN, heads for each domain."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from darcnn.training.model.backbone import Encoder, Trunk, make_trunk_and_stages
from darcnn.training.model.heads import make_heads, make_proposer
from darcnn.training.model.presets import Preset, preset_named

__all__ = ["Darcnn"]


class Darcnn(nn.Module):
    """The network of DARCNN (CVPR 2021), section 3.1.

    | part | attribute |
    |---|---|
    | frozen stem and first stage | `trunk` |
    | E_c, E_p^s, E_p^t | `shared_encoder`, `source_encoder`, `target_encoder` |
    | R | `proposer` |
    | M^s, M^t | `source_heads`, `target_heads` |
    | projection of L_sim | `projection`, one 1x1 convolution a level |
    """

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.preset = preset
        trunk, stages = make_trunk_and_stages(preset)
        self.trunk = Trunk(trunk, preset)
        self.shared_encoder = Encoder(stages, preset)
        self.source_encoder = copy.deepcopy(self.shared_encoder)
        self.target_encoder = copy.deepcopy(self.shared_encoder)
        self.proposer = make_proposer(preset)
        self.source_heads = make_heads(preset)
        self.target_heads = copy.deepcopy(self.source_heads)
        levels = len(preset.stage_channels)
        self.projection = nn.ModuleList(nn.Conv2d(preset.pyramid_channels, 1, 1) for _ in range(levels))

    @classmethod
    def from_name(cls, preset: str, weights: str = "imagenet") -> Darcnn:
        """Return a fresh network of the preset called `preset`, of the kind that can start from `weights`."""
        return cls(preset_named(preset, weights))

    def start_adaptation(self) -> None:
        """Give both domains what the source stage learned: all encoders start equal, and M^t as M^s."""
        self.source_encoder.load_state_dict(self.shared_encoder.state_dict())
        self.target_encoder.load_state_dict(self.shared_encoder.state_dict())
        self.target_heads.load_state_dict(self.source_heads.state_dict())

    def rpn_levels(self, pyramid: list[Tensor]) -> list[Tensor]:
        """Return the levels that R sees: the pyramid, and P6 (P5 subsampled) where the preset has it."""
        if not self.preset.has_extra_level:
            return pyramid
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]

    def target_branch(self) -> tuple[nn.Module, ...]:
        """Return the parts of the final model."""
        return (self.trunk, self.shared_encoder, self.target_encoder, self.proposer, self.target_heads)

    @torch.no_grad()
    def follow_source_heads(self, keep: float) -> None:
        """Move M^t towards M^s: M^t = keep * M^t + (1 - keep) * M^s."""
        _follow(self.target_heads, self.source_heads, keep)

    @torch.no_grad()
    def follow_source_encoder(self, keep: float) -> None:
        """Move E_p^t towards E_p^s: E_p^t = keep * E_p^t + (1 - keep) * E_p^s.

        Deviation: DARCNN leaves E_p^t in stage 1 to L_diff and L_target. No loss then holds it to features
        that the heads can read; this does, and passes no gradient of L_source on.
        """
        _follow(self.target_encoder, self.source_encoder, keep)

    def select_trainable(self, *parts: nn.Module) -> Iterator[nn.Parameter]:
        """Let exactly the parameters of `parts` learn, freeze all others, and yield those that learn."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        for part in parts:
            for parameter in part.parameters():
                parameter.requires_grad_(True)
                yield parameter


def _follow(ours: nn.Module, theirs: nn.Module, keep: float) -> None:
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        own.lerp_(other, 1.0 - keep)
