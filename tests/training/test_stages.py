"""A run: its folders, what it refuses, and the stages one after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from darcnn.runtime.errors import InputError, OutputError, UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.adapt.pseudo_labels import read_labels
from darcnn.training.checkpoint import load_network, read_info
from darcnn.training.config import Recipe, TargetSet
from darcnn.training.data.batches import Batch
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.model.network import Darcnn
from darcnn.training.stages import Run, run_adapt, run_all, run_refine, run_source


@pytest.fixture
def tiny(recipe: Recipe) -> Recipe:
    """Two steps a stage, two rounds, tiles of 64 px."""
    return replace(
        recipe,
        tile_px=64,
        source_stage=replace(recipe.source_stage, steps=2),
        adapt_stage=replace(recipe.adapt_stage, steps=2),
        refine_stage=replace(recipe.refine_stage, steps=2, rounds=2, max_objects=8, source_every=2),
    )


@pytest.mark.slow
def test_all_stages_leave_checkpoints_and_labels(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    trained = run_all(Run(tiny, data, tmp_path / "run"))
    assert not trained.training
    for name, stage in (
        ("source", "source"),
        ("adapt", "adapt"),
        ("refine-1", "refine"),
        ("refine", "refine"),
    ):
        info = read_info(tmp_path / "run" / name)
        assert (info.stage, info.step, info.complete, info.recipe) == (stage, 2, True, tiny)
    for name in ("refine-1", "refine"):
        labels = read_labels(tmp_path / "run" / name / "pseudo_labels")
        assert set(labels) <= {path.stem for path in (data / "target").iterdir()}
        assert all(1 < len(np.unique(picture)) <= 9 for picture in labels.values())
    loaded, _ = load_network(tmp_path / "run" / "refine")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.slow
def test_a_finished_run_resumed_gives_the_same_and_trains_nothing(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(tiny, refine_stage=replace(tiny.refine_stage, rounds=1)), data, tmp_path)
    first = run_all(run)
    monkeypatch.setattr("darcnn.training.loop._step", _forbidden)
    again = run_all(replace(run, resume=True))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def _forbidden(*arguments: object) -> dict[str, float]:
    raise AssertionError("a finished stage was trained again")


def test_adaptation_starts_all_encoders_from_the_source_checkpoint(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny, data, tmp_path)
    run_source(run)
    seen: list[Darcnn] = []

    def looked_at(network: Darcnn, plan: object, *rest: object) -> Darcnn:
        seen.append(network)
        return network

    monkeypatch.setattr("darcnn.training.stages.train", looked_at)
    run_adapt(run, tmp_path / "source")
    source, _ = load_network(tmp_path / "source")
    (network,) = seen
    for part in (network.shared_encoder, network.source_encoder, network.target_encoder):
        for name, tensor in source.shared_encoder.state_dict().items():
            assert torch.equal(tensor, part.state_dict()[name])
    for name, tensor in source.source_heads.state_dict().items():
        assert torch.equal(tensor, network.target_heads.state_dict()[name])


def test_refinement_learns_from_augmented_tiles_and_every_nth_step_from_photographs(
    tiny: Recipe, data: Path, tmp_path: Path, network: Darcnn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from darcnn.training.checkpoint import CheckpointInfo, save_checkpoint

    save_checkpoint(tmp_path / "adapt", network, CheckpointInfo("adapt", 1, True, tiny))
    made: list[list[Batch]] = []

    def take_batches(
        network: Darcnn, plan: object, make_batch: Callable[[int], Batch], *rest: object
    ) -> Darcnn:
        made.append([make_batch(step) for step in range(4)])
        return network

    monkeypatch.setattr("darcnn.training.stages.train", take_batches)
    run_refine(Run(tiny, data, tmp_path), tmp_path / "adapt")
    assert len(made) == tiny.refine_stage.rounds
    for batches in made:
        colourful = [bool((b.images[:, 0] != b.images[:, 1]).any()) for b in batches]
        assert not colourful[1]  # the target has one channel; photographs may be coloured
        assert not colourful[3]
        assert all(len(target["boxes"]) for batch in batches for target in batch.targets)
    different = made[0][1].images != made[1][1].images
    assert different.any()  # rounds draw other tiles


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_synthesized_tiles_take_their_share_of_the_source_batches(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    recipe = replace(
        tiny,
        source=replace(tiny.source, synthetic_fraction=share),
        target=replace(
            tiny.target,
            sets=(TargetSet("tissue/*.png"),),
            channels=3,
            intensity=IntensityRule("full_range"),
        ),
    )
    made: list[LabelledTile] = []
    original = SynthesizedSource.tile

    def counted(source: SynthesizedSource, rng: np.random.Generator, tile_px: int) -> LabelledTile:
        made.append(original(source, rng, tile_px))
        return made[-1]

    batches: list[Batch] = []

    def take_batches(
        network: Darcnn, plan: object, make_batch: Callable[[int], Batch], *rest: object
    ) -> Darcnn:
        batches.extend(make_batch(step) for step in range(12))
        return network

    monkeypatch.setattr(SynthesizedSource, "tile", counted)
    monkeypatch.setattr("darcnn.training.stages.train", take_batches)
    run_source(Run(recipe, data, tmp_path))
    n_tiles = sum(len(batch.targets) for batch in batches)
    assert len(made) / n_tiles == pytest.approx(share, abs=0.25 if 0 < share < 1 else 0)
    assert all(len(target["boxes"]) for batch in batches for target in batch.targets)


def test_a_folder_with_a_checkpoint_is_not_overwritten(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "checkpoint.json").write_text("{}")
    with pytest.raises(OutputError, match="--resume"):
        run_source(Run(tiny, data, tmp_path))


def test_a_stage_without_its_start_is_refused(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    for stage in (run_adapt, run_refine):
        with pytest.raises(InputError, match="no readable checkpoint"):
            stage(Run(tiny, data, tmp_path), tmp_path / "nothing")


def test_an_unknown_preset_is_refused(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown preset"):
        run_source(Run(replace(tiny, preset="huge"), data, tmp_path))
