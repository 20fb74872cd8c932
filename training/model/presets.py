"""The two network sizes: `lite` for shipped models, `resnet50` as in the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import PurePath

from darcnn.runtime.errors import UsageError

__all__ = ["PRESETS", "Preset", "is_detectron2_file", "preset_named"]

_DETECTRON2_ENDINGS = {".pkl", ".pth"}


@dataclass(frozen=True, slots=True)
class Preset:
    """Everything that fixes the layers of a network."""

    name: str
    mean: tuple[float, float, float]  # of the bytes 0..255, red green blue
    std: tuple[float, float, float]
    stage_channels: tuple[int, int, int, int]  # of the backbone, strides 4 to 32
    pyramid_channels: int
    has_extra_level: bool  # stride 64, seen by the RPN only
    anchor_sizes_px: tuple[float, ...]  # one a level, finest first
    anchor_ratios: tuple[float, ...]
    box_head_width: int
    mask_head_layers: tuple[int, ...]
    # FPN (arXiv:1612.03144), eq. 1: a box of this side is pooled from the level of stride 16
    canonical_size_px: float
    mask_cells: int = 14  # pooled for a mask, a side; Mask R-CNN (arXiv:1703.06870), figure 4
    # where torchvision and detectron2 differ; both defaults are torchvision's
    has_stride_in_1x1: bool = False  # a stage halves the size in its first 1x1 convolution, not in its 3x3
    has_whole_anchors: bool = True  # anchors are rounded to whole pixels

    @property
    def mask_px(self) -> int:
        """The side of a mask, in its own pixels."""
        return 2 * self.mask_cells

    @property
    def strides_px(self) -> tuple[int, ...]:
        """Strides of the levels that the RPN sees."""
        return (4, 8, 16, 32, 64) if self.has_extra_level else (4, 8, 16, 32)


PRESETS = {
    "lite": Preset(
        name="lite",
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        stage_channels=(24, 40, 112, 320),
        pyramid_channels=64,
        has_extra_level=False,
        # nuclei of 8 to 60 px: an octave a level, the smallest just above the smallest object
        anchor_sizes_px=(12.0, 24.0, 48.0, 96.0),
        anchor_ratios=(0.5, 1.0, 2.0),
        box_head_width=256,
        mask_head_layers=(64, 64, 64),
        canonical_size_px=128.0,
    ),
    "resnet50": Preset(
        name="resnet50",
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        stage_channels=(256, 512, 1024, 2048),
        pyramid_channels=256,
        has_extra_level=True,
        anchor_sizes_px=(32.0, 64.0, 128.0, 256.0, 512.0),
        anchor_ratios=(0.5, 1.0, 2.0),
        box_head_width=1024,
        mask_head_layers=(256, 256, 256, 256),
        canonical_size_px=224.0,
    ),
}


def is_detectron2_file(weights: str) -> bool:
    """Tell whether the initial weights that a recipe names are a file of detectron2.

    >>> is_detectron2_file("weights/model_final_f10217.pkl"), is_detectron2_file("coco")
    (True, False)
    """
    return PurePath(weights).suffix in _DETECTRON2_ENDINGS


def preset_named(name: str, weights: str = "imagenet") -> Preset:
    """Return the preset called `name`, as a network needs it that starts from `weights`.

    A checkpoint of detectron2 does not say where its stages halve the size; it is taken to be where those
    of the model zoo's ResNet-50 do (`STRIDE_IN_1X1`).

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"unknown preset {name!r}", where="preset", fix=f"use one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if is_detectron2_file(weights):
        return replace(preset, has_stride_in_1x1=True, has_whole_anchors=False)
    return preset
