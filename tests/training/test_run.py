"""The folders and images of a run, and what an earlier try noted of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from darcnn.runtime.errors import UsageError
from darcnn.training.adapt import diameters
from darcnn.training.adapt.diameters import match_scales
from darcnn.training.config import Recipe, TargetSet
from darcnn.training.data.target import TargetImages
from darcnn.training.model.network import Darcnn
from darcnn.training.run import LABELS_FOLDER, Run, check_images


@pytest.fixture
def own_data(data: Path, tmp_path: Path) -> Path:
    """Two unlabelled images in a folder that a test may change."""
    for name, source in zip("ab", sorted((data / "target").glob("*.png")), strict=False):
        shutil.copy(source, tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def plan(recipe: Recipe) -> Recipe:
    return replace(recipe, target=replace(recipe.target, sets=(TargetSet("*.png"),), finds_diameter=True))


@pytest.mark.parametrize("begun", ["checkpoint.json", LABELS_FOLDER])
def test_a_stage_does_not_go_on_with_other_images_once_it_has_begun(
    own_data: Path, plan: Recipe, tmp_path: Path, begun: str
) -> None:
    run, folder = Run(plan, own_data, tmp_path / "run"), tmp_path / "run" / "adapt"
    folder.mkdir(parents=True)
    check_images(run.targets(), folder)
    shutil.copy(own_data / "b.png", own_data / "c.png")
    check_images(run.targets(), folder)  # nothing has been learned yet
    (folder / begun).mkdir()
    check_images(run.targets(), folder)
    Image.open(own_data / "c.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(own_data / "b.png")
    with pytest.raises(UsageError, match=r"begun with other images than target.sets names now.*--out"):
        check_images(run.targets(), folder)


def test_pictures_that_the_run_has_drawn_are_no_images_of_it(own_data: Path, plan: Recipe) -> None:
    recipe = replace(plan, target=replace(plan.target, sets=(TargetSet("**/*.png"),)))
    run = Run(recipe, own_data, own_data / "run")
    for place in (
        "run/decisions.png",
        "run/refine/pseudo_labels/a.png",
        "run/adapt/sheet.png",
        "run/x/d.png",
    ):
        (own_data / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(own_data / "a.png", own_data / place)
    assert [image.name for image in run.targets().images] == ["a", "b", "d"]


def test_sizes_are_measured_again_where_images_or_recipe_have_changed(
    own_data: Path, plan: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, sizes = Darcnn.from_name("lite"), iter(range(10, 99))
    monkeypatch.setattr(diameters, "estimate_diameter", lambda segmenter, reader: float(next(sizes)))

    def scales(recipe: Recipe, folder: str, before: str | None = None) -> list[float]:
        targets = TargetImages(own_data, recipe.target, 0)
        place = None if before is None else tmp_path / before
        match_scales(network, recipe, targets, tmp_path / folder, before=place)
        return [20.0 / image.scale for image in targets.images]

    assert scales(plan, "adapt") == pytest.approx([10, 11])
    assert scales(plan, "adapt") == pytest.approx([10, 11])
    assert scales(plan, "refine", before="adapt") == pytest.approx([10, 11])
    assert not (tmp_path / "refine").exists()
    lower = replace(plan, refine_stage=replace(plan.refine_stage, min_score=0.3))
    assert scales(lower, "refine", before="adapt") == pytest.approx([12, 13])
    assert scales(plan, "adapt") == pytest.approx([10, 11])  # stage 1 has kept its own
    shutil.copy(own_data / "b.png", own_data / "c.png")
    assert scales(plan, "adapt") == pytest.approx([14, 15, 16])
