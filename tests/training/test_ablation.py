"""The ablation: which arm switches off what, and a whole one on tiny images, stopped and resumed."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from darcnn.runtime.errors import InputError, OutputError, UsageError
from darcnn.training import ablation
from darcnn.training.ablation import ARMS, Arm, run_ablation
from darcnn.training.checkpoint import read_info
from darcnn.training.config import Ablation, Recipe, TargetSet
from darcnn.training.run import Run

NAMES = [
    "source",
    "longer",
    "similarity",
    "consistency",
    "stage_1",
    "plain_labels",
    "stage_2",
]  # of a grey target
SEEDED = ["source", "stage_1", "stage_2"]


@pytest.fixture(scope="session")
def tiny(recipe: Recipe) -> Recipe:
    """One step a stage."""
    return replace(
        recipe,
        tile_px=64,
        source=replace(recipe.source, scene_fraction=0.0),
        target=replace(recipe.target, sets=(TargetSet("target/u2os_1*.png"),)),
        source_stage=replace(recipe.source_stage, steps=1, batch=1),
        adapt_stage=replace(recipe.adapt_stage, steps=1, source_batch=1, target_batch=1),
        refine_stage=replace(recipe.refine_stage, steps=1, batch=1, max_objects=3),
        export=replace(recipe.export, min_score=0.05, tile_px=256),
        ablation=Ablation("evaluate", paper="bbbc", seeds=(9,)),
    )


def arm_named(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)


def test_each_arm_switches_off_what_its_name_says(tiny: Recipe) -> None:
    for name in ("source", "stage_1", "stage_2"):
        assert arm_named(name).recipe(tiny) == tiny
    full = tiny.adapt_stage
    for name, alpha, gamma in (
        ("longer", 0.0, 0.0),
        ("similarity", full.alpha, 0.0),
        ("consistency", 0.0, full.gamma),
    ):
        changed = arm_named(name).recipe(tiny)
        assert changed == replace(tiny, adapt_stage=replace(full, alpha=alpha, beta=0.0, gamma=gamma))
    plain = arm_named("plain_labels").recipe(tiny)
    assert plain == replace(tiny, refine_stage=replace(tiny.refine_stage, augment=False))
    synthesized = arm_named("synthesized").recipe(tiny)
    assert synthesized == replace(tiny, source=replace(tiny.source, synthetic_fraction=0.5))


def test_the_paper_s_figures_stand_in_the_order_of_its_tables() -> None:
    bbbc = [arm.paper["bbbc"][0] for arm in ARMS if "bbbc" in arm.paper]
    tnbc = [arm.paper["tnbc"][0] for arm in ARMS if "tnbc" in arm.paper]
    assert bbbc == [0.0315, 0.1414, 0.3250, 0.3371, 0.4349, 0.4725]
    assert tnbc == [0.0060, 0.3332, 0.3687, 0.3808, 0.4071, 0.4463, 0.4906]


def forbid(*arguments: object) -> None:
    raise AssertionError("trained")


@pytest.mark.usefixtures("untrusted")
@pytest.mark.slow
def test_an_ablation_that_was_stopped_goes_on_and_leaves_a_row_for_every_arm(
    tiny: Recipe, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tiny, data, tmp_path / "out")
    scored: list[str] = []
    original = ablation.evaluate_folder

    def score(folder: Path, segment: Callable[..., object]) -> object:
        if len(scored) == 2:
            scored.append("stopped")
            raise KeyboardInterrupt
        scored.append(folder.name)
        return original(folder, segment)  # type: ignore[arg-type]

    monkeypatch.setattr(ablation, "evaluate_folder", score)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(run)
    assert [row["arm"] for row in table(run.out)] == NAMES[:2]
    with pytest.raises(OutputError, match="--resume"):
        run_ablation(run)
    stamps = stamps_of(run.out)
    run_ablation(replace(run, resume=True))
    assert len(scored) == 1 + len(NAMES) + len(SEEDED)  # those that were done are not scored again
    assert stamps.items() <= stamps_of(run.out).items()  # nor trained
    rows = table(run.out)
    assert [row["arm"] for row in rows if row["run"] == "1"] == NAMES
    assert [row["arm"] for row in rows if row["run"] == "2"] == SEEDED
    for row in rows:
        folder = run.out if row["run"] == "1" else run.out / "seed-9"
        figures = json.loads((folder / row["arm"] / "figures.json").read_text())["figures"]
        assert row["aji"] == f"{figures['aji']:.4f}"
        assert all(0.0 <= figure <= 1.0 for figure in figures.values())
    theirs = ["0.0315", "", "0.1414", "0.325", "0.3371", "0.4349", "0.4725"]
    assert [row["paper_aji"] for row in rows if row["run"] == "1"] == theirs
    lines = (run.out / "ablation.md").read_text().splitlines()
    assert len(lines) == 2 + len(NAMES)
    assert lines[2].startswith("| source only | ")
    assert [" ± " in line for line in lines[2:]] == [name in SEEDED for name in NAMES]
    assert (read_info(run.out / "seed-9" / "stage_1" / "adapt").recipe.seed) == 9
    assert lines[2].endswith("| 0.0315, 0.3144, 0.0818 |")
    with Image.open(run.out / "ablation.png") as plot:
        assert plot.format == "PNG"
    monkeypatch.setattr("darcnn.training.stages.train", forbid)
    monkeypatch.setattr(ablation, "evaluate_folder", forbid)
    run_ablation(replace(run, resume=True))
    assert table(run.out) == rows


def table(out: Path) -> list[dict[str, str]]:
    with (out / "ablation.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def stamps_of(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("*/*/checkpoint.safetensors")}


def test_a_recipe_without_ablation_is_refused(tiny: Recipe, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \[ablation\]"):
        run_ablation(Run(replace(tiny, ablation=None), data, tmp_path / "out"))


@pytest.mark.parametrize("missing", ["images", "labels", "one label"])
def test_images_without_labels_are_refused_before_anything_is_trained(
    tiny: Recipe, data: Path, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darcnn.training.stages.train", forbid)
    shutil.copytree(data / "evaluate", tmp_path / "evaluate")
    if missing == "one label":
        sorted((tmp_path / "evaluate" / "labels").iterdir())[0].unlink()
    else:
        shutil.rmtree(tmp_path / "evaluate" / missing)
    with pytest.raises(InputError, match=r"no label image|no images"):
        run_ablation(Run(tiny, tmp_path, tmp_path / "out"))
