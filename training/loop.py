"""The training loop: batches in, steps, scalars and checkpoints out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from darcnn.runtime.errors import UsageError
from darcnn.training.checkpoint import (
    CheckpointInfo,
    load_network,
    load_optimizer,
    read_info,
    save_checkpoint,
)
from darcnn.training.config import relevant_part
from darcnn.training.data.batches import prefetch
from darcnn.training.model.network import Darcnn
from darcnn.training.schedule import PlateauProgress, PlateauRule, learning_rate_factor
from darcnn.training.steps import learning_parts

__all__ = ["LoopPlan", "train"]

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
    patience: int | None = None  # steps without gain after which the stage ends
    settle_steps: int = 0  # first steps, in which the loss says nothing yet
    resume: bool = False


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
        make_batch: step -> batch, a pure function, called one step ahead in a thread.
        losses_of: batch and step -> named, weighted losses; their sum is minimised.
        after_step: called after each optimiser step.

    Raises:
        UsageError: the stage to resume was begun with another recipe.
    """
    saved = _saved_progress(plan)
    if saved is not None and saved.complete:
        return load_network(plan.folder)[0]
    first = 0
    if saved is not None:
        network.load_state_dict(load_network(plan.folder)[0].state_dict())
        first = saved.step
    # depthwise convolutions run backward two to four times as fast on a CPU
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = list(network.select_trainable(*learning_parts(network, plan.stage)))
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=_WEIGHT_DECAY)
    if saved is not None:
        load_optimizer(plan.folder, network, optimizer)
    rule = PlateauRule(
        plan.patience or plan.steps + 1,
        settle_steps=plan.settle_steps,
        progress=PlateauProgress(**saved.state) if saved else PlateauProgress(),
    )
    best = _BestWeights(plan.folder, network, resumed=saved is not None)
    plateaued = False
    batches = prefetch(make_batch, range(first, plan.steps))
    steps = tqdm(batches, desc=plan.stage, initial=first, total=plan.steps, file=sys.stderr, unit="step")
    with SummaryWriter(str(plan.folder / "scalars")) as scalars:
        for step, batch in enumerate(steps, start=first):
            rate = plan.learning_rate * learning_rate_factor(step, warm_up=plan.warm_up, steps=plan.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # RPN and heads sample with torch's generator: seeded by step, a resumed stage goes on exactly
            torch.manual_seed(plan.info.recipe.seed * 1_000_003 + step)
            values = _step(optimizer, parameters, losses_of(batch, step))
            after_step()
            for name, value in values.items():
                scalars.add_scalar(f"{plan.stage}/{name}", value, step)
            scalars.add_scalar(f"{plan.stage}/learning_rate", rate, step)
            steps.set_postfix_str(f"loss {values['total']:.3f}")
            plateaued = rule.update(step, values["total"])
            if plan.patience is not None and rule.best_step == step:
                best.take()
            if plateaued:
                best.give_back()
                break
            if (step + 1) % _SAVE_EVERY == 0:
                best.save()
                info = replace(plan.info, step=step + 1, complete=False, state=asdict(rule.progress))
                save_checkpoint(plan.folder, network, info, optimizer)
    done = rule.best_step + 1 if plateaued else plan.steps
    save_checkpoint(plan.folder, network, replace(plan.info, step=done, complete=True))
    best.forget()
    return network.eval()


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
        if self.weights is not None:
            save_file({name: tensor.contiguous() for name, tensor in self.weights.items()}, self.path)

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def _saved_progress(plan: LoopPlan) -> CheckpointInfo | None:
    if not plan.resume or not (plan.folder / "checkpoint.json").is_file():
        return None
    info = read_info(plan.folder)
    if relevant_part(info.recipe, plan.stage) != relevant_part(plan.info.recipe, plan.stage):
        raise UsageError("was begun with another recipe", where=plan.folder, fix="choose another --out")
    return info


def _step(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], losses: dict[str, Tensor]
) -> dict[str, float]:
    """Take one step down the sum of `losses`; return them as numbers, with their `total`."""
    total = torch.stack(list(losses.values())).sum()
    if not torch.isfinite(total):
        raise FloatingPointError(f"loss is not finite: { {k: v.item() for k, v in losses.items()} }")
    optimizer.zero_grad(set_to_none=True)
    total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
    optimizer.step()
    return {name: loss.item() for name, loss in losses.items()} | {"total": total.item()}
