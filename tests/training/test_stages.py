"""A run: its folders, what it refuses, and the stages one after another."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from darcnn.runtime.errors import DarcnnError, InputError, OutputError, UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.adapt.pseudo_labels import read_labels
from darcnn.training.checkpoint import (
    CheckpointInfo,
    load_network,
    read_info,
    record_figures,
    save_checkpoint,
)
from darcnn.training.config import Recipe, Source, TargetSet, recipe_to_table
from darcnn.training.data.batches import Batch
from darcnn.training.data.source import LabelledTile
from darcnn.training.data.synthesis import SynthesizedSource
from darcnn.training.model.network import Darcnn
from darcnn.training.run import Run
from darcnn.training.stages import run_adapt, run_all, run_refine, run_source
from darcnn.training.trust import read_trust


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
    for name in ("adapt", "refine-1", "refine"):
        trust = read_trust(tmp_path / "run" / name)
        assert trust is not None
        assert 0.0 <= trust.trust <= 1.0
    for name in ("refine-1", "refine"):
        labels = read_labels(tmp_path / "run" / name / "pseudo_labels")
        assert set(labels) <= {path.stem for path in (data / "target").iterdir()}
        assert all(1 <= len(np.unique(picture[picture > 0])) <= 8 for picture in labels.values())
    loaded, _ = load_network(tmp_path / "run" / "refine")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.slow
def test_a_finished_run_resumed_gives_the_same_and_trains_nothing(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(tiny, refine_stage=replace(tiny.refine_stage, rounds=1)), data, tmp_path)
    first = run_all(run)
    monkeypatch.setattr("darcnn.training.loop._add_gradient", _forbidden)
    again = run_all(replace(run, resume=True))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def _forbidden(*arguments: object) -> dict[str, float]:
    raise AssertionError("a finished stage was trained again")


@pytest.mark.usefixtures("untrusted")
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


@pytest.mark.usefixtures("untrusted")
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


@pytest.mark.usefixtures("untrusted")
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_pseudo_labelled_tiles_alone_are_crowded(
    tiny: Recipe, data: Path, tmp_path: Path, network: Darcnn, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    save_checkpoint(tmp_path / "adapt", network, CheckpointInfo("adapt", 1, True, tiny))
    crowded: list[int] = []

    def note(tile: LabelledTile, rng: np.random.Generator) -> LabelledTile:
        crowded.append(len(tile.masks))
        return tile

    def take_batches(
        network: Darcnn, plan: object, make_batch: Callable[[int], Batch], *rest: object
    ) -> Darcnn:
        for step in range(4):
            make_batch(step)
        return network

    monkeypatch.setattr("darcnn.training.refine_tiles.crowd", note)
    monkeypatch.setattr("darcnn.training.stages.train", take_batches)
    stage = replace(tiny.refine_stage, crowding=share, source_every=2, rounds=1)
    run_refine(Run(replace(tiny, refine_stage=stage), data, tmp_path), tmp_path / "adapt")
    assert len(crowded) == share * 2 * stage.batch  # steps 1 and 3; 0 and 2 are photographs
    assert all(crowded)


@pytest.mark.usefixtures("untrusted")
@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("most", [0.0, 0.2])
def test_stains_vary_and_glass_is_laid_after_tissue_was_labelled(
    tiny: Recipe,
    data: Path,
    tmp_path: Path,
    network: Darcnn,
    monkeypatch: pytest.MonkeyPatch,
    most: float,
    share: float,
) -> None:
    target = replace(
        tiny.target, sets=(TargetSet("tissue/*.png"),), channels=3, intensity=IntensityRule("full_range")
    )
    stage = replace(tiny.refine_stage, vary_stains=most, glass=share, source_every=0, rounds=1)
    recipe = replace(tiny, target=target, refine_stage=stage)
    save_checkpoint(tmp_path / "adapt", network, CheckpointInfo("adapt", 1, True, recipe))
    varied: list[float] = []
    holed: list[float] = []

    def note(tile: LabelledTile, rng: np.random.Generator, *, most: float) -> LabelledTile:
        varied.append(most)
        return tile

    def note_holes(tile: LabelledTile, rng: np.random.Generator, *, diameter_px: float) -> LabelledTile:
        holed.append(diameter_px)
        return tile

    def take_batches(
        network: Darcnn, plan: object, make_batch: Callable[[int], Batch], *rest: object
    ) -> Darcnn:
        assert not varied
        make_batch(0)
        return network

    monkeypatch.setattr("darcnn.training.refine_tiles.vary_stains", note)
    monkeypatch.setattr("darcnn.training.refine_tiles.lay_glass", note_holes)
    monkeypatch.setattr("darcnn.training.stages.train", take_batches)
    run_refine(Run(recipe, data, tmp_path), tmp_path / "adapt")
    assert varied == [most] * (stage.batch if most else 0)
    assert holed == [target.nominal_diameter_px] * (stage.batch if share else 0)


@pytest.mark.slow
@pytest.mark.usefixtures("untrusted")
def test_stage_2_leaves_all_but_a_few_layers_as_they_are(
    tiny: Recipe, data: Path, tmp_path: Path, network: Darcnn
) -> None:
    stage = replace(tiny.refine_stage, learns="few", rounds=1, source_every=2)
    recipe = replace(tiny, refine_stage=stage)
    save_checkpoint(tmp_path / "adapt", network, CheckpointInfo("adapt", 1, True, recipe))
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    after = run_refine(Run(recipe, data, tmp_path), tmp_path / "adapt").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"target_encoder", "proposer", "target_heads"}
    assert not any(
        name.startswith(("target_encoder.stages.1", "target_heads.box_head.fc6")) for name in changed
    )


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


def _no_target(data: Path, recipe: Recipe) -> Recipe:
    for path in (data / "target").iterdir():
        path.unlink()
    return recipe


def _damaged_target(data: Path, recipe: Recipe) -> Recipe:
    (data / "target" / "zz.png").write_bytes(b"no picture")
    return recipe


def _wrong_size(data: Path, recipe: Recipe) -> Recipe:
    number = sorted((data / "source" / "images").iterdir())[0]
    with Image.open(number) as picture:
        smaller = picture.resize((picture.width // 2, picture.height // 2))
    smaller.save(number)
    return recipe


def _wrong_label_map(data: Path, recipe: Recipe) -> Recipe:
    (data / "maps").mkdir()
    for path in (data / "target").iterdir():
        Image.new("I;16", (9, 9), 1).save(data / "maps" / path.name)
    return replace(recipe, source=Source("target", labels="maps"))


def _no_weights(data: Path, recipe: Recipe) -> Recipe:
    return replace(recipe, preset="resnet50", weights="none.pkl")


def _taken(data: Path, recipe: Recipe) -> Recipe:
    (data / "run" / "refine-1").mkdir(parents=True)
    (data / "run" / "refine-1" / "checkpoint.json").write_text("{}")
    return recipe


def _uneven(data: Path, recipe: Recipe) -> Recipe:
    return replace(recipe, refine_stage=replace(recipe.refine_stage, batch=3))


OBSTACLES: dict[Callable[[Path, Recipe], Recipe], tuple[type[DarcnnError], str]] = {
    _no_target: (InputError, "no target images"),
    _damaged_target: (InputError, "zz.png"),
    _wrong_size: (InputError, "its annotations are for"),
    _wrong_label_map: (InputError, "its image"),
    _no_weights: (InputError, "none.pkl"),
    _taken: (OutputError, "refine-1"),
    _uneven: (UsageError, "a batch of 3 cannot be shared by 2 processes"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_what_would_stop_any_stage_stops_a_run_before_it_trains(
    tiny: Recipe,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    obstacle: Callable[[Path, Recipe], Recipe],
) -> None:
    for name in ("source", "target"):
        shutil.copytree(data / name, tmp_path / name)
    recipe = obstacle(tmp_path, tiny)
    if obstacle is _uneven:
        monkeypatch.setattr("darcnn.training.parallel._count", lambda: 2)
    monkeypatch.setattr("darcnn.training.stages.train", _forbidden)
    kind, words = OBSTACLES[obstacle]
    with pytest.raises(kind, match=words):
        run_all(Run(recipe, tmp_path, tmp_path / "run"))


def test_the_seed_of_a_recipe_decides_what_a_run_starts_from(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darcnn.training.stages.train", lambda network, *rest: network)

    def begin(name: str, seed: int) -> dict[str, torch.Tensor]:
        torch.rand(5)  # what was drawn before does not matter
        return run_source(Run(replace(tiny, seed=seed), data, tmp_path / name)).state_dict()

    state = torch.random.get_rng_state()
    one, again, other = begin("one", 1), begin("again", 1), begin("other", 2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not torch.equal(one["proposer.head.conv.0.0.weight"], other["proposer.head.conv.0.0.weight"])
    torch.random.set_rng_state(state)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from darcnn.training import loop
from darcnn.training.config import recipe_from_table
from darcnn.training.run import Run
from darcnn.training.stages import run_adapt, run_refine, run_source

torch.set_num_threads(1)
loop._SAVE_EVERY = 2
note = loop.History.add

def note_and_die(history, step, values):
    note(history, step, values)
    if step == 2:  # one step after the checkpoint
        os.kill(os.getpid(), signal.SIGKILL)

loop.History.add = note_and_die
stage, table, data, out, start = sys.argv[1:]
run = Run(recipe_from_table(json.loads(table), where="test"), Path(data), Path(out))
begin = {"source": lambda run, start: run_source(run), "adapt": run_adapt, "refine": run_refine}[stage]
begin(run, Path(start))
"""


@pytest.mark.usefixtures("untrusted")
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source", "adapt", "refine"])
def test_a_stage_that_was_killed_ends_with_the_same_bits_as_one_that_never_stopped(
    stage: str, tiny: Recipe, network: Darcnn, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(
        tiny,
        source_stage=replace(tiny.source_stage, steps=4),
        adapt_stage=replace(tiny.adapt_stage, steps=4, encoder_average=0.9),
        refine_stage=replace(tiny.refine_stage, steps=4, rounds=1),
    )
    start = tmp_path / "start"
    save_checkpoint(start, network, CheckpointInfo("source", 1, True, recipe))
    table = json.dumps(recipe_to_table(recipe))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, stage, table, str(data), str(tmp_path / "killed"), str(start)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = read_info(tmp_path / "killed" / stage)
    assert (left.step, left.complete) == (2, False)
    monkeypatch.setattr("darcnn.training.loop._SAVE_EVERY", 2)

    def finish(run: Run) -> Darcnn:
        if stage == "source":
            return run_source(run)
        return {"adapt": run_adapt, "refine": run_refine}[stage](run, start)

    resumed = finish(Run(recipe, data, tmp_path / "killed", resume=True))
    whole = finish(Run(recipe, data, tmp_path / "whole"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    for name in ("checkpoint.safetensors", "history.csv"):
        one, other = (tmp_path / run / stage / name for run in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.usefixtures("untrusted")
@pytest.mark.parametrize("rate", [0.0, 0.05, 1.0])
def test_the_target_encoder_moves_at_its_own_rate(
    rate: float, tiny: Recipe, network: Darcnn, data: Path, tmp_path: Path
) -> None:
    stage = replace(tiny.adapt_stage, steps=1, warm_up=1, target_encoder_rate=rate)
    recipe = replace(tiny, adapt_stage=stage)
    save_checkpoint(tmp_path / "source", network, CheckpointInfo("source", 1, True, recipe))
    adapted = run_adapt(Run(recipe, data, tmp_path), tmp_path / "source")
    start = network.shared_encoder.state_dict()

    def moved(part: torch.nn.Module) -> float:
        return max(float((p.detach() - start[name]).abs().max()) for name, p in part.named_parameters())

    # Adam's first step is the learning rate, whatever the gradient
    assert moved(adapted.target_encoder) == pytest.approx(rate * stage.learning_rate, rel=0.05, abs=1e-9)
    assert moved(adapted.source_encoder) == pytest.approx(stage.learning_rate, rel=0.05)


@pytest.fixture
def trained_source(tiny: Recipe, tmp_path: Path) -> Path:
    """The checkpoint of a source stage that has taught trunk, E_c, R and M^s, and nothing else."""
    network = Darcnn.from_name("lite")
    with torch.no_grad():
        for part in (network.shared_encoder, network.source_heads):
            for parameter in part.parameters():
                parameter.add_(0.25)
    save_checkpoint(tmp_path / "trained", network, CheckpointInfo("source", 2, True, tiny))
    return tmp_path / "trained"


def test_a_source_stage_serves_as_a_start_whatever_the_recipe_s_own_has(
    tiny: Recipe, data: Path, tmp_path: Path, trained_source: Path
) -> None:
    bare = replace(tiny, weights="coco", source_stage=replace(tiny.source_stage, steps=0))
    for recipe in (tiny, bare):
        network = Run(recipe, data, tmp_path / "run").start_from(trained_source)
        for ours, theirs in (
            (network.target_heads, network.source_heads),
            (network.target_encoder, network.shared_encoder),
        ):
            for name, tensor in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_start_with_other_layers_is_refused(
    tiny: Recipe, data: Path, tmp_path: Path, trained_source: Path
) -> None:
    for changes in ({"preset": "resnet50"}, {"preset": "resnet50", "weights": "model.pkl"}):
        run = Run(replace(tiny, **changes), data, tmp_path / "run")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="has other layers than the recipe"):
            run.start_from(trained_source)


def test_figures_that_were_noted_stay_when_a_run_goes_on(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    bare = replace(
        tiny,
        weights="coco",
        source=None,
        source_stage=replace(tiny.source_stage, steps=0),
        adapt_stage=replace(tiny.adapt_stage, steps=0),
        refine_stage=replace(tiny.refine_stage, source_every=0),
    )
    run = Run(bare, data, tmp_path / "run")
    run_source(run)
    record_figures(tmp_path / "run" / "source", "x", {"aji": 0.5})
    other = replace(bare, name="other", export=replace(bare.export, min_score=0.9))
    run_source(replace(run, recipe=other, resume=True))
    assert read_info(tmp_path / "run" / "source").figures == {"x": {"aji": 0.5}}
    assert read_info(tmp_path / "run" / "source").recipe == other  # what a bundle of it will say


@pytest.mark.usefixtures("untrusted")
def test_a_finished_stage_takes_over_what_is_said_of_its_export(
    tiny: Recipe, data: Path, tmp_path: Path, network: Darcnn
) -> None:
    save_checkpoint(tmp_path / "source", network, CheckpointInfo("source", 1, True, tiny))
    for name, recipe in (("tiny", tiny), ("other", replace(tiny, name="other"))):
        run_adapt(Run(recipe, data, tmp_path, resume=True), tmp_path / "source")
        assert read_info(tmp_path / "adapt").recipe.name == name


def test_another_recipe_is_refused_before_a_finished_run_is_touched(
    tiny: Recipe, data: Path, tmp_path: Path
) -> None:
    one = replace(tiny, refine_stage=replace(tiny.refine_stage, rounds=1))
    network = Darcnn.from_name("lite")
    for name in ("source", "adapt", "refine"):
        (tmp_path / "run" / name).mkdir(parents=True)
        save_checkpoint(tmp_path / "run" / name, network, CheckpointInfo(name, 2, True, one))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")}
    two = replace(tiny, refine_stage=replace(tiny.refine_stage, rounds=2))
    with pytest.raises(UsageError, match=r"refine: was begun with another recipe \(.*\)"):
        run_all(Run(two, data, tmp_path / "run", resume=True))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.json")} == before
    assert not (tmp_path / "run" / "refine-1" / "checkpoint.json").exists()
