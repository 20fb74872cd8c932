"""Bundles of other sizes, made of bundles: the same network, and the same objects."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import darcnn.runtime as darcnn
from darcnn.export.draft import Sizes, draft_of_bundle, draft_of_checkpoint, write_verified
from darcnn.export.pack import make_members, options_of
from darcnn.export.static import ExportOptions
from darcnn.export.tiles import images_in
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.errors import UsageError
from darcnn.runtime.load import find_bundle
from darcnn.training.checkpoint import read_info, save_checkpoint


def test_a_bundle_made_of_itself_has_the_same_graphs(bundle, pictures):
    draft = draft_of_bundle(bundle, Sizes(), name=None, data=pictures, licence=None)
    assert replace(draft.manifest, files=bundle.manifest.files) == bundle.manifest
    members = make_members(draft.network, options_of(draft.manifest), draft.training, draft.licence)
    assert members == {name: bundle.read(name) for name in members}


def test_a_bundle_of_other_sizes_finds_the_same(run, bundle_path, pictures, tmp_path):
    out = tmp_path / "larger.darcnn"
    sizes = ("--batch", "3", "--detections", "300", "--mask-batch", "32", "--min-score", "0.25")
    sizes += ("--name", "larger")
    code, _, err = run("bundle", bundle_path, "--out", out, "--data", pictures, *sizes)
    assert (code, "they agree" in err) == (0, True)
    made, before = open_bundle(out), open_bundle(bundle_path)
    assert (made.manifest.name, made.manifest.input.batch) == ("larger", 3)
    assert (made.manifest.limits.detections, made.manifest.limits.mask_batch) == (300, 32)
    assert made.manifest.limits.min_score == 0.25
    for kept in ("intensity", "nominal_diameter_px", "mpp", "finds_diameter", "halo_px", "tile_px"):
        assert getattr(made.manifest.input, kept) == getattr(before.manifest.input, kept)
    for member in ("LICENSE", "training.json"):
        assert made.read(member) == before.read(member)
    pixels = np.asarray(Image.open(pictures / "discs0.png"))
    with darcnn.load(bundle_path, min_score=0.25) as one, darcnn.load(out) as other:
        ours, theirs = one(pixels, diameter_px=16.0), other(pixels, diameter_px=16.0)
    assert len(ours) == len(theirs) > 10
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.05)


@pytest.mark.parametrize("score", [-0.1, 0.01, 1.5, float("nan")])
def test_a_score_that_no_object_has_is_refused(bundle, pictures, score):
    draft = draft_of_bundle(bundle, Sizes(), name=None, data=pictures, licence=None)
    with pytest.raises(UsageError, match="--min-score"):
        draft.reporting(score)


def test_a_larger_tile_keeps_what_the_model_knows(bundle, pictures):
    draft = draft_of_bundle(bundle, Sizes(tile_px=192), name=None, data=pictures, licence=None)
    assert draft.manifest.graphs["detect"]["tile"][1] == (2, 192, 192, 3)
    assert draft.manifest.input == replace(bundle.manifest.input, tile_px=192)
    grown = {"proposals_per_level": 900, "proposals": 900, "detections": 576}  # as the area does
    assert draft.manifest.limits == replace(bundle.manifest.limits, **grown)
    with pytest.raises(UsageError, match="--tile"):
        draft_of_bundle(bundle, Sizes(tile_px=100), name=None, data=pictures, licence=None)


@pytest.mark.slow
def test_a_shipped_model_in_batches_finds_the_same_objects(root, tmp_path):
    tissue = root / "tests" / "data" / "tissue"
    draft = draft_of_bundle(find_bundle("nuclei-he"), Sizes(batch=4), name=None, data=tissue, licence=None)
    out = tmp_path / "four.darcnn"
    assert write_verified(out, draft).agrees
    pixels = np.asarray(Image.open(sorted(tissue.glob("*.png"))[0]).convert("RGB"))
    with darcnn.load("nuclei-he") as one, darcnn.load(out) as four:
        ours, theirs = one(pixels, diameter_px=12.0), four(pixels, diameter_px=12.0)
    assert len(ours) == len(theirs) > 10
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.05)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-3)


def test_a_model_in_int8_becomes_one_in_float32(root):
    draft = draft_of_bundle(
        find_bundle("particles-cryoet"), Sizes(), name=None, data=root / "tests" / "data", licence=None
    )
    assert draft.manifest.precision == "fp32"
    assert draft.training["weights_were"] == "int8"
    assert not {"calibration_tiles", "has_offsets"} & set(draft.training)
    assert draft.manifest.input.slab == find_bundle("particles-cryoet").manifest.input.slab
    json.dumps(draft.training)


def test_images_to_verify_on_must_be_given(bundle):
    with pytest.raises(UsageError, match="--data: no images to verify on"):
        draft_of_bundle(bundle, Sizes(batch=2), name=None, data=None, licence=None)


def test_of_a_source_stage_both_branches_are_what_it_taught(make_network, make_checkpoint, tmp_path):
    network = make_network(seed=3)
    folder = make_checkpoint(network)
    info = read_info(folder)
    save_checkpoint(tmp_path / "source", network, replace(info, stage="source", step=5))
    draft = draft_of_checkpoint(
        tmp_path / "source", Sizes(), name=None, data=None, licence=None, tell=lambda words: None
    )
    taught = network.source_heads.state_dict()
    for name, tensor in draft.network.target_heads.state_dict().items():
        assert torch.equal(tensor, taught[name]), name


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        (Sizes(tile_px=1024), (1600, 1600, 1024)),
        (Sizes(tile_px=1024, detections=300), (1600, 1600, 300)),
        (Sizes(tile_px=256), (400, 400, 256)),
        (Sizes(tile_px=2048), (3840, 3840, 3840)),
        (Sizes(tile_px=1024, proposals=500), (500, 500, 500)),
        (Sizes(tile_px=512, proposals=0, detections=0), (0, 0, 0)),  # refused later, not taken for none given
    ],
)
def test_counts_grow_with_the_tile_unless_they_are_given(sizes, counts):
    given = sizes.given(ExportOptions(channels=3), sizes.tile_px)
    assert (given["proposals_per_level"], given["proposals"], given["detections"]) == counts


def test_results_of_runs_are_no_images_to_verify_on(tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    for path in ("b.png", "out/a/overview.png", "out/a/run.json", "out/c.png"):
        (tmp_path / path).write_bytes(b"x")
    assert [one.path.name for one in images_in(tmp_path)] == ["b.png", "c.png"]
