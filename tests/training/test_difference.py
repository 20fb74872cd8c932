"""L_diff, and mistake 5: it must not grow with the image or the batch, nor cover all channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.training.adapt.difference import difference_loss

FAST = settings(deadline=None, max_examples=30)
seeds = st.integers(0, 2**31)


def pyramids(seed: int = 0, channels: int = 6) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, channels, 8, 8), (2, channels, 4, 4)]
    shared = [torch.randn(*shape, generator=generator) for shape in shapes]
    # partly alike, so that the loss is neither zero nor one
    private = [level + 0.5 * torch.randn(*level.shape, generator=generator) for level in shared]
    return shared, private


def literal_difference(shared: torch.Tensor, private: torch.Tensor) -> float:
    """Equation (3) with METHOD's centred unit rows, written out for one level."""

    def rows(level: torch.Tensor) -> torch.Tensor:
        half = [level[b, : level.shape[1] // 2, y, x] for b in range(level.shape[0])
                for y in range(level.shape[2]) for x in range(level.shape[3])]  # fmt: skip
        mean = sum(half) / len(half)
        return torch.stack([(row - mean) / (row - mean).norm() for row in half])

    c, p = rows(shared), rows(private)
    return float((c.T @ p / len(c)).pow(2).sum())


@FAST
@given(seeds)
def test_difference_is_equation_3_on_centred_unit_rows(seed: int) -> None:
    shared, private = pyramids(seed)
    expected = sum(literal_difference(c, p) for c, p in zip(shared, private, strict=True)) / 2
    assert difference_loss(shared, private).item() == pytest.approx(expected, rel=1e-4)


@FAST
@given(seeds, st.sampled_from([(2, 1, 1, 1), (1, 1, 2, 1), (1, 1, 1, 3), (3, 1, 2, 2)]))
def test_difference_depends_on_neither_image_nor_batch_size(seed: int, times: tuple[int, ...]) -> None:
    shared, private = pyramids(seed)
    tiled = difference_loss([c.repeat(*times) for c in shared], [p.repeat(*times) for p in private])
    assert tiled.item() == pytest.approx(difference_loss(shared, private).item(), rel=1e-4)


@FAST
@given(seeds, st.floats(1e-2, 1e2), st.floats(1e-2, 1e2), st.floats(-5, 5))
def test_difference_does_not_depend_on_the_scale_and_level_of_features(
    seed: int, scale_c: float, scale_p: float, shift: float
) -> None:
    shared, private = pyramids(seed)
    changed = difference_loss([c * scale_c + shift for c in shared], [p * scale_p - shift for p in private])
    assert changed.item() == pytest.approx(difference_loss(shared, private).item(), rel=2e-2)


@FAST
@given(seeds)
def test_difference_lies_between_zero_and_one(seed: int) -> None:
    assert 0.0 <= difference_loss(*pyramids(seed)).item() <= 1.0 + 1e-5


def test_second_half_of_the_channels_is_left_free() -> None:
    shared, private = pyramids()
    for level in (*shared, *private):
        level.requires_grad_()
    loss = difference_loss(shared, private)
    loss.backward()
    for level in (*shared, *private):
        assert level.grad is not None
        assert level.grad[:, :3].abs().max() > 0
        assert level.grad[:, 3:].abs().max() == 0
    changed = [torch.cat([level[:, :3], level[:, 3:] * 9 + 1], dim=1) for level in shared]
    assert difference_loss(changed, private).item() == loss.item()


def test_equal_features_are_worse_than_unrelated_ones() -> None:
    shared, _ = pyramids()
    other, _ = pyramids(seed=9)
    assert difference_loss(shared, shared).item() > 10 * difference_loss(shared, other).item()


def test_orthogonal_halves_cost_nothing() -> None:
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0]).reshape(1, 1, 2, 2)
    other = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 1, 2, 2)
    free = torch.zeros_like(signs)
    assert difference_loss(
        [torch.cat([signs, free], 1)], [torch.cat([other, free], 1)]
    ).item() == pytest.approx(0)


def test_flat_features_give_a_finite_loss_and_gradient() -> None:
    shared, private = torch.ones(1, 4, 3, 3, requires_grad=True), torch.ones(1, 4, 3, 3, requires_grad=True)
    loss = difference_loss([shared], [private])
    loss.backward()
    assert loss.item() == 0.0
    assert shared.grad is not None
    assert torch.isfinite(shared.grad).all()


def test_levels_of_different_pyramids_are_refused() -> None:
    shared, private = pyramids()
    with pytest.raises(ValueError, match="zip"):
        difference_loss(shared, private[:1])
