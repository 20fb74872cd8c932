"""L_target against a literal reading of equations (4) to (6), and mistakes 1, 2 and 3."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.training.adapt.consistency import background_consistency

FAST = settings(deadline=None, max_examples=50)
CHANNELS, CELLS = 5, 4


def regions(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, CHANNELS, CELLS, CELLS, generator=generator)
    return features, torch.rand(n, CELLS, CELLS, generator=generator)


def literal_consistency(features: torch.Tensor, mask: torch.Tensor, image: list[int], n_images: int) -> float:
    """Equations (4) to (6), position by position."""
    backgrounds: dict[int, list[torch.Tensor]] = {number: [] for number in range(n_images)}
    for r in range(len(features)):
        positions = [features[r, :, y, x] for y in range(CELLS) for x in range(CELLS) if mask[r, y, x] < 0.5]
        if positions:
            backgrounds[image[r]].append(torch.stack(positions).mean(dim=0))
    total = 0.0
    for found in backgrounds.values():
        if len(found) >= 2:
            mu = torch.stack(found).mean(dim=0)
            total += sum((b - mu).abs().sum().item() / CHANNELS for b in found) / len(found)
    return total / n_images


@FAST
@given(st.lists(st.integers(0, 2), max_size=8), st.integers(0, 10**6))
def test_consistency_is_equations_4_to_6_written_out(image: list[int], seed: int) -> None:
    features, mask = regions(len(image), seed)
    if len(image) > 2:
        mask[0] = 0.9  # a region without background
    loss = background_consistency(features, mask, torch.tensor(image, dtype=torch.int64), 3)
    assert loss.item() == pytest.approx(literal_consistency(features, mask, image, 3), abs=1e-5)


def test_mean_background_is_taken_per_image_not_per_batch() -> None:
    # within each image all backgrounds are equal, between the images they differ: nothing to complain about
    features = torch.ones(4, CHANNELS, CELLS, CELLS)
    features[2:] = 7.0
    mask = torch.zeros(4, CELLS, CELLS)
    assert background_consistency(features, mask, torch.tensor([0, 0, 1, 1]), 2).item() == 0.0
    assert background_consistency(features, mask, torch.tensor([0, 1, 0, 1]), 2).item() == pytest.approx(3.0)


@FAST
@given(st.lists(st.floats(0, 1), min_size=2, max_size=5))
def test_consistency_measures_the_look_of_the_background_not_the_area_of_the_mask(
    shares: list[float],
) -> None:
    # the same background in every region, seen on areas as different as can be
    features = torch.full((len(shares), CHANNELS, CELLS, CELLS), 3.0)
    mask = torch.zeros(len(shares), CELLS * CELLS)
    for row, share in enumerate(shares):
        mask[row, : int(share * (CELLS * CELLS - 1))] = 1.0
    mask = mask.reshape(-1, CELLS, CELLS)
    features = torch.where(mask[:, None] > 0.5, 100.0, features)  # the objects' own look does not count
    loss = background_consistency(features, mask, torch.zeros(len(shares), dtype=torch.int64), 1)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("image", [[], [0], [0, 1], [1]])
def test_images_with_fewer_than_two_regions_add_exactly_zero(image: list[int]) -> None:
    features, mask = regions(len(image))
    features.requires_grad_()
    loss = background_consistency(features, mask, torch.tensor(image, dtype=torch.int64), 2)
    assert loss.item() == 0.0
    loss.backward()
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("n_foreground", [1, 2, 3])
def test_regions_without_background_are_left_out_and_give_no_nan(n_foreground: int) -> None:
    features, mask = regions(3)
    features.requires_grad_()
    mask[:n_foreground] = 0.8
    image = torch.zeros(3, dtype=torch.int64)
    loss = background_consistency(features, mask, image, 1)
    rest = background_consistency(features[n_foreground:], mask[n_foreground:], image[n_foreground:], 1)
    assert torch.isfinite(loss)
    assert loss.item() == pytest.approx(rest.item())
    assert (loss.item() == 0.0) == (n_foreground >= 2)
    loss.backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
    assert not features.grad[:n_foreground].any()


def test_an_image_without_regions_halves_the_mean_of_two() -> None:
    features, mask = regions(3)
    image = torch.zeros(3, dtype=torch.int64)
    alone, beside_empty = (background_consistency(features, mask, image, n).item() for n in (1, 2))
    assert beside_empty == pytest.approx(alone / 2)
    assert alone > 0


def test_the_indicator_passes_no_gradient() -> None:
    features, mask = regions(4)
    features.requires_grad_()
    logits = torch.logit(mask.clamp(0.01, 0.99)).requires_grad_()
    background_consistency(features, logits.sigmoid(), torch.zeros(4, dtype=torch.int64), 1).backward()
    assert logits.grad is None or not logits.grad.any()
    assert features.grad is not None
    assert features.grad.any()


def test_gradient_reaches_background_positions_only() -> None:
    features, mask = regions(4)
    features.requires_grad_()
    background_consistency(features, mask, torch.zeros(4, dtype=torch.int64), 1).backward()
    assert features.grad is not None
    foreground = (mask >= 0.5)[:, None].expand_as(features)
    assert not features.grad[foreground].any()


def test_gradient_flows_through_the_mean_background_as_well() -> None:
    features = torch.tensor([0.0, 0.0, 3.0]).reshape(3, 1, 1, 1).requires_grad_()
    background_consistency(features, torch.zeros(3, 1, 1), torch.zeros(3, dtype=torch.int64), 1).backward()
    assert features.grad is not None
    # loss = (|b0 - mu| + |b1 - mu| + |b2 - mu|) / 3 with mu = (b0 + b1 + b2) / 3;
    # were mu a constant, the gradient would be -1/3, -1/3, 1/3
    assert features.grad.flatten().tolist() == pytest.approx([-2 / 9, -2 / 9, 4 / 9])


def test_repeating_the_channels_changes_nothing() -> None:
    features, mask = regions(5)
    image = torch.tensor([0, 0, 1, 1, 1])
    once = background_consistency(features, mask, image, 2).item()
    assert background_consistency(features.repeat(1, 3, 1, 1), mask, image, 2).item() == pytest.approx(once)
