"""Mask R-CNNs of other programs: their tensors under the names used here, and their classes made one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from darcnn.runtime.errors import InputError
from darcnn.training.model.network import Darcnn

__all__ = ["CLASS_ROWS", "collapse_classes", "load_mask_rcnn", "take_tensors"]

# The layers of the heads that have rows for each class, and how many.
CLASS_ROWS = {
    "source_heads.box_predictor.cls_score": 1,
    "source_heads.box_predictor.bbox_pred": 4,
    "source_heads.mask_predictor.mask_fcn_logits": 1,
}
_PARTS = ("trunk.", "shared_encoder.", "proposer.", "source_heads.")
_FIX = "give a Mask R-CNN with ResNet-50 and FPN, as wide as the preset"


def take_tensors(
    network: Darcnn, stored: Mapping[str, Tensor], *, name_there: Callable[[str], str], where: str | Path
) -> dict[str, Tensor]:
    """Return the tensors of trunk, E_c, R and M^s, found in `stored` by name and compared in shape.

    Args:
        network: says which tensors there are; layers in `CLASS_ROWS` may have any number of rows.
        stored: the tensors of a Mask R-CNN, each under the name that its program uses; all must be needed.
        name_there: the name of a tensor in `network` -> its name in `stored`.
        where: names `stored` in errors.
    Raises:
        InputError: a tensor is missing, has another shape, or has no place in `network`.
    """
    taken: dict[str, Tensor] = {}
    left = set(stored)
    for name, ours in network.state_dict().items():
        if not name.startswith(_PARTS):
            continue
        old = name_there(name)
        if old not in stored:
            raise InputError(f"lacks the tensor {old}", where=where, fix=_FIX)
        is_per_class = name.rpartition(".")[0] in CLASS_ROWS
        given, wanted = tuple(stored[old].shape), tuple(ours.shape)
        if given[is_per_class:] != wanted[is_per_class:] or len(given) != len(wanted):
            raise InputError(f"{old} has shape {given}, not {wanted}", where=where, fix=_FIX)
        taken[name] = stored[old].float()
        left.discard(old)
    if left:
        raise InputError(f"no place for the tensor {min(left)}", where=where, fix=_FIX)
    return taken


def collapse_classes(
    tensors: Mapping[str, Tensor], classes: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Return `tensors` with one class, "object", in place of many: DARCNN's source has only that.

    The logit of "object" is the mean of the class logits plus log(number of classes). The exact one, their
    log-sum-exp, is not linear; this is its tangent where all classes are equally likely, and by Jensen's
    inequality never above it: no score of "object" exceeds the summed scores of the classes. Box deltas
    and mask logits are the means of those of the classes.

    Deviation: a detector that has learnt its classes is only a start here; the source stage teaches it.

    Args:
        tensors: named as in `Darcnn`; layers in `CLASS_ROWS` start with the rows of the background.
        classes: which classes count, from 1; None: all.
    """
    result = dict(tensors)
    for layer, n_rows in CLASS_ROWS.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            rows = tensors[name].reshape(-1, n_rows, *tensors[name].shape[1:])  # (1 + classes, n_rows, ...)
            chosen = rows[1:] if classes is None else rows[list(classes)]
            both = torch.stack([rows[0], chosen.mean(0)])
            if name == "source_heads.box_predictor.cls_score.bias":
                both[1] += math.log(len(chosen))
            result[name] = both.reshape(2 * n_rows, *tensors[name].shape[1:])
    return result


def load_mask_rcnn(network: Darcnn, tensors: Mapping[str, Tensor]) -> None:
    """Start all encoders, R and both heads from the `tensors` of a Mask R-CNN with one class."""
    network.load_state_dict(tensors, strict=False)
    network.start_adaptation()
