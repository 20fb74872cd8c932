"""The training loop: batches in; steps, scalars, pictures and checkpoints out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from darcnn.runtime.errors import UsageError
from darcnn.training import parallel
from darcnn.training.checkpoint import (
    CheckpointInfo,
    load_network,
    load_optimizer,
    read_info,
    record_recipe,
    save_checkpoint,
)
from darcnn.training.config import Recipe, changed_keys, relevant_part
from darcnn.training.data.batches import prefetch
from darcnn.training.history import History, Sheet
from darcnn.training.model.network import Darcnn
from darcnn.training.schedule import PlateauProgress, PlateauRule, learning_rate_factor
from darcnn.training.steps import learning_parts
from darcnn.training.writing import new_file

__all__ = ["LoopPlan", "saved_progress", "train"]

_CLIP_NORM = 10.0
_SAVE_EVERY = 100
_WEIGHT_DECAY = 1e-4

B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """What the loop needs to know of a stage."""

    stage: str  # "source", "adapt" or "refine": chooses the parts that learn
    steps: int
    learning_rate: float
    warm_up: int
    folder: Path
    info: CheckpointInfo
    few: bool = False  # of the parts that learn, only small ones
    accumulate: int = 1  # batches whose gradients make one step
    patience: int | None = None  # steps without gain after which the stage ends
    settle_steps: int = 0  # first steps, in which the loss says nothing yet
    resume: bool = False
    sheet: Sheet | None = None  # a picture of what the network finds
    sheet_every: int = _SAVE_EVERY
    observed: dict[str, float] = field(default_factory=dict)  # what the losses tell beside their values
    slow: nn.Module | None = None  # a part whose learning rate is only
    slow_rate: float = 1.0  # this share of the others'


def train(
    network: Darcnn,
    plan: LoopPlan,
    make_batch: Callable[[int], B],
    losses_of: Callable[[B, int], dict[str, Tensor]],
    after_step: Callable[[], None] = lambda: None,
) -> Darcnn:
    """Train `network` for the steps of `plan` and return it; its checkpoint lies in `plan.folder`.

    Args:
        network: the network to start from; a resumed stage replaces its weights by the checkpoint's.
        plan: stage, length, rates, folder.
        make_batch: number -> batch, a pure function, called one ahead in a thread. Step s takes the
            batches s * accumulate to (s + 1) * accumulate - 1.
        losses_of: batch and step -> named, weighted losses; their sum is minimised.
        after_step: called after each optimiser step.

    Raises:
        UsageError: the stage to resume was begun with another recipe, or a loss or gradient is not finite.
        OutputError: the folder cannot be written.
    """
    saved = _saved_progress(plan)
    if saved is not None and saved.complete:
        if parallel.is_first():
            record_recipe(plan.folder, plan.info.recipe)
        parallel.wait_for_all()
        return _moved(load_network(plan.folder)[0], network)
    first = 0
    if saved is not None:
        network.load_state_dict(load_network(plan.folder)[0].state_dict())
        first = saved.step
    # depthwise convolutions run backward two to four times as fast on a CPU
    network.train().to(memory_format=torch.channels_last)
    parameters = list(network.select_trainable(*learning_parts(network, plan.stage, few=plan.few)))
    optimizer = torch.optim.AdamW(
        _groups(parameters, plan), lr=plan.learning_rate, weight_decay=_WEIGHT_DECAY
    )
    if saved is not None:
        load_optimizer(plan.folder, network, optimizer)
    rule = PlateauRule(
        plan.patience or plan.steps + 1,
        settle_steps=plan.settle_steps,
        progress=PlateauProgress(**saved.state) if saved else PlateauProgress(),
    )
    best = _BestWeights(plan.folder, network, resumed=saved is not None)
    plateaued = False
    device = parameters[0].device
    batches = prefetch(make_batch, range(first * plan.accumulate, plan.steps * plan.accumulate))
    with History(plan.folder, plan.stage, first) as history, _progress(plan, first) as progress:
        for step in range(first, plan.steps):
            rate = plan.learning_rate * learning_rate_factor(step, warm_up=plan.warm_up, steps=plan.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.zero_grad(set_to_none=True)
            values: dict[str, float] = {}
            for _ in range(plan.accumulate):
                batch = next(batches)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    losses = losses_of(batch, step)
                part = _add_gradient(losses, plan, step)
                values = {name: values.get(name, 0.0) + value for name, value in part.items()}
            parallel.average_gradients(parameters)
            norm = nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
            _check_finite({"gradient": float(norm)}, plan, step)
            optimizer.step()
            after_step()
            history.add(step, values | plan.observed | {"learning_rate": rate})
            progress.set_postfix_str(f"loss {values['total']:.3f}", refresh=False)
            progress.update()
            plateaued = rule.update(step, values["total"])
            if plan.patience is not None and rule.best_step == step:
                best.take()
            if plateaued:
                best.give_back()
                break
            if plan.sheet and (step + 1) % plan.sheet_every == 0 and step + 1 < plan.steps:
                history.show(step + 1, plan.sheet, network)
            if (step + 1) % _SAVE_EVERY == 0:
                best.save()
                history.flush()
                info = replace(plan.info, step=step + 1, complete=False, state=asdict(rule.progress))
                _save(plan.folder, network, info, optimizer)
        done = rule.best_step + 1 if plateaued else plan.steps
        if plan.sheet:
            history.show(done, plan.sheet, network)
    _save(plan.folder, network, replace(plan.info, step=done, complete=True))
    best.forget()
    return network.eval()


def _groups(parameters: list[nn.Parameter], plan: LoopPlan) -> list[dict[str, Any]]:
    """Return the optimiser's groups: all parameters, those of `plan.slow` apart."""
    slow = set() if plan.slow is None else {id(parameter) for parameter in plan.slow.parameters()}
    others = [parameter for parameter in parameters if id(parameter) not in slow]
    groups: list[dict[str, Any]] = [{"params": others, "share": 1.0}]
    if slow:
        own = [parameter for parameter in parameters if id(parameter) in slow]
        groups.append({"params": own, "share": plan.slow_rate})
    return groups


def _progress(plan: LoopPlan, first: int) -> tqdm[NoReturn]:
    return tqdm(
        desc=plan.stage,
        initial=first,
        total=plan.steps,
        file=sys.stderr,
        unit="step",
        disable=not parallel.is_first(),
    )


def _moved(network: Darcnn, like: Darcnn) -> Darcnn:
    return network.to(next(like.parameters()).device)


def _save(
    folder: Path, network: Darcnn, info: CheckpointInfo, optimizer: torch.optim.Optimizer | None = None
) -> None:
    if parallel.is_first():
        save_checkpoint(folder, network, info, optimizer)
    parallel.wait_for_all()


class _BestWeights:
    """The weights from before a plateau: in memory, and beside the checkpoint for a resumed stage."""

    def __init__(self, folder: Path, network: Darcnn, *, resumed: bool) -> None:
        self.path = folder / "before_plateau.safetensors"
        self.network = network
        self.weights: dict[str, Tensor] | None = None
        if resumed and self.path.is_file():
            self.weights = load_file(self.path)

    def take(self) -> None:
        self.weights = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}

    def give_back(self) -> None:
        if self.weights is not None:
            self.network.load_state_dict(self.weights)

    def save(self) -> None:
        if self.weights is not None and parallel.is_first():
            with new_file(self.path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, temporary)

    def forget(self) -> None:
        if parallel.is_first():
            self.path.unlink(missing_ok=True)


def _saved_progress(plan: LoopPlan) -> CheckpointInfo | None:
    return saved_progress(plan.folder, plan.stage, plan.info.recipe) if plan.resume else None


def saved_progress(folder: Path, stage: str, recipe: Recipe) -> CheckpointInfo | None:
    """Return what the checkpoint in `folder`, of `stage`, says of itself; None: there is none.

    Raises:
        UsageError: it was begun with another recipe.
    """
    if not (folder / "checkpoint.json").is_file():
        return None
    info = read_info(folder)
    if relevant_part(info.recipe, stage) != relevant_part(recipe, stage):
        differ = ", ".join(changed_keys(info.recipe, recipe))
        raise UsageError(
            f"was begun with another recipe ({differ})",
            where=folder,
            fix="choose another --out, or set it back",
        )
    return info


def _add_gradient(losses: dict[str, Tensor], plan: LoopPlan, step: int) -> dict[str, float]:
    """Add the gradient of a part of one step; return that part's share of each loss, and their `total`.

    Raises:
        UsageError: a loss is not finite.
    """
    values = parallel.mean_over_processes(torch.stack(list(losses.values()))) / plan.accumulate
    named = dict(zip(losses, values.tolist(), strict=True))
    _check_finite({f"loss {name}": value for name, value in named.items()}, plan, step)
    (torch.stack(list(losses.values())).sum() / plan.accumulate).backward()  # type: ignore[no-untyped-call]
    return named | {"total": float(values.sum())}


def _check_finite(values: dict[str, float], plan: LoopPlan, step: int) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise UsageError(
                f"the {name} of stage {plan.stage} is {value} at step {step}",
                where=plan.folder,
                fix=f"lower {plan.stage}_stage.learning_rate; checkpoints before it are whole",
            )
