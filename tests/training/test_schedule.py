"""Weights and rates over the steps, and the rule that ends a stage."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.training.schedule import PlateauProgress, PlateauRule, learning_rate_factor, similarity_weight

FAST = settings(deadline=None, max_examples=80)
counts = st.integers(1, 300)


@FAST
@given(st.floats(0, 1), counts)
def test_alpha_rises_from_first_to_one_and_stays(first: float, rise_steps: int) -> None:
    path = [similarity_weight(step, first=first, rise_steps=rise_steps) for step in range(2 * rise_steps)]
    assert path[0] == pytest.approx(first)
    assert path == sorted(path)
    assert set(path[rise_steps:]) == {1.0}


def test_alpha_without_a_rise_is_one_at_once() -> None:
    assert similarity_weight(0, first=0.1, rise_steps=0) == 1.0


@FAST
@given(st.integers(0, 50), counts)
def test_learning_rate_warms_up_then_falls_to_a_twentieth(warm_up: int, more: int) -> None:
    steps = warm_up + more
    path = [learning_rate_factor(step, warm_up=warm_up, steps=steps) for step in range(steps + 1)]
    assert all(0 < factor <= 1 for factor in path)
    assert path[:warm_up] == sorted(path[:warm_up])
    assert path[warm_up:] == sorted(path[warm_up:], reverse=True)
    assert path[warm_up] == 1.0
    assert path[-1] == pytest.approx(0.05)


def test_learning_rate_survives_a_stage_shorter_than_its_warm_up() -> None:
    assert [learning_rate_factor(s, warm_up=10, steps=2) for s in (0, 1)] == [0.1, 0.2]


def run(rule: PlateauRule, losses: list[float], first: int = 0) -> int | None:
    """Return the step at which `rule` says that training has plateaued."""
    for step, loss in enumerate(losses, start=first):
        if rule.update(step, loss):
            return step
    return None


@FAST
@given(counts)
def test_a_loss_that_keeps_falling_never_plateaus(patience: int) -> None:
    losses = [math.exp(-0.2 * step) for step in range(100)]
    assert run(PlateauRule(patience), losses) is None


@FAST
@given(st.integers(1, 60), st.floats(0.01, 100))
def test_a_loss_that_stays_plateaus_after_the_patience(patience: int, loss: float) -> None:
    rule = PlateauRule(patience, smoothing=0.0)  # the loss itself instead of its average
    assert run(rule, [loss] * 100) == patience
    assert rule.best_step == 0


def test_best_step_is_the_last_one_before_the_loss_rose() -> None:
    rule = PlateauRule(patience=5, smoothing=0.0)
    assert run(rule, [10.0, 8.0, 6.0, 4.0] + [20.0] * 20) == 8
    assert rule.best_step == 3


def test_a_gain_below_the_least_is_no_gain() -> None:
    losses = [1.0 - 0.0001 * step for step in range(50)]
    assert run(PlateauRule(patience=20, least_gain=0.01, smoothing=0.0), losses) == 20


def test_an_average_of_a_few_settled_steps_decides_nothing() -> None:
    # one lucky loss would never be reached again
    stop = run(PlateauRule(patience=10, settle_steps=5), [1.0] * 5 + [0.01] + [1.0] * 300)
    assert stop is not None
    assert stop > 40


@FAST
@given(st.integers(1, 60), st.integers(1, 20), st.sampled_from([0.0, 0.9, 0.98]))
def test_steps_in_which_the_loss_still_settles_do_not_count(
    settle_steps: int, patience: int, smoothing: float
) -> None:
    rising = [0.1 * (1 + step) for step in range(settle_steps)]
    rule = PlateauRule(patience, settle_steps=settle_steps, smoothing=smoothing)
    stop = run(rule, rising + [50.0] * 200)
    assert stop is not None
    assert rule.best_step >= settle_steps
    assert rule.best_step + patience == stop
    assert stop <= settle_steps + round(1 / (1 - smoothing)) + patience


def test_one_noisy_loss_does_not_end_a_stage() -> None:
    losses = [math.exp(-0.05 * step) for step in range(100)]
    losses[40] = 3.0
    assert run(PlateauRule(patience=25), losses) is None


@FAST
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=40), st.data())
def test_a_rule_resumed_from_its_progress_decides_as_if_never_interrupted(
    losses: list[float], draws: st.DataObject
) -> None:
    cut = draws.draw(st.integers(1, len(losses) - 1))
    whole, first = PlateauRule(patience=7), PlateauRule(patience=7)
    expected = run(whole, losses)
    if run(first, losses[:cut]) is not None:
        return
    second = PlateauRule(patience=7, progress=PlateauProgress(**asdict(first.progress)))
    assert run(second, losses[cut:], first=cut) == expected
    assert second.best_step == whole.best_step
