"""The comparison of bundle and network: it passes where they agree and sees every way to differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from darcnn.export.pack import make_manifest, write_model_bundle
from darcnn.export.parity import (
    COLUMNS,
    Objects,
    Parity,
    compare_bundles,
    compare_objects,
    find_with_engine,
    limits_of,
    verify_bundle,
)
from darcnn.export.printing import parity_table
from darcnn.export.static import ExportOptions
from darcnn.export.tiles import TileSource, read_tiles
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import IntensityRule, apply_window, measure_window


def some_objects():
    rng = np.random.default_rng(0)
    corners = np.array([(x, y) for x in range(0, 120, 12) for y in range(0, 120, 12)], np.float32)
    boxes = np.concatenate([corners, corners + 10], axis=1)  # 100 boxes
    scores = np.linspace(0.95, 0.2, 100, dtype=np.float32)
    masks = rng.random((100, 28, 28), np.float32)
    return Objects(boxes, scores, masks, rng.standard_normal((50, 4), np.float32))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_bundle_finds_what_the_network_finds_on_a_real_slide(
    bundle, network, real_tile, pictures, backend
):
    tiles = read_tiles([TileSource(path) for path in sorted(pictures.iterdir())], bundle, limit=2)
    if backend == "openvino":
        pytest.importorskip("openvino", reason="pip install 'darcnn[openvino]'")
    tiles = {"slide": real_tile, **tiles}  # two calls of two tiles
    parity = verify_bundle(bundle, network, tiles, backend=backend)
    assert len(parity.tiles) == 3
    assert min(tile.n_reference for tile in parity.tiles) >= 20
    assert parity.agrees, parity.complaints


def test_the_bundle_of_another_network_disagrees(bundle, make_network, real_tile):
    network = make_network()
    with torch.no_grad():
        network.target_heads.box_predictor.cls_score.weight.mul_(1.1)
    complaints = verify_bundle(bundle, network, {"slide": real_tile}).complaints
    assert any("score" in complaint for complaint in complaints)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, pytest.param(4, marks=pytest.mark.proof)])
def test_the_bundle_of_separate_channels_agrees_on_the_middle_of_a_stack(
    network, make_picture, tmp_path, channels
):
    stack = np.stack([make_picture(seed, 160)[..., seed % 3] for seed in range(channels * 3)])
    stack = stack.reshape(channels, 3, 160, 160).astype(np.uint16) * 9  # C, Z, Y, X
    stack[-1] //= 50  # a dim channel
    tifffile.imwrite(tmp_path / "stack.ome.tif", stack, metadata={"axes": "CZYX"})
    rule = IntensityRule("percentile", 0.5, 99.5)
    manifest = make_manifest(
        network,
        ExportOptions(channels=channels, tile_px=128, halo_px=32),
        name="separate",
        intensity=rule,
        nominal_diameter_px=16.0,
        mpp=None,
        min_score=0.3,
    )
    write_model_bundle(tmp_path / "m.darcnn", network, manifest, {}, "CC0")
    bundle = open_bundle(tmp_path / "m.darcnn")
    tiles = read_tiles([TileSource(tmp_path / "stack.ome.tif")], bundle, limit=2)
    for number in range(channels):
        plane = stack[number, 1]
        seen = apply_window(plane, measure_window(rule, plane))
        assert {tile.shape for tile in tiles.values()} == {(128, 128, channels)}
        assert np.isin(np.concatenate([t[..., number].ravel() for t in tiles.values()]), seen).all()
    parity = verify_bundle(bundle, network, tiles)
    assert parity.n_objects >= 20
    assert parity.agrees, parity.complaints


def test_equal_objects_agree():
    parity = compare_objects("t", some_objects(), some_objects())
    assert (parity.n_reference, parity.n_bundle, parity.n_matched, parity.n_unmatched) == (100, 100, 100, 0)
    assert Parity((parity,)).agrees


def shift_one_box(objects):
    boxes = objects.boxes.copy()
    boxes[7, 0] += 0.6
    return replace(objects, boxes=boxes)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shift_one_box, "box px"),
        (lambda o: replace(o, boxes=o.boxes + np.float32(0.1)), "median px"),
        (lambda o: replace(o, scores=o.scores + np.float32(0.02)), "score"),
        (lambda o: replace(o, masks=1 - o.masks), "mask"),
        (lambda o: replace(o, masks=np.full_like(o.masks, np.nan)), "mask"),
        (lambda o: replace(o, atlas=o.atlas * np.float32(1.01)), "features"),
        (lambda o: replace(o, boxes=o.boxes[3:], scores=o.scores[3:], masks=o.masks[3:]), "3 of 197"),
        (lambda o: replace(o, boxes=o.boxes + np.float32(5.0)), "200 of 200"),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_every_difference_is_seen_from_either_side(change, complaint, swap):
    pair = (some_objects(), change(some_objects()))
    parity = Parity((compare_objects("t", *(pair[::-1] if swap else pair)),))
    assert not parity.agrees
    assert any(complaint in one for one in parity.complaints)


@pytest.mark.parametrize("swap", [False, True])
def test_an_object_that_is_weak_on_one_side_is_compared_all_the_same(swap):
    scores = np.float32([0.9, *[0.09] * 99])
    weak, strong = (
        replace(some_objects(), scores=scores),
        replace(some_objects(), scores=scores + np.float32(0.05)),
    )
    pair = (strong, weak) if swap else (weak, strong)
    parity = Parity((compare_objects("t", *pair),))
    assert parity.unmatched == 0
    assert any("score differs by 0.05" in one for one in parity.complaints)


def test_one_object_in_a_hundred_may_lie_on_the_other_side_of_a_threshold():
    full = some_objects()
    less = Objects(full.boxes[1:], full.scores[1:], full.masks[1:], full.atlas)
    assert Parity((compare_objects("t", full, less),)).agrees


def test_objects_weaker_than_a_tenth_may_come_and_go():
    weak = replace(some_objects(), scores=np.float32([0.9, *[0.09] * 99]))
    none = Objects(weak.boxes[:1], weak.scores[:1], weak.masks[:1], weak.atlas)
    parity = Parity((compare_objects("t", weak, none),))
    assert parity.n_objects == 2
    assert parity.agrees


def nothing_found(atlas=None):
    return Objects(np.zeros((0, 4), "f4"), np.zeros(0, "f4"), np.zeros((0, 28, 28), "f4"), atlas)


def test_nothing_agrees_where_no_object_was_compared():
    features = nothing_found(np.ones((5, 2), "f4"))
    for tiles in ((), (compare_objects("t", features, features),)):  # masks and suppression may be anything
        parity = Parity(tiles)
        assert not parity.agrees
        assert "no tile has an object to compare" in parity_table(parity)


def test_no_number_on_any_tile_disagrees():
    broken = replace(some_objects(), masks=np.full((100, 28, 28), np.nan, np.float32))
    tiles = [compare_objects("t", some_objects(), one) for one in (some_objects(), broken)]
    for both in (tiles, tiles[::-1]):
        assert Parity(tuple(both)).complaints == ("mask differs by nan, limit 0.02",)


def test_the_table_shows_all_that_is_complained_of():
    worse = shift_one_box(some_objects())
    worse = replace(worse, boxes=worse.boxes[:90], scores=worse.scores[:90] + np.float32(0.05))
    worse = replace(worse, masks=1 - worse.masks[:90], atlas=worse.atlas * np.float32(1.1))
    parity = Parity((compare_objects("t", some_objects(), worse),))
    heading, row, total, verdict = parity_table(parity).splitlines()
    for column in ("unmatched", *COLUMNS.values()):
        assert column in heading
    assert sum(parity.complaints[0].startswith(c) for c in ("unmatched",)) == 1
    assert {c.split(" differs")[0] for c in parity.complaints[1:]} <= set(COLUMNS.values())
    assert len(parity.complaints) == 5
    assert "5.3%" in verdict
    assert row.split()[1:] == total.split()[4:]


def test_a_precision_without_limits_is_refused_in_one_line(bundle, network):
    odd = bundle.with_graphs({}, precision="bf16")
    for call in (
        lambda: verify_bundle(odd, network, {}),
        lambda: limits_of("int8"),
        lambda: Parity((), "bf16").complaints,
    ):
        with pytest.raises(UsageError, match="there are no limits"):
            call()


def test_a_bundle_is_compared_with_the_one_that_it_was_derived_from(bundle, real_tile):
    parity = compare_bundles(bundle, bundle, {"slide": real_tile}, backend="onnxruntime")
    assert parity.n_objects >= 40
    assert (parity.reference, parity.unmatched, parity.worst("box_px")) == ("float32", 0, 0)


class UnfinishedEngine:
    """Reports two boxes of which greedy suppression keeps one."""

    spec = EngineSpec("unfinished", 2, 32, 3, 4, 8, 28)

    def detect(self, tiles):
        boxes = np.zeros((2, 4, 4), np.float32)
        boxes[:, :2] = [[0, 0, 10, 10], [0, 0, 10, 9]]
        scores = np.tile(np.array([0.9, 0.8, 0, 0], np.float32), (2, 1))
        return Detections(boxes, scores, np.array([False, True]), np.zeros((2, 6, 1), np.float32))

    def masks(self, detections, boxes, tile_index):
        return np.zeros((len(boxes), 28, 28), np.float32)

    def close(self):
        pass


def test_suppression_that_has_not_converged_is_finished_on_the_host():
    tiles = {name: np.zeros((32, 32, 3), np.uint8) for name in ("first", "second")}
    found = dict(find_with_engine(UnfinishedEngine(), tiles, 0.5))
    assert found["first"].scores.tolist() == pytest.approx([0.9])
    assert found["second"].scores.tolist() == pytest.approx([0.9, 0.8])


def test_tiles_come_at_the_scale_of_the_model_and_whole(bundle, tmp_path):
    path = tmp_path / "plain.png"
    Image.fromarray(np.full((256, 256, 3), 77, np.uint8)).save(path)
    tiles = read_tiles([TileSource(path, diameter_px=8.0)], bundle, limit=3)  # nominal 16: twice as large
    assert len(tiles) == 3
    assert {tile.shape for tile in tiles.values()} == {(128, 128, 3)}
    assert {int(name.split()[-1]) for name in tiles} <= set(range(64))  # 512 px, cores of 64
    assert max(int(name.split()[-1]) for name in tiles) > 16
    assert all((tile == 77).all() for tile in tiles.values())


def test_no_image_is_an_error(bundle):
    with pytest.raises(UsageError, match="--data"):
        read_tiles([], bundle)
