"""The network: one trunk for all encoders, pyramids that address each other, the size of what ships."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darcnn.runtime.errors import UsageError
from darcnn.training.config import Recipe
from darcnn.training.data.batches import Batch
from darcnn.training.model.heads import BOX_POOL, RoiPool
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import PRESETS
from darcnn.training.steps import adapt_losses, refine_losses


def test_trunk_is_computed_once_for_all_encoders_and_both_domains(
    network: Darcnn, small_batch: Batch, small_tiles: Tensor, recipe: Recipe
) -> None:
    seen: list[int] = []
    network.trunk.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with torch.no_grad():
        adapt_losses(network, small_batch, small_tiles, recipe.adapt_stage, 1.0)
        assert seen == [len(small_batch.images) + len(small_tiles)]
        seen.clear()
        refine_losses(network, small_batch)
        assert seen == [len(small_batch.images)]


def test_no_encoder_has_a_copy_of_the_trunk(network: Darcnn) -> None:
    in_trunk = {p.data_ptr() for p in network.trunk.parameters()}
    for encoder in (network.shared_encoder, network.source_encoder, network.target_encoder):
        assert in_trunk.isdisjoint(p.data_ptr() for p in encoder.parameters())


def test_encoders_and_heads_share_no_parameter(network: Darcnn) -> None:
    pointers = [p.data_ptr() for p in network.parameters()]
    assert len(pointers) == len(set(pointers))


def test_target_branch_of_lite_has_at_most_8_4_million_parameters(network: Darcnn) -> None:
    n_parameters = sum(p.numel() for part in network.target_branch() for p in part.parameters())
    assert 1_000_000 < n_parameters <= 8_400_000


def test_target_branch_is_the_final_model(network: Darcnn) -> None:
    branch = {id(part) for part in network.target_branch()}
    names = {name for name, part in network.named_children() if id(part) in branch}
    assert names == {"trunk", "shared_encoder", "target_encoder", "proposer", "target_heads"}


def test_start_of_adaptation_makes_all_encoders_and_both_heads_equal(network: Darcnn) -> None:
    with torch.no_grad():
        for part in (network.shared_encoder, network.source_heads):
            for parameter in part.parameters():
                parameter.add_(0.01)
    network.start_adaptation()
    c2 = network.trunk(torch.rand(1, 3, 64, 64) * 255)
    expected = network.shared_encoder(c2)
    for encoder in (network.source_encoder, network.target_encoder):
        for level, other in zip(encoder(c2), expected, strict=True):
            torch.testing.assert_close(level, other, rtol=0, atol=0)
    for name, tensor in network.source_heads.state_dict().items():
        assert torch.equal(tensor, network.target_heads.state_dict()[name])


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 192)])
def test_pyramids_of_all_encoders_have_the_same_shapes(network: Darcnn, height: int, width: int) -> None:
    c2 = network.trunk(torch.zeros(2, 3, height, width))
    expected = [(2, 64, height // stride, width // stride) for stride in (4, 8, 16, 32)]
    for encoder in (network.shared_encoder, network.source_encoder, network.target_encoder):
        assert [tuple(level.shape) for level in encoder(c2)] == expected


def test_network_sees_an_image_the_same_in_any_batch(network: Darcnn) -> None:
    network.eval()
    images = torch.rand(3, 3, 64, 64) * 255
    together = network.shared_encoder(network.trunk(images))
    alone = network.shared_encoder(network.trunk(images[1:2]))
    for level, other in zip(together, alone, strict=True):
        torch.testing.assert_close(level[1:2], other, atol=1e-4, rtol=1e-4)


def test_training_mode_changes_nothing_in_the_encoders(network: Darcnn) -> None:
    images = torch.rand(2, 3, 64, 64) * 255
    network.train()
    training = network.target_encoder(network.trunk(images))
    network.eval()
    for level, other in zip(network.target_encoder(network.trunk(images)), training, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=0)


def test_resnet50_builds_and_gives_a_pyramid_of_the_paper() -> None:
    network = Darcnn.from_name("resnet50").eval()
    with torch.no_grad():
        pyramid = network.target_encoder(network.trunk(torch.zeros(1, 3, 64, 64)))
        levels = network.rpn_levels(pyramid)
        boxes, scores, losses = network.proposer.propose(levels, (64, 64))
        probabilities = network.target_heads.mask_probabilities(pyramid, [boxes[0][:3]])
    assert [tuple(level.shape) for level in levels] == [(1, 256, n, n) for n in (16, 8, 4, 2, 1)]
    assert boxes[0].shape == (len(scores[0]), 4)
    assert probabilities.shape == (3, network.preset.mask_px, network.preset.mask_px)
    assert losses == {}


def test_unknown_preset_is_refused_with_the_names_of_the_known_ones() -> None:
    with pytest.raises(UsageError, match="lite, resnet50"):
        Darcnn.from_name("huge")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_each_level_has_one_anchor_size(preset: object) -> None:
    assert len(preset.anchor_sizes_px) == len(preset.strides_px)  # type: ignore[attr-defined]


def test_boxes_are_pooled_from_the_level_of_their_size() -> None:
    pool = RoiPool(BOX_POOL, canonical_size_px=128.0)
    sides = torch.tensor([4.0, 63.0, 64.0, 127.0, 128.0, 255.0, 256.0, 4000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert pool.level_of(boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_pooling_a_linear_ramp_gives_the_place_of_each_cell() -> None:
    size = 64
    columns = torch.arange(size) + 0.5  # centre of each position, in units of the stride
    pyramid = [
        columns[: size // 2**level].expand(1, 1, size // 2**level, -1) * 4 * 2**level for level in range(4)
    ]  # each level holds the x of its positions in image pixels
    box = torch.tensor([[40.0, 60.0, 75.0, 102.0]])
    pooled = RoiPool(BOX_POOL, canonical_size_px=128.0)(pyramid, [box])
    expected = 40.0 + (torch.arange(BOX_POOL) + 0.5) / BOX_POOL * 35.0
    torch.testing.assert_close(pooled[0, 0, 3], expected, atol=1e-3, rtol=0)


def test_no_boxes_pool_to_no_features(network: Darcnn) -> None:
    pyramid = network.shared_encoder(network.trunk(torch.zeros(2, 3, 64, 64)))
    none = [torch.zeros(0, 4), torch.zeros(0, 4)]
    assert network.target_heads.mask_probabilities(pyramid, none).shape == (0, 28, 28)
