"""Heads: masks are learned where they lie, and as many of them at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from darcnn.runtime.outlines import outline_probabilities
from darcnn.training.data.batches import Batch
from darcnn.training.model import heads
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import PRESETS
from darcnn.training.model.targets import crop_masks, draw_balanced, generator_of, leave_doubtful
from darcnn.training.steps import source_losses

CELLS = PRESETS["lite"].mask_px


@pytest.mark.parametrize(("x", "y", "w", "h"), [(10, 20, 10, 10), (3, 5, 28, 14), (20, 1, 13, 31)])
def test_what_the_mask_head_learns_lies_where_the_runtime_draws_it(x: int, y: int, w: int, h: int) -> None:
    rows, columns = np.mgrid[:48, :64]
    inside = ((columns + 0.5 - x - w / 2) / (w / 2)) ** 2 + ((rows + 0.5 - y - h / 2) / (h / 2)) ** 2 <= 1
    box = np.array([x, y, x + w, y + h], np.float32)
    truth = crop_masks(
        torch.from_numpy(inside[None].astype(np.uint8)), torch.from_numpy(box[None]), torch.tensor([0]), CELLS
    )
    (drawn,) = outline_probabilities(truth.numpy(), box[None], inside.shape)
    assert drawn is not None
    (x0, y0), mask, _ = drawn
    found = np.zeros_like(inside)
    found[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    assert (found & inside).sum() / (found | inside).sum() > 0.97


def test_a_symmetric_object_gives_a_symmetric_mask() -> None:
    masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[0, 10:20, 10:20] = 1
    truth = crop_masks(masks, torch.tensor([[8.0, 8.0, 22.0, 22.0]]), torch.tensor([0]), CELLS)[0]
    torch.testing.assert_close(truth, truth.flip(0))
    torch.testing.assert_close(truth, truth.flip(1))
    torch.testing.assert_close(truth, truth.T)


def test_masks_of_no_object_are_empty() -> None:
    masks = torch.zeros(0, 32, 32, dtype=torch.uint8)
    assert crop_masks(masks, torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), CELLS).shape == (2, 28, 28)


def test_the_mask_head_sees_as_many_regions_at_every_step(network: Darcnn, small_batch: Batch) -> None:
    seen: list[int] = []
    network.source_heads.mask_head.register_forward_hook(lambda m, inputs, out: seen.append(len(inputs[0])))
    with torch.no_grad():
        for n_objects in (0, 1, None):
            targets = [
                {k: v if k in ("seed", "doubtful") else v[:n_objects] for k, v in t.items()}
                for t in small_batch.targets
            ]
            losses = source_losses(network, Batch(small_batch.images, targets))
            assert (losses["head_mask"] > 0) == (n_objects != 0)
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_background_on_something_doubtful_is_left_out_and_objects_stay() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 8, 18, 18], [8, 0, 18, 10], [40, 40, 50, 50], [0, 0, 10, 10]])
    labels = torch.tensor([0.0, 0, 0, 0, 1])
    target = {"doubtful": torch.tensor([[0.0, 0.0, 12.0, 12.0]])}
    assert leave_doubtful(labels, boxes, target).tolist() == [-1.0, 0.0, -1.0, 0.0, 1.0]
    assert leave_doubtful(labels, boxes, {"doubtful": torch.zeros(0, 4)}).tolist() == labels.tolist()


def test_what_is_doubtful_is_background_neither_to_the_proposer_nor_to_the_heads(
    network: Darcnn, small_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_background: list[int] = []

    def draw(labels: torch.Tensor, *how: Any) -> torch.Tensor:
        n_background.append(int((labels == 0).sum()))
        return draw_balanced(labels, *how)

    monkeypatch.setattr(heads, "draw_balanced", draw)
    everywhere = torch.tensor([[-999.0, -999.0, 999.0, 999.0]])
    targets = [target | {"doubtful": everywhere} for target in small_batch.targets]
    source_losses(network, Batch(small_batch.images, targets))
    assert n_background == [0] * 2 * len(targets)


def test_boxes_are_learned_in_the_rows_that_are_read_of_objects(network: Darcnn, small_batch: Batch) -> None:
    source_losses(network, small_batch)["head_box"].backward()
    background, objects = network.source_heads.box_predictor.bbox_pred.weight.grad.split(4)
    assert objects.any()
    assert not background.any()


def test_what_is_neither_object_nor_background_is_never_drawn() -> None:
    labels = torch.tensor([1.0] * 3 + [0.0] * 50 + [-1.0] * 50)
    rows = draw_balanced(labels, 20, 0.5, torch.Generator().manual_seed(1))
    assert len(set(rows.tolist())) == 20
    assert labels[rows].tolist().count(1.0) == 3
    assert (labels[rows] >= 0).all()


def test_what_is_drawn_of_an_image_depends_on_its_seed_and_use_alone() -> None:
    labels = torch.cat([torch.ones(50), torch.zeros(500), -torch.ones(20)])[torch.randperm(570)]

    def draw(seed: int, use: int) -> list[int]:
        torch.rand(3)  # the common generator does not matter
        generator = generator_of({"seed": torch.tensor(seed)}, use)
        return draw_balanced(labels, 60, 0.5, generator).tolist()

    assert draw(5, 0) == draw(5, 0)
    assert draw(5, 0) != draw(5, 1)
    assert draw(5, 0) != draw(6, 0)


@pytest.mark.parametrize(
    ("n_positive", "n_negative", "drawn"),
    [(50, 500, (30, 30)), (7, 500, (7, 53)), (50, 9, (30, 9)), (0, 0, (0, 0))],
)
def test_at_most_the_given_fraction_is_positive_and_nothing_is_drawn_twice(
    n_positive: int, n_negative: int, drawn: tuple[int, int]
) -> None:
    labels = torch.cat([torch.ones(n_positive), torch.zeros(n_negative), -torch.ones(20)])
    labels = labels[torch.randperm(len(labels))]
    rows = draw_balanced(labels, 60, 0.5, torch.Generator().manual_seed(0))
    assert len(set(rows.tolist())) == len(rows)
    assert (int((labels[rows] == 1).sum()), int((labels[rows] == 0).sum())) == drawn
    assert not (labels[rows] < 0).any()


def test_losses_of_an_image_do_not_depend_on_its_place_in_the_batch(
    network: Darcnn, small_batch: Batch
) -> None:
    turned = Batch(small_batch.images.flip(0), small_batch.targets[::-1])
    with torch.no_grad():
        one, other = source_losses(network, small_batch), source_losses(network, turned)
    for name, loss in one.items():
        torch.testing.assert_close(other[name], loss, rtol=1e-4, atol=1e-5, msg=name)


def test_sixteen_bits_round_features_but_neither_anchors_nor_boxes(
    network: Darcnn, small_batch: Batch
) -> None:
    proposals: list[list[torch.Tensor]] = []
    original = network.proposer.propose

    def spy(*arguments: object) -> object:
        result = original(*arguments)
        proposals.append(result[0])
        return result

    network.proposer.propose = spy
    with torch.no_grad():
        exact = source_losses(network, small_batch)
        anchors = [cell.clone() for cell in network.proposer.anchor_generator.cell_anchors]
        with torch.autocast("cpu", torch.bfloat16):  # as the loop does on a GPU
            rounded = source_losses(network, small_batch)
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.1), name
    for cell, before in zip(network.proposer.anchor_generator.cell_anchors, anchors, strict=True):
        assert torch.equal(cell, before)
    for boxes in proposals[1]:
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes, boxes.bfloat16().float())
