"""Checkpoints: a safetensors file and a JSON file in a folder; no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from darcnn.runtime.errors import InputError
from darcnn.training.config import Recipe, recipe_from_table, recipe_to_table
from darcnn.training.model.network import Darcnn
from darcnn.training.writing import new_file

__all__ = [
    "CheckpointInfo",
    "is_complete",
    "load_network",
    "load_optimizer",
    "read_info",
    "record_figures",
    "record_recipe",
    "save_checkpoint",
]

_WEIGHTS, _INFO = "checkpoint.safetensors", "checkpoint.json"
_OPTIMIZER = "optimizer."
_PROGRESS = "progress"  # in the metadata of the weights


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint says of itself. `state` is the stage's own memory (plateau rule, round)."""

    stage: str
    step: int
    complete: bool
    recipe: Recipe
    figures: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def is_source_only(self) -> bool:
        """Whether the target branch has learned nothing: of 0 steps, both come from the recipe's weights."""
        return self.stage == "source" and self.step > 0


def save_checkpoint(
    folder: Path, network: Darcnn, info: CheckpointInfo, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write the checkpoint of `folder`, each file under a temporary name and then renamed.

    The weights say themselves of which step they are, so that an interruption between the two renames
    does no harm.

    Raises:
        OutputError: the folder cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if optimizer is not None:
        tensors |= _optimizer_tensors(optimizer, network)
    with new_file(folder / _WEIGHTS) as temporary:
        save_file(tensors, temporary, metadata={_PROGRESS: json.dumps(_progress(info))})
    _write_info(folder, info)


def read_info(folder: Path) -> CheckpointInfo:
    """Return what the checkpoint in `folder` says of itself.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / _INFO
    try:
        content = json.loads(path.read_text(encoding="utf-8")) | _progress_of_weights(folder)
        recipe = recipe_from_table(content["recipe"], where=str(path))
        return CheckpointInfo(
            stage=content["stage"],
            step=content["step"],
            complete=content["complete"],
            recipe=recipe,
            figures=content["figures"],
            state=content["state"],
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(
            f"no readable checkpoint ({err})", where=path, fix="give a folder that darcnn-train wrote"
        ) from err


def record_figures(folder: Path, name: str, figures: dict[str, Any]) -> None:
    """Note in the checkpoint's JSON what an evaluation on the images called `name` gave.

    Raises:
        InputError: there is no checkpoint in `folder`.
        OutputError: it cannot be written.
    """
    info = read_info(folder)
    _write_info(folder, replace(info, figures={**info.figures, name: figures}))


def record_recipe(folder: Path, recipe: Recipe) -> None:
    """Let a finished checkpoint say of its recipe what does not change its weights: name, terms, export.

    Raises:
        InputError: there is no checkpoint in `folder`.
        OutputError: it cannot be written.
    """
    info = read_info(folder)
    if info.recipe != recipe:
        _write_info(folder, replace(info, recipe=recipe))


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds the checkpoint of a finished stage."""
    return (folder / _INFO).is_file() and read_info(folder).complete


def load_network(folder: Path) -> tuple[Darcnn, CheckpointInfo]:
    """Return the network of the checkpoint in `folder`, in evaluation mode, and what it says of itself.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
    """
    info = read_info(folder)
    network = Darcnn.from_name(info.recipe.preset, info.recipe.weights)
    tensors = _read_tensors(folder)
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as err:
        raise InputError(
            f"other layers than preset {info.recipe.preset} ({str(err)[:80]})",
            where=folder / _WEIGHTS,
            fix="train again with this version",
        ) from err
    return network.eval(), info


def load_optimizer(folder: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` back the moments that it had when the checkpoint in `folder` was written."""
    tensors = _read_tensors(folder)
    for name, parameter in network.named_parameters():
        prefix = f"{_OPTIMIZER}{name}."
        moments = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if moments:
            optimizer.state[parameter] = {
                # a moment lies on its parameter's device and in its layout, the count of steps on the CPU
                key: torch.empty_like(parameter).copy_(moment) if moment.ndim else moment
                for key, moment in moments.items()
            }


def _write_info(folder: Path, info: CheckpointInfo) -> None:
    content = {**_progress(info), "recipe": recipe_to_table(info.recipe), "figures": info.figures}
    with new_file(folder / _INFO) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _progress(info: CheckpointInfo) -> dict[str, Any]:
    """Return what has to agree with the weights."""
    return {"stage": info.stage, "step": info.step, "complete": info.complete, "state": info.state}


def _progress_of_weights(folder: Path) -> dict[str, Any]:
    """Return what the weights say of themselves; nothing if they cannot be read or say nothing."""
    try:
        with safe_open(folder / _WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return {}  # who needs the weights is told
    progress: dict[str, Any] = json.loads(metadata.get(_PROGRESS, "{}"))
    return progress


def _optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    state: Mapping[Any, Mapping[str, Any]] = optimizer.state
    return {
        f"{_OPTIMIZER}{name}.{key}": torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
        for name, parameter in network.named_parameters()
        if parameter in state
        for key, value in state[parameter].items()
    }


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / _WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as err:
        raise InputError(
            f"no readable weights ({err})", where=path, fix="give a folder that darcnn-train wrote"
        ) from err
