"""TensorRT-RTX compiles the graphs of both presets in both precisions, for GPUs that are not here."""

from __future__ import annotations

import pytest

from darcnn.export.half import derive_half
from darcnn.export.pack import make_manifest, write_model_bundle
from darcnn.export.static import ExportOptions
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.engine_cache import read_engine
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_engine, load_backend
from darcnn.runtime.intensity import IntensityRule

SMALLEST_PLAN = {"lite": 700_000, "resnet50": 5_000_000}  # bytes; the mask graph in half precision


@pytest.fixture(scope="module")
def make_bundle(make_network, tmp_path_factory):
    pytest.importorskip("tensorrt_rtx", reason="pip install 'darcnn[tensorrt-rtx]'")
    made = {}

    def make(preset, tile_px):
        """Return a bundle of an untrained network, written and read as a user's is."""
        if (preset, tile_px) not in made:
            path = tmp_path_factory.mktemp("bundle") / f"{preset}.darcnn"
            manifest = make_manifest(
                make_network(preset),
                ExportOptions(channels=3, tile_px=tile_px, halo_px=32),
                name=preset,
                intensity=IntensityRule("full_range"),
                nominal_diameter_px=16.0,
                mpp=None,
                min_score=0.3,
            )
            write_model_bundle(path, make_network(preset), manifest, {}, "CC0")
            made[preset, tile_px] = open_bundle(path)
        return made[preset, tile_px]

    return make


def build_and_tell(bundle, targets, folder, tell):
    """Build an engine, read it back as a run does, and list it in the log."""
    build_engine(bundle, BuildOptions("tensorrt-rtx", targets), out=folder)
    version = load_backend("tensorrt-rtx").__version__
    engine = read_engine(folder, bundle, version=version, capability=targets[0])
    sizes = ", ".join(f"{graph} {len(plan) / 1e6:.1f} MB" for graph, plan in engine.plans.items())
    preset, tile_px = bundle.manifest.preset, bundle.manifest.input.tile_px
    name = f"{preset} {engine.facts.precision} {tile_px} px"
    tell("built", f"tensorrt-rtx {version}: {name} for {' '.join(targets)}: {sizes}")
    return engine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "precision"),
    [
        ("lite", "fp32"),
        ("lite", "fp16"),
        ("resnet50", "fp16"),
        pytest.param("resnet50", "fp32", marks=pytest.mark.proof),
    ],
)
def test_both_presets_compile_in_both_precisions(make_bundle, preset, precision, tmp_path, record_property):
    bundle = make_bundle(preset, 128)
    bundle = derive_half(bundle) if precision == "fp16" else bundle
    engine = build_and_tell(bundle, ("sm86", "sm89"), tmp_path / "engine", record_property)
    assert engine.facts.precision == precision
    assert min(len(plan) for plan in engine.plans.values()) > SMALLEST_PLAN[preset]


@pytest.mark.proof
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("preset", ["lite", "resnet50"])
def test_whole_tiles_compile_for_every_gpu_that_it_knows(
    make_bundle, preset, precision, tmp_path, record_property
):
    bundle = make_bundle(preset, 512)
    bundle = derive_half(bundle) if precision == "fp16" else bundle
    known = dir(load_backend("tensorrt-rtx").ComputeCapability)
    targets = tuple(name.lower() for name in known if name.startswith("SM"))
    assert {"sm75", "sm80", "sm86", "sm89", "sm120"} <= set(targets)
    if precision == "fp32":  # it compiles no float32 product for Turing
        targets = tuple(target for target in targets if target != "sm75")
    engine = build_and_tell(bundle, targets, tmp_path / "engine", record_property)
    assert engine.facts.targets == targets
