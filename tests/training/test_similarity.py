"""L_sim against a literal reading of equation (2), and mistake 4: a kernel that saturates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from darcnn.training.adapt.similarity import maximum_mean_discrepancy, project, similarity_loss

FAST = settings(deadline=None, max_examples=60)
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)

values = st.floats(-50, 50, width=32).map(lambda v: round(v, 2))


def samples(n: int) -> st.SearchStrategy[torch.Tensor]:
    return hnp.arrays(np.float64, (n, 3), elements=values).map(torch.from_numpy)


def literal_discrepancy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Equation (2) as printed: three double means, one pair at a time."""
    joint = [*source.tolist(), *target.tolist()]

    def distance(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    pairs = [distance(a, b) for i, a in enumerate(joint) for j, b in enumerate(joint) if i != j]
    closest = min(distance(a, b) for a in source.tolist() for b in target.tolist())
    median = max(sorted(pairs)[(len(pairs) - 1) // 2], closest, 1e-12)

    def mean_kernel(first: list[list[float]], second: list[list[float]]) -> float:
        total = 0.0
        for a in first:
            for b in second:
                total += sum(math.exp(-distance(a, b) / (f * median)) for f in FACTORS) / len(FACTORS)
        return total / (len(first) * len(second))

    s, t = source.tolist(), target.tolist()
    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def domains(gap: float, n: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples of unit spread whose means are `gap` apart; the source takes a gradient."""
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(n, 16, generator=generator)
    target = torch.randn(n, 16, generator=generator) + gap / 4.0  # 16 dimensions: gap in all
    return source.requires_grad_(), target


@FAST
@given(st.integers(1, 4).flatmap(samples), st.integers(1, 4).flatmap(samples))
def test_discrepancy_is_equation_2_written_out(source: torch.Tensor, target: torch.Tensor) -> None:
    assert maximum_mean_discrepancy(source, target).item() == pytest.approx(
        literal_discrepancy(source, target), abs=1e-6
    )


@FAST
@given(st.integers(1, 4).flatmap(samples))
def test_discrepancy_of_a_sample_with_itself_is_zero(sample: torch.Tensor) -> None:
    assert maximum_mean_discrepancy(sample, sample.clone()).item() == pytest.approx(0.0, abs=1e-6)


@FAST
@given(st.integers(1, 4).flatmap(samples), st.integers(1, 4).flatmap(samples))
def test_discrepancy_is_symmetric_and_never_negative(source: torch.Tensor, target: torch.Tensor) -> None:
    there, back = maximum_mean_discrepancy(source, target), maximum_mean_discrepancy(target, source)
    assert there.item() == pytest.approx(back.item(), abs=1e-6)
    assert there.item() > -1e-6


@FAST
@given(st.floats(1e-3, 1e3))
def test_discrepancy_does_not_depend_on_the_unit_of_the_features(unit: float) -> None:
    source, target = domains(3.0)
    expected = maximum_mean_discrepancy(source, target).item()
    assert maximum_mean_discrepancy(source * unit, target * unit).item() == pytest.approx(expected, rel=1e-3)


def test_discrepancy_grows_with_the_gap_between_domains() -> None:
    figures = [maximum_mean_discrepancy(*domains(gap, n=8)).item() for gap in (0.0, 4.0, 16.0, 64.0)]
    assert figures == sorted(figures)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e2, 1e4, 1e6])
def test_similarity_gradient_does_not_vanish_for_far_domains(gap: float) -> None:
    source, target = domains(gap)
    maximum_mean_discrepancy(source, target).backward()
    assert source.grad is not None
    # the loss does not know the unit of the features: a gradient is large or small against 1 / their spread
    spread = (torch.cat([source.detach(), target]).std(dim=0).norm()).item()
    assert source.grad.norm().item() * spread > 0.01


@pytest.mark.parametrize("gap", [30.0, 1e3, 1e5])
def test_gradient_moves_far_domains_towards_each_other(gap: float) -> None:
    source, target = domains(gap)
    maximum_mean_discrepancy(source, target).backward()
    assert source.grad is not None
    direction = (target - source.detach()).mean(dim=0)
    pull = -(source.grad.sum(dim=0) @ direction).item()
    assert pull > 0.01


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0])
def test_similarity_gradient_does_not_vanish_for_close_domains(scale: float) -> None:
    source, target = domains(1.0)
    source = (source.detach() * scale).requires_grad_()
    maximum_mean_discrepancy(source, target * scale).backward()
    assert source.grad is not None
    assert source.grad.norm().item() * scale > 0.01


def test_equal_domains_have_a_finite_gradient() -> None:
    source = torch.ones(2, 5, requires_grad=True)
    maximum_mean_discrepancy(source, torch.ones(2, 5)).backward()
    assert source.grad is not None
    assert torch.isfinite(source.grad).all()


@pytest.mark.parametrize(
    ("size", "cells"), [((8, 8), 64), ((32, 32), 1024), ((64, 64), 1024), ((96, 40), 1024), ((64, 16), 512)]
)
def test_projected_levels_are_one_channel_of_at_most_32_x_32(size: tuple[int, int], cells: int) -> None:
    flat = project([torch.randn(3, 6, *size)], nn.ModuleList([nn.Conv2d(6, 1, 1)]))
    assert flat[0].shape == (3, cells)


def test_pooling_a_level_keeps_its_mean() -> None:
    level, layer = torch.randn(2, 4, 128, 128), nn.Conv2d(4, 1, 1)
    (flat,) = project([level], nn.ModuleList([layer]))
    torch.testing.assert_close(flat.mean(dim=1), layer(level).mean(dim=(1, 2, 3)), atol=1e-5, rtol=1e-4)


def test_similarity_is_the_mean_over_levels() -> None:
    levels = [domains(gap) for gap in (1.0, 10.0)]
    whole = similarity_loss([s for s, _ in levels], [t for _, t in levels]).item()
    assert whole == pytest.approx(sum(maximum_mean_discrepancy(s, t).item() for s, t in levels) / 2)


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 5), (2, 8)])
def test_gradient_does_not_vanish_when_most_pairs_lie_within_one_domain(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(n, 16, generator=generator).requires_grad_()
    target = torch.randn(m, 16, generator=generator) + 1e3
    maximum_mean_discrepancy(source, target).backward()
    towards = (target - source.detach().mean(0)).mean(0)
    assert source.grad is not None
    assert -(source.grad.sum(0) @ towards).item() > 0.01
