"""The loop: an interrupted stage goes on exactly, a plateau gives back what was before it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from darcnn.runtime.errors import UsageError
from darcnn.training import loop
from darcnn.training.checkpoint import CheckpointInfo, load_network, read_info
from darcnn.training.config import Recipe
from darcnn.training.data.batches import Batch
from darcnn.training.history import read_history
from darcnn.training.loop import LoopPlan, train
from darcnn.training.model.network import Darcnn
from darcnn.training.steps import adapt_losses, learning_parts, source_losses

State = dict[str, Tensor]


@dataclass
class Interruption:
    """Raises KeyboardInterrupt when the losses of step `at` are asked for."""

    at: int | None = None

    def check(self, step: int) -> None:
        if step == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def plan(recipe: Recipe, tmp_path: Path) -> LoopPlan:
    """Four steps of the source stage."""
    info = CheckpointInfo("source", 0, False, recipe)
    return LoopPlan("source", 4, learning_rate=1e-3, warm_up=2, folder=tmp_path / "stage", info=info)


@pytest.fixture
def save_every(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets after how many steps a checkpoint is written."""
    return lambda steps: monkeypatch.setattr(loop, "_SAVE_EVERY", steps)


def state_of(network: Darcnn) -> State:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def assert_equal(one: State, other: State) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def run_source(
    start: Darcnn, plan: LoopPlan, batches: list[Batch], interruption: Interruption | None = None
) -> Darcnn:
    network = copy.deepcopy(start)

    def losses_of(batch: Batch, step: int) -> dict[str, Tensor]:
        if interruption is not None:
            interruption.check(step)
        return source_losses(network, batch)

    return train(network, plan, lambda step: batches[step], losses_of)


@pytest.fixture(scope="module")
def batches(make_batch: Callable[..., Batch]) -> list[Batch]:
    """A different batch for each of four steps."""
    return [make_batch(64, 14.0 + 3 * step) for step in range(4)]


def test_a_resumed_stage_ends_with_the_weights_of_one_that_never_stopped(
    network: Darcnn, plan: LoopPlan, batches: list[Batch], save_every: Callable[[int], None], tmp_path: Path
) -> None:
    save_every(2)
    whole = run_source(network, replace(plan, folder=tmp_path / "whole"), batches)
    with pytest.raises(KeyboardInterrupt):
        run_source(network, plan, batches, Interruption(at=3))
    saved = read_info(plan.folder)
    assert (saved.step, saved.complete) == (2, False)
    other_start = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other_start.parameters():
            parameter.zero_()  # the checkpoint's weights count, not those it was started with
    torch.rand(7)  # nor what the generator did in between
    resumed = run_source(other_start, replace(plan, resume=True), batches)
    assert_equal(state_of(whole), state_of(resumed))
    assert_equal(state_of(whole), state_of(load_network(plan.folder)[0]))
    assert not torch.equal(
        state_of(whole)["proposer.head.cls_logits.weight"],
        state_of(network)["proposer.head.cls_logits.weight"],
    )


def test_a_finished_stage_is_not_trained_again(network: Darcnn, plan: LoopPlan, batches: list[Batch]) -> None:
    short = replace(plan, steps=1)
    first = run_source(network, short, batches)
    again = run_source(network, replace(short, resume=True), batches, Interruption(at=0))
    assert_equal(state_of(first), state_of(again))
    assert read_info(plan.folder).complete
    assert not again.training


def test_a_stage_begun_with_another_recipe_is_refused(
    network: Darcnn, plan: LoopPlan, batches: list[Batch]
) -> None:
    short = replace(plan, steps=1)
    run_source(network, short, batches)
    other = replace(short.info, recipe=replace(short.info.recipe, seed=99))
    with pytest.raises(UsageError, match="another recipe"):
        run_source(network, replace(short, info=other, resume=True), batches)


class Scripted:
    """Losses whose values are written down and whose gradient moves one weight, and nothing else."""

    def __init__(self, network: Darcnn, values: list[float]) -> None:
        self.network, self.values = network, values
        self.weights: list[Tensor] = []  # the one that moves, after each step
        self.interruption = Interruption()

    def losses_of(self, batch: int, step: int) -> dict[str, Tensor]:
        self.interruption.check(step)
        weight = moving_weight(self.network).sum()
        return {"scripted": self.values[step] + weight - weight.detach()}

    def after_step(self) -> None:
        self.weights.append(moving_weight(self.network).detach().clone())


def moving_weight(network: Darcnn) -> Tensor:
    return network.projection[0].weight


BEST = 59  # falls for long enough that the average is trusted, then rises
FALL_THEN_RISE = [100.0 - step for step in range(BEST + 1)] + [1000.0] * 10
PATIENCE = 3


def train_script(script: Scripted, plan: LoopPlan) -> Darcnn:
    return train(script.network, plan, lambda step: step, script.losses_of, script.after_step)


@pytest.fixture
def plateau_plan(plan: LoopPlan) -> LoopPlan:
    """Steps of adaptation that end three after the last gain."""
    info = replace(plan.info, stage="adapt")
    return replace(plan, stage="adapt", steps=len(FALL_THEN_RISE), info=info, patience=PATIENCE)


def test_a_plateau_ends_the_stage_with_the_weights_from_before(
    network: Darcnn, plateau_plan: LoopPlan
) -> None:
    before = state_of(network)
    script = Scripted(network, FALL_THEN_RISE)
    trained = train_script(script, plateau_plan)
    assert len(script.weights) == BEST + PATIENCE + 1
    assert torch.equal(moving_weight(trained), script.weights[BEST])
    assert not torch.equal(script.weights[-1], script.weights[BEST])
    loaded, info = load_network(plateau_plan.folder)
    assert_equal({**before, "projection.0.weight": script.weights[BEST]}, state_of(loaded))
    assert (info.step, info.complete) == (BEST + 1, True)


def test_a_stage_resumed_before_its_plateau_still_gives_back_the_weights_from_before(
    network: Darcnn, plateau_plan: LoopPlan, save_every: Callable[[int], None]
) -> None:
    save_every(BEST + 2)  # one step after the best
    script = Scripted(copy.deepcopy(network), FALL_THEN_RISE)
    script.interruption.at = BEST + 3
    with pytest.raises(KeyboardInterrupt):
        train_script(script, plateau_plan)
    second = Scripted(network, FALL_THEN_RISE)
    trained = train_script(second, replace(plateau_plan, resume=True))
    assert len(second.weights) == PATIENCE - 1  # the steps after the checkpoint
    assert torch.equal(moving_weight(trained), script.weights[BEST])


def test_a_stage_without_a_plateau_keeps_its_last_weights(network: Darcnn, plateau_plan: LoopPlan) -> None:
    script = Scripted(network, FALL_THEN_RISE[: BEST + 1])
    trained = train_script(script, replace(plateau_plan, steps=BEST + 1))
    assert len(script.weights) == BEST + 1
    assert torch.equal(moving_weight(trained), script.weights[-1])
    files = {path.name for path in plateau_plan.folder.iterdir() if path.is_file()}
    assert files == {"checkpoint.safetensors", "checkpoint.json", "history.csv"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_stage_and_leaves_the_checkpoint_before_it(
    network: Darcnn, plateau_plan: LoopPlan, save_every: Callable[[int], None], value: float
) -> None:
    save_every(1)
    script = Scripted(network, [1.0, value])
    with pytest.raises(UsageError) as caught:
        train_script(script, replace(plateau_plan, steps=2))
    assert f"the loss scripted of stage adapt is {value} at step 1" in str(caught.value)
    assert "adapt_stage.learning_rate" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(script.weights) == 1
    loaded, info = load_network(plateau_plan.folder)
    assert (info.step, info.complete) == (1, False)
    assert torch.equal(moving_weight(loaded), script.weights[0])
    assert [row["step"] for row in read_history(plateau_plan.folder)] == [0]


def test_a_gradient_that_is_no_number_stops_the_stage_before_the_weights_take_it(
    network: Darcnn, plateau_plan: LoopPlan
) -> None:
    def losses_of(batch: int, step: int) -> dict[str, Tensor]:
        weight = moving_weight(network).sum()
        return {"root": torch.sqrt(weight - weight.detach())}  # 0, and infinitely steep

    before = state_of(network)
    with pytest.raises(UsageError, match=r"the gradient of stage adapt is (nan|inf) at step 0"):
        train(network, plateau_plan, lambda number: number, losses_of)
    assert_equal(before, state_of(network))


def test_accumulated_batches_give_the_mean_of_their_gradients(
    network: Darcnn, plan: LoopPlan, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learning = learning_parts(network, "source")
    parameters = list(network.select_trainable(*learning))
    gradients: list[list[Tensor]] = []
    for batch in batches[:2]:
        total = torch.stack(list(source_losses(network, batch).values())).sum()
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        gradients.append(
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        )
    seen: list[Tensor] = []
    original = nn.utils.clip_grad_norm_

    def spy(clipped: list[nn.Parameter], norm: float) -> Tensor:
        seen.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in clipped)
        return original(clipped, norm)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", spy)
    run_source(network, replace(plan, steps=1, accumulate=2), batches)
    for one, other, accumulated in zip(*gradients, seen, strict=True):
        torch.testing.assert_close(accumulated, (one + other) / 2, atol=1e-5, rtol=1e-4)
    (row,) = read_history(plan.folder)
    assert row["total"] == pytest.approx(sum(row[t] for t in row if t.split("_")[0] in ("rpn", "head")))


def test_a_step_takes_its_own_batches_when_they_accumulate(network: Darcnn, plateau_plan: LoopPlan) -> None:
    taken: list[tuple[int, int]] = []
    script = Scripted(network, FALL_THEN_RISE)

    def losses_of(batch: int, step: int) -> dict[str, Tensor]:
        taken.append((step, batch))
        return script.losses_of(batch, step)

    train(network, replace(plateau_plan, steps=2, accumulate=3), lambda number: number, losses_of)
    assert taken == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]


def test_an_error_while_making_a_batch_reaches_the_caller(network: Darcnn, plateau_plan: LoopPlan) -> None:
    script = Scripted(network, FALL_THEN_RISE)

    def make_batch(step: int) -> int:
        if step == 2:
            raise OSError("the disk is gone")
        return step

    with pytest.raises(OSError, match="the disk is gone"):
        train(network, plateau_plan, make_batch, script.losses_of, script.after_step)


def test_tensorboard_has_a_scalar_for_every_term_at_every_step(
    network: Darcnn, plan: LoopPlan, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    terms: set[str] = set()

    def losses_of(step_number: int, step: int) -> dict[str, Tensor]:
        losses = adapt_losses(network, small_batch, small_tiles, recipe.adapt_stage, 0.5)
        terms.update(losses)
        return losses

    info = replace(plan.info, stage="adapt")
    train(network, replace(plan, stage="adapt", steps=2, info=info), lambda step: step, losses_of)
    events = EventAccumulator(str(plan.folder / "scalars"))
    events.Reload()
    assert len(terms) == 8
    assert set(events.Tags()["scalars"]) == {f"adapt/{n}" for n in (*terms, "total", "learning_rate")}
    for term in terms:
        assert [event.step for event in events.Scalars(f"adapt/{term}")] == [0, 1]
    total = events.Scalars("adapt/total")[0].value
    assert total == pytest.approx(sum(events.Scalars(f"adapt/{t}")[0].value for t in terms), rel=1e-4)
