"""Mask R-CNN checkpoints of detectron2, read without detectron2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from darcnn.runtime.errors import InputError
from darcnn.training.model.foreign_weights import (
    CLASS_ROWS,
    collapse_classes,
    load_mask_rcnn,
    take_tensors,
)
from darcnn.training.model.network import Darcnn
from darcnn.training.model.tensor_file import read_tensors

__all__ = ["load_detectron2", "name_in_detectron2", "tensors_of_detectron2"]

_CONV1 = "trunk.layers.conv1.weight"
_UNUSED = ("pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")
# Layer here -> layer there; {n} is the number in the layer's name here, plus the offset.
_LAYERS = (
    (r"trunk\.layers\.conv1", "backbone.bottom_up.stem.conv1", 0),
    (r"trunk\.layers\.bn1", "backbone.bottom_up.stem.conv1.norm", 0),
    (r"trunk\.layers\.layer(\d)", "backbone.bottom_up.res{n}", 1),
    (r"shared_encoder\.stages\.(\d)", "backbone.bottom_up.res{n}", 3),
    (r"shared_encoder\.pyramid\.inner_blocks\.(\d)\.0", "backbone.fpn_lateral{n}", 2),
    (r"shared_encoder\.pyramid\.layer_blocks\.(\d)\.0", "backbone.fpn_output{n}", 2),
    (r"proposer\.head\.conv\.0\.0", "proposal_generator.rpn_head.conv", 0),
    (r"proposer\.head\.cls_logits", "proposal_generator.rpn_head.objectness_logits", 0),
    (r"proposer\.head\.bbox_pred", "proposal_generator.rpn_head.anchor_deltas", 0),
    (r"source_heads\.box_head\.fc(\d)", "roi_heads.box_head.fc{n}", -5),
    (r"source_heads\.box_predictor", "roi_heads.box_predictor", 0),
    (r"source_heads\.mask_head\.(\d)\.0", "roi_heads.mask_head.mask_fcn{n}", 1),
    (r"source_heads\.mask_predictor\.conv5_mask", "roi_heads.mask_head.deconv", 0),
    (r"source_heads\.mask_predictor\.mask_fcn_logits", "roi_heads.mask_head.predictor", 0),
)
_IN_BLOCKS = (
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
_MEAN_TOLERANCE = 1.0  # bytes; another order of the channels is tens away


def load_detectron2(network: Darcnn, path: Path) -> None:
    """Start all encoders, R and both heads of a `resnet50` network from a Mask R-CNN R50-FPN of detectron2.

    Its classes become one, see `collapse_classes`.

    Deviation: `RoiPool` takes 2 x 2 samples a cell; in detectron2 their number follows the size of the box.

    Args:
        network: fresh, of a preset for such weights, see `preset_named`.
        path: a `.pkl` of the model zoo or a `.pth` of a training.
    Raises:
        InputError: the file is damaged, holds what could run, or another network.
    """
    tensors = tensors_of_detectron2(read_tensors(path), network, where=path)
    load_mask_rcnn(network, collapse_classes(tensors))


def tensors_of_detectron2(
    stored: Mapping[str, Tensor], network: Darcnn, *, where: str | Path
) -> dict[str, Tensor]:
    """Return the tensors of a detectron2 checkpoint as `take_tensors` does, in the conventions used here.

    The first convolution takes red, green, blue in place of blue, green, red, divided by the preset's
    standard deviation in place of detectron2's, which is 1 unless the checkpoint says otherwise. Rows of
    the background come first in place of last, and where there were none they are zeros.

    Raises:
        InputError: see `take_tensors`; or the pixels were shifted by another mean.
    """
    known = {name: tensor for name, tensor in stored.items() if not name.startswith(_UNUSED)}
    taken = take_tensors(network, known, name_there=name_in_detectron2, where=where)
    taken[_CONV1] = _in_our_pixels(taken[_CONV1], stored, network, where)
    return taken | _background_first(taken, where)


def name_in_detectron2(name: str) -> str:
    """Return what detectron2 calls the tensor that `Darcnn` calls `name`.

    >>> name_in_detectron2("shared_encoder.stages.0.3.bn2.running_var")
    'backbone.bottom_up.res3.3.conv2.norm.running_var'
    """
    for pattern, there, offset in _LAYERS:
        found = re.match(pattern, name)
        if found:
            number = int(found[1]) + offset if found.groups() else 0
            rest = name[found.end() :]
            for inner, inner_there in _IN_BLOCKS:
                rest = re.sub(inner, inner_there, rest)
            return there.format(n=number) + rest
    raise KeyError(name)


def _in_our_pixels(
    weight: Tensor, stored: Mapping[str, Tensor], network: Darcnn, where: str | Path
) -> Tensor:
    """Return the first convolution's `weight` (C, 3, 7, 7) for pixels as `Trunk` normalises them."""
    mean, std = torch.tensor(network.preset.mean), torch.tensor(network.preset.std)  # red green blue
    their_mean = stored.get("pixel_mean", mean.flip(0)).flatten().float()
    their_std = stored.get("pixel_std", torch.ones(3)).flatten().float()
    is_known = len(their_mean) == len(their_std) == 3 and bool((their_std > 0).all())
    if not is_known or not torch.allclose(their_mean, mean.flip(0), atol=_MEAN_TOLERANCE):
        raise InputError(
            f"was trained on pixels less {their_mean.tolist()}, which is not the mean of blue, green, red",
            where=where,
            fix="give a checkpoint with the pixels of the model zoo's R50-FPN",
        )
    scale = std / their_std.flip(0)
    return weight.flip(1) * scale.reshape(1, 3, 1, 1).to(weight.device)


def _background_first(taken: Mapping[str, Tensor], where: str | Path) -> dict[str, Tensor]:
    """Return the layers of `CLASS_ROWS` with the rows of the background before those of the classes."""
    n_classes = len(taken["source_heads.box_predictor.cls_score.bias"]) - 1
    result = {}
    for layer, n_rows in CLASS_ROWS.items():
        has_background = layer.endswith("cls_score")
        counts = (max(2, n_classes + 1),) if has_background else (n_rows * n_classes, n_rows)
        for name in (f"{layer}.weight", f"{layer}.bias"):
            tensor = taken[name]
            if len(tensor) not in counts:
                problem = f"{name_in_detectron2(name)} has {len(tensor)} rows, not {counts[0]}"
                raise InputError(problem, where=where, fix="give the checkpoint of one training")
            if has_background:
                result[name] = tensor.roll(1, 0)
            else:
                repeats = n_classes * n_rows // len(tensor)  # above 1 where classes share their rows
                result[name] = torch.cat([torch.zeros_like(tensor[:n_rows]), *[tensor] * repeats])
    return result
