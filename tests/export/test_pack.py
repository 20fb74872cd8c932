"""What a bundle says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from darcnn.export.pack import make_manifest, make_training, options_of, write_model_bundle
from darcnn.export.static import ExportOptions
from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import manifest_from_json, manifest_to_json
from darcnn.runtime.tiling import halo_for
from darcnn.training.checkpoint import load_network


def manifest_of(network, **changes):
    return make_manifest(
        network,
        ExportOptions(**{"channels": 1, "tile_px": 256, "halo_px": 64, **changes}),
        name="m",
        intensity=IntensityRule("percentile", 1, 99),
        nominal_diameter_px=24.0,
        mpp=0.5,
        min_score=0.4,
    )


@pytest.mark.parametrize(
    ("diameter", "halo"), [(1.0, 16), (21.3, 32), (21.4, 48), (28.0, 48), (42.0, 64), (42.7, 80)]
)
def test_the_halo_holds_one_and_a_half_objects(diameter, halo):
    assert halo_for(diameter, 32) == halo


def test_the_manifest_survives_json_and_gives_the_options_back(network):
    manifest = manifest_of(network, batch=3, detections=100)
    assert manifest_from_json(json.loads(json.dumps(manifest_to_json(manifest)))) == manifest
    options = options_of(manifest)
    assert (options.batch, options.detections, options.channels, options.halo_px) == (3, 100, 1, 64)
    assert manifest.limits.score_threshold == network.target_heads.score_thresh
    assert manifest.anchors.sizes_px == network.preset.anchor_sizes_px


def test_a_tile_without_a_core_is_refused(network):
    with pytest.raises(UsageError, match="no core"):
        manifest_of(network, tile_px=128)


def test_the_bundle_tells_where_the_model_comes_from_but_not_where_the_data_lay(bundle, checkpoint, pictures):
    content = bundle.read("training.json").decode()
    assert str(pictures.parent) not in content
    training = json.loads(content)
    assert training["recipe"]["data"] == pictures.name
    assert (training["stage"], training["step"]) == ("refine", 7)
    assert training["data_licence"] == "CC0, made for a test"
    assert training["figures"] == {"AJI": 0.5, "loss": None}  # JSON has no NaN
    assert "CC0, made for a test" in bundle.read("LICENSE").decode()
    _, info = load_network(checkpoint)
    assert replace(info, figures={}).step == make_training(info)["step"]


def test_the_same_network_and_options_give_the_same_bundle(bundle, checkpoint, tmp_path):
    network, info = load_network(checkpoint)
    path = tmp_path / "again.darcnn"
    licence = bundle.read("LICENSE").decode()
    write_model_bundle(path, network, replace(bundle.manifest, files={}), make_training(info), licence)
    assert path.read_bytes() == bundle.path.read_bytes()
