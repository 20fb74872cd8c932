"""A small untrained network that finds something, its checkpoint, and the bundle made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="the export room needs torch")
pytest.importorskip("onnxscript", reason="the export room needs onnxscript")

from darcnn.export import cli, draft  # noqa: E402
from darcnn.runtime.bundle import MEMBER_CAPS, open_bundle  # noqa: E402
from darcnn.runtime.intensity import IntensityRule  # noqa: E402
from darcnn.training import config  # noqa: E402
from darcnn.training.checkpoint import CheckpointInfo, save_checkpoint  # noqa: E402
from darcnn.training.model.network import Darcnn  # noqa: E402

TILE_PX = 128


def untrained(preset="lite", seed=0):
    """Return an untrained network whose parts all differ and whose scores spread over 0..1."""
    torch.manual_seed(seed)
    network = Darcnn.from_name(preset).eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_mean"):
                tensor.normal_(0.0, 0.1)
            elif name.endswith("running_var"):
                tensor.uniform_(0.8, 1.25)
            elif "target_encoder" in name and tensor.ndim == 4:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.8, 1.2))
        heads = network.target_heads
        # more would saturate: equal scores have no order
        objectness, score = (5.0, 4.0) if preset == "lite" else (1.0, 1.0)
        network.proposer.head.cls_logits.weight.mul_(objectness)
        network.proposer.head.bbox_pred.weight.mul_(3.0)
        heads.box_predictor.cls_score.weight.mul_(score)
        heads.box_predictor.bbox_pred.weight.mul_(5.0)
        heads.mask_predictor.mask_fcn_logits.weight.mul_(0.1)
    return network


def make_recipe(data):
    return config.Recipe(
        name="tiny",
        preset="lite",
        seed=0,
        data=str(data),
        data_licence="CC0, made for a test",
        source=config.Source("none", "none"),
        target=config.Target(
            sets=(config.TargetSet("*.png"),),
            channels=3,
            intensity=IntensityRule("full_range"),
            nominal_diameter_px=16.0,
        ),
        source_stage=config.SourceStage(1),
        adapt_stage=config.AdaptStage(1),
        refine_stage=config.RefineStage(1),
        export=config.Export(min_score=0.3, tile_px=TILE_PX),
    )


def make_picture(seed, size=192):
    """Return (H, W, 3) uint8 of dark discs on a pale ground with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    picture = np.full((size, size, 3), (236, 214, 228), np.float64)
    for _ in range(60):
        (x, y), radius = rng.uniform(0, size, 2), rng.uniform(5, 14)
        picture[(columns - x) ** 2 + (rows - y) ** 2 < radius**2] = rng.uniform(60, 160, 3)
    return np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session", name="make_picture")
def _make_picture():
    return make_picture


@pytest.fixture(scope="session")
def make_network():
    return untrained


@pytest.fixture(scope="session")
def network():
    return untrained()


@pytest.fixture(scope="session")
def real_tile(example_slide):
    """128 px of tissue of the example slide, which no graph was made with."""
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(example_slide) as slide:
        return np.asarray(slide.read_region((900, 1200), 0, (TILE_PX, TILE_PX)).convert("RGB"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("pictures")
    for seed in range(3):
        Image.fromarray(make_picture(seed)).save(folder / f"discs{seed}.png")
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory, pictures):
    def make(network):
        folder = tmp_path_factory.mktemp("checkpoint")
        info = CheckpointInfo("refine", 7, True, make_recipe(pictures), {"AJI": 0.5, "loss": float("nan")})
        save_checkpoint(folder, network, info)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint, network):
    return make_checkpoint(network)


@pytest.fixture(scope="session")
def bundle_path(checkpoint, tmp_path_factory):
    """What `darcnn-export bundle` wrote: two tiles a call."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.darcnn"
    with pytest.raises(SystemExit) as done:
        cli.main(["bundle", str(checkpoint), "--out", str(path), "--batch", "2"])
    assert done.value.code == 0
    return path


@pytest.fixture(scope="session")
def bundle(bundle_path):
    return open_bundle(bundle_path)


@pytest.fixture(scope="session")
def members(bundle):
    """Name and content of all that the bundle holds beside its manifest."""
    return {name: bundle.read(name) for name in MEMBER_CAPS if name != "manifest.json"}


@pytest.fixture
def makes_no_graphs(members, monkeypatch):
    """Whatever is exported, its graphs are those of the bundle, batches of two: making them takes long."""
    monkeypatch.setattr(draft, "make_members", lambda *arguments: members)


@pytest.fixture
def run(capsys):
    """A function that runs `darcnn-export` and returns exit code, standard output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as done:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    return call
