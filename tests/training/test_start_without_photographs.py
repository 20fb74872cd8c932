"""A run with nothing but unlabelled images: the package's own start, decisions shown, stages left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from darcnn.runtime.errors import InputError, UsageError
from darcnn.training.checkpoint import load_network, read_info
from darcnn.training.config import AdaptStage, Recipe, SourceStage, recipe_from_table, recipe_to_table
from darcnn.training.decisions import Decisions
from darcnn.training.model import photographs
from darcnn.training.model.network import Darcnn
from darcnn.training.model.pretrained import load_weights, start_of
from darcnn.training.run import Run
from darcnn.training.stages import run_all, run_source


@pytest.fixture
def bare(recipe: Recipe) -> Recipe:
    """One round of two steps on tiles of 64 px, and no labelled image."""
    return replace(
        recipe,
        tile_px=64,
        weights="coco",
        source=None,
        source_stage=SourceStage(),
        adapt_stage=AdaptStage(),
        refine_stage=replace(recipe.refine_stage, steps=2, max_objects=8, min_score=0.3),
        target=replace(recipe.target, finds_diameter=True),
    )


def test_what_comes_with_the_package_is_what_was_saved(
    network: Darcnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.safetensors"
    photographs.save_photographs(network, path)
    assert path.stat().st_size < 10e6
    monkeypatch.setattr(photographs, "read_photographs", path.read_bytes)
    fresh = Darcnn.from_name("lite")
    photographs.load_photographs(fresh)
    for part in ("trunk", "shared_encoder", "proposer", "source_heads"):
        theirs = getattr(fresh, part).state_dict()
        for name, tensor in getattr(network, part).state_dict().items():
            assert torch.equal(theirs[name], tensor.half().float()), name
    for name, tensor in fresh.shared_encoder.state_dict().items():  # both domains start from it
        assert torch.equal(fresh.target_encoder.state_dict()[name], tensor)
    with pytest.raises(InputError, match="other layers than preset lite"):
        photographs.load_photographs(Darcnn.from_name("resnet50"))


def test_the_package_s_start_finds_nuclei_that_nobody_showed_it(data: Path) -> None:
    from darcnn.runtime.intensity import IntensityRule
    from darcnn.training.config import Target, TargetSet
    from darcnn.training.engine import make_segmenter
    from darcnn.training.evaluate import evaluate_folder

    network = Darcnn.from_name("lite", "coco")
    load_weights(network, "coco", data)
    target = Target((TargetSet("x"),), 1, IntensityRule("percentile", 0.5, 99.8), 42.0)
    with make_segmenter(network, target, min_score=0.5, tile_px=256) as segmenter:
        scores = evaluate_folder(data / "evaluate", lambda reader: segmenter(reader, diameter_px=25.0)).mean
    assert scores.aji > 0.4
    assert scores.object_f1 > 0.45  # most nuclei of these small images touch an edge


@pytest.mark.slow
def test_without_photographs_the_images_alone_lead_to_a_model(
    bare: Recipe, data: Path, tmp_path: Path
) -> None:
    shown: list[Decisions] = []

    def is_right(decisions: Decisions) -> bool:
        shown.append(decisions)
        return True

    run = Run(bare, data, tmp_path)
    run_all(run, is_right)
    assert [
        (read_info(tmp_path / n).step, read_info(tmp_path / n).complete) for n in ("source", "adapt")
    ] == [
        (0, True),
        (0, True),
    ]
    start, _ = load_network(tmp_path / "adapt")
    for name, tensor in start.source_heads.state_dict().items():
        assert torch.equal(tensor, start.target_heads.state_dict()[name])
    assert read_info(tmp_path / "refine").step == 2
    (decisions,) = shown
    assert decisions.is_estimated
    assert decisions.bright_share > 0.9  # nuclei in fluorescence
    assert json.loads((tmp_path / "decisions.json").read_text())["n_objects"] == decisions.n_objects > 0
    with Image.open(tmp_path / "decisions.png") as picture:
        assert picture.format == "PNG"
    weights = [tmp_path / name / "checkpoint.safetensors" for name in ("source", "adapt", "refine")]
    before = [path.read_bytes() for path in weights]
    run_all(replace(run, resume=True), is_right)
    assert len(shown) == 1  # nobody is asked twice
    assert [path.read_bytes() for path in weights] == before


def test_a_run_that_goes_on_starts_from_the_package_s_network_again(
    bare: Recipe, data: Path, tmp_path: Path
) -> None:
    run = Run(bare, data, tmp_path)
    run_source(run)
    before = (tmp_path / "source" / "checkpoint.safetensors").read_bytes()
    network = run_source(replace(run, resume=True))
    assert (tmp_path / "source" / "checkpoint.safetensors").read_bytes() == before
    known = load_network(tmp_path / "source")[0].state_dict()
    assert all(torch.equal(tensor, known[name]) for name, tensor in network.state_dict().items())


def test_decisions_that_are_not_right_stop_the_run_before_it_learns(
    bare: Recipe, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"target.sets.diameter_px or refine_stage.polarity"):
        run_all(Run(bare, data, tmp_path), lambda decisions: False)
    assert not (tmp_path / "decisions.json").exists()
    assert not (tmp_path / "refine" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "objects are 23 px across (18 to 31 in most images), estimated"),
        ({}, "90% of 40 findings are brighter than"),
        ({"bright_share": 0.2}, "80% of 40 findings are darker than"),
        ({"is_estimated": False}, "23 px across, as given"),
        ({"n_objects": 0}, "none is found yet"),
    ],
)
def test_decisions_are_told_in_words(changes: dict[str, float], words: str) -> None:
    decisions = replace(Decisions(23.0, 18.0, 31.0, True, 0.9, 40), **changes)
    assert words in decisions.in_words()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, source_stage=SourceStage(5)), "source_stage needs labelled images"),
        (lambda r: replace(r, adapt_stage=AdaptStage(5)), "adapt_stage needs labelled images"),
        (
            lambda r: replace(r, refine_stage=replace(r.refine_stage, source_every=2)),
            "source_every needs labelled images",
        ),
        (lambda r: replace(r, weights="imagenet"), "knows no objects"),
    ],
)
def test_a_recipe_that_leaves_out_what_it_needs_is_refused(
    bare: Recipe, change: Callable[[Recipe], Recipe], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        recipe_from_table(recipe_to_table(change(bare)), where="my.toml")


def test_a_run_is_not_resumed_from_other_weights_of_the_same_name(
    bare: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(bare, data, tmp_path)
    run_source(run)
    run_source(replace(run, resume=True))
    monkeypatch.setattr("darcnn.training.model.pretrained.read_photographs", lambda: b"other")
    with pytest.raises(UsageError, match="begun from another file"):
        run_source(replace(run, resume=True))


def test_a_start_is_told_by_the_content_of_its_file(tmp_path: Path) -> None:
    assert start_of("lite", "imagenet", tmp_path) == "imagenet"
    (tmp_path / "a.pth").write_bytes(b"one")
    first = start_of("resnet50", "a.pth", tmp_path)
    (tmp_path / "a.pth").write_bytes(b"two")
    assert start_of("resnet50", "a.pth", tmp_path) != first
    with pytest.raises(InputError, match="correct weights in the recipe"):
        start_of("resnet50", "b.pth", tmp_path)
