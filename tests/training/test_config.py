"""A recipe: read exactly, written back exactly, and wrong ones refused in one helpful line."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.training.config import (
    TargetSet,
    read_recipe,
    recipe_from_table,
    recipe_to_table,
    relevant_part,
)

TEXT = """
name = "tiny"
preset = "lite"
seed = 1
data = "."
data_licence = "CC0"

[source]
images = "images"
annotations = "instances.json"

[source_stage]
steps = 5

[target]
channels = 1
intensity = { kind = "percentile", low = 1, high = 99.5 }
nominal_diameter_px = 20

[[target.sets]]
images = "a/*.png"

[[target.sets]]
images = "b/*.png"
diameter_px = 13

[adapt_stage]
steps = 6

[refine_stage]
steps = 7
scales = [1, 1.7]
"""


@pytest.fixture
def table() -> dict[str, Any]:
    return tomllib.loads(TEXT)


def changed(table: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return the table with the key at the dotted `path` set, or removed where `value` is `...`."""
    result = copy.deepcopy(table)
    *parents, last = path.split(".")
    inner = result
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return result


def refusal(table: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        recipe_from_table(table, where="recipe.toml")
    message = str(caught.value)
    assert message.startswith("recipe.toml: ")
    assert "\n" not in message
    return message


def test_a_recipe_is_read_into_frozen_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    recipe = read_recipe(path)
    assert recipe.target.intensity == IntensityRule("percentile", 1.0, 99.5)
    assert recipe.target.sets == (TargetSet("a/*.png"), TargetSet("b/*.png", 13.0))
    assert recipe.refine_stage.scales == (1.0, 1.7)
    assert recipe.source_stage.steps == 5
    assert recipe.adapt_stage.beta == 1.0  # the paper's
    assert recipe.adapt_stage.gamma == 0.1  # the paper's
    assert recipe.refine_stage.min_score == 0.5  # the paper's z
    hash(recipe)  # frozen through and through


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("presett", "preset"),
        ("source_stage.step", "source_stage.steps"),
        ("refine_stage.min_scor", "refine_stage.min_score"),
        ("adapt_stage.learning_rat", "adapt_stage.learning_rate"),
        ("target.intensity.hihg", "target.intensity.high"),
        ("zzz", ""),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(table: dict[str, Any], path: str, nearest: str) -> None:
    message = refusal(changed(table, path, 1))
    assert f"unknown key {path}" in message
    assert f"did you mean {nearest}" in message


def test_an_unknown_key_inside_a_list_of_tables_is_found(table: dict[str, Any]) -> None:
    table["target"]["sets"][1]["diametre_px"] = 3
    assert "did you mean target.sets[1].diameter_px?" in refusal(table)


@pytest.mark.parametrize(
    "path",
    [
        "name",
        "seed",
        "data_licence",
        "source.annotations",
        "target.channels",
        "target.intensity.kind",
        "target.sets",
        "refine_stage",
    ],
)
def test_a_missing_key_is_named(table: dict[str, Any], path: str) -> None:
    assert f"lacks the key {path}" in refusal(changed(table, path, ...))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", "7"),
        ("seed", 7.5),
        ("seed", True),
        ("name", 3),
        ("source", "coco"),
        ("source_stage.steps", 10.0),
        ("source_stage.learning_rate", "fast"),
        ("target.nominal_diameter_px", False),
        ("target.mpp", "0.25"),
        ("target.intensity.kind", "linear"),
        ("refine_stage.fit_masks", 1),
        ("refine_stage.scales", ["one"]),
        ("source.diameter_px", [8.0, 20.0, 80.0]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(table: dict[str, Any], path: str, value: Any) -> None:
    assert path.rsplit(".", 1)[-1] in refusal(changed(table, path, value))


@pytest.mark.parametrize(
    ("path", "value", "hint"),
    [
        ("target.sets", [], "at least one"),
        ("target.channels", 0, "from 1 to 4"),
        ("target.channels", 5, "from 1 to 4"),
        ("target.intensity", {"kind": "percentile", "low": 99.0, "high": 1.0}, "not in order"),
        ("target.intensity", {"kind": "percentile", "low": 1.0, "high": 100.5}, "not in order"),
        ("target.intensity", {"kind": "range", "low": 4.0, "high": 4.0}, "is empty"),
        ("target.intensity", {"kind": "range"}, "is empty"),
        ("target.jitter", 0.9, "below 1"),
        ("tile_px", 100, "64"),
        ("source.labels", "labels", "source.annotations"),  # one of the two
        ("source.intensity", {"kind": "range", "low": 0, "high": 9}, "source.labels"),
        ("source.scene_fraction", 1.5, "from 0 to 1"),
        ("source.grey_fraction", -0.5, "from 0 to 1"),
        ("refine_stage.crowding", 1.5, "from 0 to 1"),
        ("refine_stage.crowding", -0.1, "no share"),
        ("refine_stage.glass", 1.5, "give a number from 0 to 1"),
        ("refine_stage.glass", -0.1, "no share"),
        ("refine_stage.glass", 0.5, "target.channels is 1"),
        ("refine_stage.min_stain", 1.5, "give a number from 0 to 1"),
        ("refine_stage.min_stain", 0.5, "target.channels is 1"),
        ("refine_stage.vary_stains", -0.1, "from 0 to below 1"),
        ("refine_stage.vary_stains", 1.0, "from 0 to below 1"),
        ("refine_stage.vary_stains", float("nan"), "from 0 to below 1"),
        ("refine_stage.vary_stains", 0.2, "target.channels is 1"),
        ("source.synthetic_fraction", 2, "from 0 to 1"),
        ("source.diameter_px", [80.0, 8.0], "in order"),
        ("source.diameter_px", [0.0, 8.0], "above 0"),
        ("source.invert", "yes", "give true or false"),
    ],
)
def test_a_value_out_of_range_is_refused(table: dict[str, Any], path: str, value: Any, hint: str) -> None:
    assert hint in refusal(changed(table, path, value))


@pytest.mark.parametrize("content", [b"name = ", b"[source\n", b"\xff\xfe", b"name = 'a'\nname = 'b'\n"])
def test_what_is_not_toml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not TOML") as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(UsageError, match="give the path of a recipe"):
            read_recipe(path)


def test_a_recipe_goes_through_tables_and_json_unchanged(table: dict[str, Any]) -> None:
    recipe = recipe_from_table(table, where="recipe.toml")
    assert recipe_from_table(recipe_to_table(recipe), where="again") == recipe
    assert recipe_from_table(json.loads(json.dumps(recipe_to_table(recipe))), where="json") == recipe


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.floats(0.1, 100),
    st.none() | st.floats(0.01, 10),
    st.lists(st.floats(0.1, 4), min_size=1, max_size=4),
    st.text(st.characters(codec="utf-8"), max_size=20),
)
def test_any_valid_recipe_survives_json(
    seed: int, diameter_px: float, mpp: float | None, scales: list[float], name: str
) -> None:
    content = tomllib.loads(TEXT)
    content |= {"seed": seed, "name": name}
    content["target"] |= {"nominal_diameter_px": diameter_px} | ({} if mpp is None else {"mpp": mpp})
    content["refine_stage"]["scales"] = scales
    recipe = recipe_from_table(content, where="x")
    assert recipe_from_table(json.loads(json.dumps(recipe_to_table(recipe))), where="json") == recipe


@pytest.fixture(scope="session")
def examples(root: Path) -> list[Path]:
    return sorted((root / "examples" / "recipes").rglob("*.toml"))


def test_recipes_that_ship_are_valid(examples: list[Path]) -> None:
    assert examples
    for path in examples:
        recipe = read_recipe(path)
        assert recipe.name == path.stem
        assert recipe.data_licence


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("name", "other", set()),
        ("data_licence", "CC BY", set()),
        ("export", {"min_score": 0.9}, set()),
        ("refine_stage.min_score", 0.9, {"refine"}),
        ("adapt_stage.gamma", 0.9, {"adapt", "refine"}),
        ("target.nominal_diameter_px", 9.0, {"adapt", "refine"}),
        ("source_stage.batch", 9, {"source", "adapt", "refine"}),
        ("source.invert", True, {"source", "adapt", "refine"}),
        ("source.synthetic_fraction", 0.5, {"source", "adapt", "refine"}),
        ("seed", 9, {"source", "adapt", "refine"}),
        ("preset", "resnet50", {"source", "adapt", "refine"}),
        ("weights", "coco", {"source", "adapt", "refine"}),
    ],
)
def test_a_stage_depends_on_its_own_part_of_a_recipe_and_on_those_before(
    table: dict[str, Any], path: str, value: Any, stages: set[str]
) -> None:
    if path == "weights":
        table = changed(table, "preset", "resnet50")
    recipe = recipe_from_table(table, where="x")
    other = recipe_from_table(changed(table, path, value), where="x")
    different = {
        s for s in ("source", "adapt", "refine") if relevant_part(recipe, s) != relevant_part(other, s)
    }
    assert different == stages


def test_label_maps_take_the_place_of_annotations(table: dict[str, Any]) -> None:
    table["source"] = {
        "images": "images/*.png",
        "labels": "labels",
        "invert": True,
        "intensity": {"kind": "percentile", "low": 1, "high": 99},
    }
    source = recipe_from_table(table, where="x").source
    assert source.annotations is None
    assert source.labels == "labels"
    assert source.invert is True
    assert source.intensity == IntensityRule("percentile", 1.0, 99.0)


@pytest.mark.parametrize(
    ("path", "value"), [("target.nominal_diameter_px", 9.0), ("target.sets", [{"images": "c/*.png"}])]
)
def test_with_synthesized_tiles_all_stages_depend_on_the_target(
    table: dict[str, Any], path: str, value: Any
) -> None:
    table["source"]["synthetic_fraction"] = 0.25
    recipe = recipe_from_table(table, where="x")
    other = recipe_from_table(changed(table, path, value), where="x")
    for stage in ("source", "adapt", "refine"):
        assert relevant_part(recipe, stage) != relevant_part(other, stage)


@pytest.mark.parametrize(
    ("path", "value"),
    [("refine_stage.scales", 1.0), ("source.diameter_px", 8), ("refine_stage.scales", [])],
)
def test_a_number_where_a_list_is_due_is_refused(table: dict[str, Any], path: str, value: Any) -> None:
    assert path in refusal(changed(table, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("preset", "huge"),
        ("tile_px", 0),
        ("tile_px", -64),
        ("target.nominal_diameter_px", 0.0),
        ("target.jitter", 0.0),
        ("source_stage.batch", 0),
        ("source_stage.steps", -1),
        ("refine_stage.rounds", 0),
        ("refine_stage.max_objects", 70_000),
        ("refine_stage.min_score", float("nan")),
        ("refine_stage.source_every", 1),
        ("refine_stage.synthetic_every", -2),
        ("refine_stage.scales", [float("inf")]),
        ("adapt_stage.patience", -5),
        ("adapt_stage.gamma", -0.1),
        ("adapt_stage.learning_rate", float("inf")),
        ("seed", 2**63),
    ],
)
def test_values_that_no_run_could_use_are_refused(table: dict[str, Any], path: str, value: Any) -> None:
    assert path in refusal(changed(table, path, value))


def test_weights_are_of_imagenet_unless_a_recipe_says_otherwise(table: dict[str, Any]) -> None:
    assert recipe_from_table(table, where="x").weights == "imagenet"
    table["preset"] = "resnet50"
    for weights in ("imagenet", "coco", "models/model_final.pkl", "/models/model_0099.pth"):
        assert recipe_from_table(table | {"weights": weights}, where="x").weights == weights


@pytest.mark.parametrize(
    ("preset", "weights", "hint"),
    [
        ("resnet50", "Coco", "imagenet, coco, nuclei-"),
        ("resnet50", "", "imagenet, coco, nuclei-"),
        ("resnet50", "model.safetensors", "imagenet, coco, nuclei-"),
        ("lite", "model.pkl", "does not fit preset lite; use preset resnet50"),
    ],
)
def test_weights_that_no_network_could_start_from_are_refused(
    table: dict[str, Any], preset: str, weights: str, hint: str
) -> None:
    message = refusal(table | {"preset": preset, "weights": weights})
    assert f"weights = {weights!r}" in message
    assert hint in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed = -1"),
        ({"refine_stage": {"learning_rate": -1e-4}}, "refine_stage.learning_rate"),
        ({"export": {"tile_px": 500}}, "export.tile_px = 500"),
        ({"export": {"tile_px": 64}}, "export.tile_px = 64"),
        ({"refine_stage": {"source_every": 2, "synthetic_every": 4}}, "synthetic_every would never act"),
    ],
)
def test_values_that_would_end_a_run_later_are_refused_before(
    table: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    for key, value in change.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UsageError, match=words):
        recipe_from_table(table, where="x")


def test_a_name_that_no_model_may_have_is_refused_in_a_recipe_and_read_in_a_checkpoint(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(TEXT.replace("name = ", 'name = "my/model"\n# ', 1))
    with pytest.raises(UsageError, match="name = 'my/model': name holds '/'"):
        read_recipe(path)
    assert recipe_from_table(tomllib.loads(path.read_text()), where="x").name == "my/model"


def test_a_recipe_may_begin_with_a_mark_of_its_encoding(tmp_path: Path, table: dict[str, Any]) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(b"\xef\xbb\xbfname = 3\n")
    with pytest.raises(UsageError, match=r"name = 3 is not of its kind|lacks the key"):
        read_recipe(path)
