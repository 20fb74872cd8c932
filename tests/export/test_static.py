"""The graphs as modules: pooling, suppression, decoding and the whole, each against its reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from darcnn.export.graph import freeze_network
from darcnn.export.parity import Objects, compare_objects, find_with_torch
from darcnn.export.static import (
    NMS_ROUNDS,
    AtlasPool,
    DetectGraph,
    ExportOptions,
    MaskGraph,
    decode_boxes,
    greedy_keep,
    pack_atlas,
)
from darcnn.runtime.boxes import decode_deltas, non_maximum_suppression
from darcnn.runtime.errors import UsageError
from darcnn.training.model.heads import RoiPool
from darcnn.training.model.network import Darcnn
from darcnn.training.model.presets import PRESETS

TILE_PX = 128
OPTIONS = ExportOptions(channels=3, tile_px=TILE_PX)


def random_pyramid(batch=1, channels=5, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(batch, channels, TILE_PX // s, TILE_PX // s) for s in (4, 8, 16, 32)]


def random_boxes(n, seed=0):
    """Return boxes of all sizes and shapes, many of them beyond the edges of the tile."""
    torch.manual_seed(seed)
    corner = torch.rand(n, 2) * 1.6 * TILE_PX - 0.4 * TILE_PX
    return torch.cat([corner, corner + 4 * TILE_PX * torch.rand(n, 2) ** 4], dim=1)


@pytest.fixture(scope="module")
def pool(network):
    return AtlasPool(network, TILE_PX)


@pytest.mark.parametrize("cells", [7, 14])
def test_pooling_from_the_atlas_equals_roi_align_on_every_level(pool, cells):
    pyramid, boxes = random_pyramid(), random_boxes(400)
    reference = RoiPool(cells, pool.canonical_size_px)
    assert set(pool.level_of(boxes).tolist()) == {0, 1, 2, 3}
    pooled = pool(pack_atlas(pyramid), boxes, torch.zeros(400, dtype=torch.int64), cells)
    torch.testing.assert_close(pooled, reference(pyramid, [boxes]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, TILE_PX, TILE_PX),
        (5, 5, 5, 5),
        (-40, -40, -2, -2),
        (-4, -4, 4, 4),
        (124, 124, 132, 132),
        (140, 10, 200, 60),
        (0, 60, TILE_PX, 61),
        (2, 2, 66, 66),
    ],
)
def test_pooling_follows_roi_align_at_the_borders(pool, box):
    pyramid, boxes = random_pyramid(), torch.tensor([box], dtype=torch.float32)
    reference = RoiPool(7, pool.canonical_size_px)(pyramid, [boxes])
    pooled = pool(pack_atlas(pyramid), boxes, torch.zeros(1, dtype=torch.int64), 7)
    torch.testing.assert_close(pooled, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [1, 16, 63.99, 64, 64.01, 127.99, 128, 128.01, 255.99, 256, 256.01, 4000])
def test_the_level_of_a_box_is_that_of_training(pool, side):
    box = torch.tensor([[3.0, 5.0, 3.0 + side, 5.0 + side]])
    assert pool.level_of(box).tolist() == RoiPool(7, pool.canonical_size_px).level_of(box).tolist()


def test_pooling_takes_each_box_from_its_own_tile(pool):
    pyramid, boxes = random_pyramid(batch=3), random_boxes(60)
    index = torch.arange(60) % 3
    pooled = pool(pack_atlas(pyramid), boxes, index, 7)
    for tile in range(3):
        alone = [level[tile : tile + 1] for level in pyramid]
        expected = RoiPool(7, pool.canonical_size_px)(alone, [boxes[index == tile]])
        torch.testing.assert_close(pooled[index == tile], expected, atol=1e-4, rtol=0)


# Whole numbers in a small range: equal boxes, IoU exactly at a threshold and deep chains are all frequent.
corner = st.integers(0, 12)
box = st.tuples(corner, corner, st.integers(1, 8), st.integers(1, 8))


# Not 0.3: torchvision compares in double precision, where an IoU of float32(0.3) is above 0.3.
@given(st.lists(box, min_size=1, max_size=40), st.sampled_from([0.25, 0.5, 0.7]), st.sampled_from([2, 4, 16]))
@settings(max_examples=120, deadline=None)
def test_suppression_equals_torchvision_once_converged_and_keeps_no_less_before(found, threshold, rounds):
    boxes = torch.tensor([(x, y, x + w, y + h) for x, y, w, h in found], dtype=torch.float32)
    scores = torch.linspace(1.0, 0.1, len(boxes))
    expected = set(nms(boxes, scores, threshold).tolist())
    keep, converged = greedy_keep(boxes[None], torch.ones(1, len(boxes)), threshold=threshold, rounds=rounds)
    kept = set(torch.nonzero(keep[0])[:, 0].tolist())
    assert kept >= expected
    if converged:
        assert kept == expected


@pytest.mark.parametrize("seed", range(3))
def test_suppression_of_crowded_random_boxes_converges_to_greedy(seed):
    torch.manual_seed(seed)
    corners = torch.rand(2, 400, 2) * 100
    boxes = torch.cat([corners, corners + 8 + 20 * torch.rand(2, 400, 2)], dim=2)
    keep, converged = greedy_keep(boxes, torch.ones(2, 400), threshold=0.5)
    assert converged.all()
    for tile in range(2):
        expected = nms(boxes[tile], torch.linspace(1, 0, 400), 0.5)
        assert torch.nonzero(keep[tile])[:, 0].tolist() == sorted(expected.tolist())


def test_a_long_chain_is_reported_as_unconverged_and_the_host_can_finish_it():
    start = torch.arange(40.0)[:, None]
    boxes = torch.cat([start, torch.zeros(40, 1), start + 2.5, torch.ones(40, 1)], dim=1)  # IoU 1.5 / 3.5
    keep, converged = greedy_keep(boxes[None], torch.ones(1, 40), threshold=0.4)
    assert not converged.any()
    assert NMS_ROUNDS % 2 == 0  # else what is left is too little, and nobody could finish it
    scores = np.linspace(1, 0.1, 40, dtype=np.float32)
    greedy = non_maximum_suppression(boxes.numpy(), scores, 0.4)
    rows = torch.nonzero(keep[0])[:, 0].numpy()
    assert set(rows) > set(greedy)
    finished = rows[non_maximum_suppression(boxes.numpy()[rows], scores[rows], 0.4)]
    assert finished.tolist() == greedy.tolist()
    assert greedy_keep(boxes[None], torch.ones(1, 40), threshold=0.4, rounds=42)[1].all()


def test_a_box_that_is_not_valid_neither_stays_nor_suppresses():
    boxes = torch.tensor([[[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.float32)
    keep, _ = greedy_keep(boxes, torch.tensor([[0.0, 1.0, 1.0, 1.0]]), threshold=0.5)
    assert keep.tolist() == [[0, 1, 1, 1]]  # empty boxes overlap nothing


@pytest.mark.parametrize("part", ["proposer", "target_heads"])
def test_decoding_equals_torchvision_and_the_numpy_reference(network, part):
    coder = getattr(network, part).box_coder
    anchors = random_boxes(50) + torch.tensor([0.0, 0, 1, 1])
    deltas = torch.randn(50, 4) * 8  # some beyond the cap of the log scale
    decoded = decode_boxes(coder, deltas, anchors)
    assert torch.equal(decoded, coder.decode(deltas, [anchors])[:, 0])
    twin = decode_deltas(deltas.numpy(), anchors.numpy(), coder.weights)
    np.testing.assert_allclose(decoded.numpy(), twin, rtol=1e-5, atol=1e-3)


def run_eagerly(network, options, tile):
    """Return what the two modules find on one tile, as `find_with_torch` returns it."""
    detect, mask = DetectGraph(network, options).eval(), MaskGraph(network, options).eval()
    with torch.no_grad():
        boxes, scores, atlas, converged = detect(torch.from_numpy(tile.copy())[None])
        assert converged.all()
        n = int((scores > 0).sum())
        masks = mask(atlas, boxes[0, :n], torch.zeros(n, dtype=torch.int64))
    assert not boxes[0, n:].any()
    assert (scores[0].diff() <= 0).all()
    return Objects(boxes[0, :n].numpy(), scores[0, :n].numpy(), masks.numpy(), atlas[0].numpy())


@pytest.mark.parametrize("preset", ["lite", "resnet50"])
def test_the_modules_find_what_the_network_finds(make_network, real_tile, preset):
    network = make_network(preset)
    ours, theirs = find_with_torch(network, real_tile), run_eagerly(network, OPTIONS, real_tile)
    parity = compare_objects("slide", ours, theirs)
    assert parity.n_reference >= 20
    assert parity.n_unmatched == 0
    assert parity.box_px < 0.05
    assert parity.score < 1e-3
    assert parity.mask < 1e-3


@pytest.mark.parametrize(("cells", "layers"), [(7, (32, 32)), (14, (64,)), (16, (24, 24, 24))])
def test_the_size_of_the_mask_head_is_an_option_of_the_preset(real_tile, cells, layers):
    torch.manual_seed(0)
    network = Darcnn(replace(PRESETS["lite"], mask_cells=cells, mask_head_layers=layers)).eval()
    boxes = random_boxes(9) + torch.tensor([0.0, 0, 1, 1])
    with torch.no_grad():
        pyramid = network.target_encoder(
            network.trunk(torch.tensor(real_tile).float().permute(2, 0, 1)[None])
        )
        expected = network.target_heads.mask_probabilities(pyramid, [boxes])
        masks = MaskGraph(network, OPTIONS)(pack_atlas(pyramid), boxes, torch.zeros(9, dtype=torch.int64))
    assert masks.shape == (9, 2 * cells, 2 * cells)
    torch.testing.assert_close(masks, expected, atol=1e-4, rtol=0)


def test_limits_cut_the_weakest_objects(network, real_tile):
    few = ExportOptions(channels=3, tile_px=TILE_PX, proposals=400, detections=9)
    many = run_eagerly(network, OPTIONS, real_tile)
    np.testing.assert_array_equal(run_eagerly(network, few, real_tile).scores, many.scores[:9])


def test_a_one_channel_graph_sees_grey_as_three_equal_channels(network, real_tile):
    grey = real_tile[:, :, 1:2]
    alone = run_eagerly(network, ExportOptions(channels=1, tile_px=TILE_PX), grey)
    thrice = run_eagerly(network, OPTIONS, grey.repeat(3, 2))
    np.testing.assert_allclose(alone.boxes, thrice.boxes, atol=1e-2)
    np.testing.assert_allclose(alone.scores, thrice.scores, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "weights"),
    [
        (2, [[1, 0], [0, 1], [0.5, 0.5]]),
        (4, [[0.75, 0, 0, 0.25], [0, 0.75, 0, 0.25], [0, 0, 0.75, 0.25]]),
    ],
)
def test_a_graph_of_separate_channels_sees_their_three_mixtures(network, real_tile, channels, weights):
    tile = np.concatenate([real_tile, real_tile[::-1, :, :1]], axis=2)[..., :channels]
    tile = tile // 4 * 4  # so that the mixtures are whole numbers
    mixed = (tile @ np.array(weights).T).astype(np.uint8)
    ours = run_eagerly(network, ExportOptions(channels=channels, tile_px=TILE_PX), tile)
    theirs = run_eagerly(network, OPTIONS, mixed)
    assert len(ours.scores) >= 20
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-2)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


def test_anchors_are_the_numbers_of_training(network):
    frozen = freeze_network(network)
    graph = DetectGraph(frozen, OPTIONS)
    pyramid = [torch.zeros(1, 64, TILE_PX // s, TILE_PX // s) for s in (4, 8, 16, 32)]
    seen = {}
    generator = frozen.proposer.anchor_generator
    generator.register_forward_hook(lambda module, inputs, output: seen.update(anchors=output[0]))
    with torch.no_grad():
        frozen.proposer.propose(pyramid, (TILE_PX, TILE_PX))
    stored = torch.cat([graph.get_buffer(f"anchors_{number}") for number in range(4)])
    assert torch.equal(stored, seen["anchors"])


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"tile_px": 100}, "multiple of 32"),
        ({"tile_px": 0}, "multiple of 32"),
        ({"batch": 0}, "1 or more"),
        ({"channels": 0}, "1, 2, 3 or 4"),
        ({"channels": 5}, "1, 2, 3 or 4"),
        ({"detections": 500}, "chosen from"),
        ({"proposals": 2000}, "chosen from"),
        ({"tile_px": 1_000_000}, "up to 8192"),
        ({"proposals_per_level": 3841}, "up to 3840"),
        ({"mask_batch": 0}, "--mask-batch"),
    ],
)
def test_sizes_that_cannot_be_are_refused(network, change, fix):
    with pytest.raises(UsageError, match=fix):
        DetectGraph(network, ExportOptions(**{"channels": 3, "tile_px": TILE_PX, **change}))


def test_the_unused_source_parts_do_not_change_the_result(network, real_tile):
    other = freeze_network(network)
    for part in (other.source_encoder, other.source_heads, other.projection):
        for parameter in part.parameters():
            parameter.fill_(float("nan"))
    assert isinstance(other, Darcnn)
    frozen = freeze_network(network)
    np.testing.assert_array_equal(
        run_eagerly(other, OPTIONS, real_tile).scores, run_eagerly(frozen, OPTIONS, real_tile).scores
    )
