"""`darcnn-train`: help for every command, and one line with exit code 2 for what a user can put right."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

from darcnn.training.checkpoint import CheckpointInfo, read_info, save_checkpoint
from darcnn.training.cli import commands, main
from darcnn.training.config import Recipe
from darcnn.training.decisions import Decisions
from darcnn.training.model.network import Darcnn

STAGES = ("source", "adapt", "refine", "run", "ablation")

RECIPE = """
name = "tiny"
preset = "lite"
seed = 1
data = "nowhere"
data_licence = "CC0"
tile_px = 64

[source]
images = "source/images"
annotations = "source/instances.json"
diameter_px = [12.0, 40.0]

[source_stage]
steps = 1
batch = 1

[target]
channels = 1
intensity = { kind = "percentile", low = 0.5, high = 99.8 }
nominal_diameter_px = 20.0

[[target.sets]]
images = "target/*.png"

[adapt_stage]
steps = 1

[refine_stage]
steps = 1
"""


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the command line and returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["darcnn-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_of:
            main()
        output = capsys.readouterr()
        return int(exit_of.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize("command", [None, *sorted(commands.commands)])
def test_every_command_has_help(call: Callable[..., tuple[int, str, str]], command: str | None) -> None:
    code, out, err = call(*([] if command is None else [command]), "--help")
    assert (code, err) == (0, "")
    assert "Usage:" in out
    if command is not None:
        assert commands.commands[command].help
        for parameter in commands.commands[command].params:
            if parameter.param_type_name == "option":
                assert parameter.help, parameter.name  # type: ignore[attr-defined]


def test_all_stages_and_evaluation_are_there() -> None:
    assert {*STAGES, "evaluate"} <= set(commands.commands)


def test_help_does_not_load_torch() -> None:
    program = (
        "import sys\n"
        "from darcnn.training.cli import main\n"
        "sys.argv = ['darcnn-train', 'run', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout


@pytest.mark.parametrize("command", STAGES)
def test_a_missing_recipe_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path, command: str
) -> None:
    assert_refused(call(command, tmp_path / "none.toml"), "none.toml", "recipe")


@pytest.mark.parametrize("command", STAGES)
def test_a_missing_data_folder_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, command: str
) -> None:
    assert_refused(call(command, recipe_path), "nowhere", "--data")


def test_a_wrong_key_is_refused_with_the_nearest_valid_one(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path
) -> None:
    recipe_path.write_text(RECIPE.replace("tile_px", "tile_size"), encoding="utf-8")
    assert_refused(call("run", recipe_path, "--data", data), "tile_size", "did you mean tile_px?")


def test_what_is_not_toml_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path
) -> None:
    recipe_path.write_text("name = \n[[", encoding="utf-8")
    assert_refused(call("source", recipe_path), "tiny.toml", "not TOML")


def test_data_without_annotations_are_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "a.png").write_bytes((data / "target" / "u2os_1f6b7cead1.png").read_bytes())
    result = call("source", recipe_path, "--data", tmp_path, "--out", tmp_path / "run")
    assert_refused(result, "instances.json")


def test_a_gpu_that_is_not_there_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(call("source", recipe_path, "--data", data, "--device", "cuda"), "no GPU", "--device cpu")


def test_a_full_disk_is_said_in_one_line(
    call: Callable[..., tuple[int, str, str]],
    recipe_path: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("darcnn.training.checkpoint.save_file", refuse)
    code, out, err = call("source", recipe_path, "--data", data, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]  # after the progress
    assert "No space left on device" in last
    assert str(tmp_path / "run" / "source") in last
    assert not list((tmp_path / "run" / "source").glob("checkpoint*"))


def test_a_stage_without_the_one_before_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, tmp_path: Path
) -> None:
    result = call("adapt", recipe_path, "--data", data, "--out", tmp_path / "run")
    assert_refused(result, "no readable checkpoint")


def test_a_run_that_exists_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "run" / "source").mkdir(parents=True)
    (tmp_path / "run" / "source" / "checkpoint.json").write_text("{}")
    result = call("source", recipe_path, "--data", data, "--out", tmp_path / "run")
    assert_refused(result, "holds a checkpoint already", "--resume")


@pytest.mark.parametrize("arguments", [["nonsense"], ["source"], ["evaluate", "a"], ["source", "--nonsense"]])
def test_wrong_arguments_show_the_usage_and_exit_2(
    call: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage:" in err
    assert "Traceback" not in err


def test_an_interruption_exits_130_and_says_how_to_go_on(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(run: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("darcnn.training.stages.run_source", interrupt)
    code, _, err = call("source", recipe_path, "--data", data)
    assert code == 130
    assert "--resume" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("options", [(), ("--yes",)])
def test_without_a_terminal_it_is_said_that_nobody_was_asked(
    call: Callable[..., tuple[int, str, str]],
    recipe_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
) -> None:
    def ask(run: object, is_right: Callable[[Decisions], bool]) -> None:
        assert is_right(Decisions(20.0, 18.0, 22.0, True, 0.9, 30))
        raise KeyboardInterrupt

    monkeypatch.setattr("darcnn.training.stages.run_all", ask)
    _, out, err = call("run", recipe_path, "--data", data, *options)
    assert "objects are 20 px across" in out
    assert ("no terminal to ask in" in err) == (not options)


def test_a_missing_package_names_the_extra_to_install(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(run: object) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr("darcnn.training.stages.run_source", lacking)
    assert_refused(call("source", recipe_path, "--data", data), "timm", "darcnn[train]")


def test_source_stage_runs_and_says_where_its_checkpoint_is(
    call: Callable[..., tuple[int, str, str]], recipe_path: Path, data: Path, tmp_path: Path
) -> None:
    code, out, err = call("source", recipe_path, "--data", data, "--out", tmp_path / "run")
    assert code == 0
    assert out == f"checkpoint: {tmp_path / 'run' / 'source'}\n"
    assert (tmp_path / "run" / "source" / "checkpoint.safetensors").is_file()
    assert "source" in err  # progress


@pytest.fixture
def checkpoint(network: Darcnn, recipe: Recipe, tmp_path: Path) -> Path:
    """A checkpoint of a network that finds something everywhere."""
    recipe = replace(recipe, export=replace(recipe.export, tile_px=128))
    save_checkpoint(tmp_path / "checkpoint", network, CheckpointInfo("refine", 1, True, recipe))
    return tmp_path / "checkpoint"


def test_evaluation_prints_a_table_and_writes_json_and_csv(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    code, out, _ = call(
        "evaluate", checkpoint, data / "evaluate", "--pixels",
        "--json", tmp_path / "figures.json", "--csv", tmp_path / "figures.csv",
    )  # fmt: skip
    assert code == 0
    for word in ("aji", "pixel_f1", "object_f1", "max_iou", "all 2, mean", "1 dim_, mean", "all, pooled"):
        assert word in out
    table = json.loads((tmp_path / "figures.json").read_text())
    assert all(0 <= value <= 1 for row in table.values() for value in row.values())
    with (tmp_path / "figures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["dim_1f00080601", "u2os_212b858a66"]
    assert read_info(checkpoint).figures == {"data/evaluate": table}
    mean = sum(float(row["pixel_f1"]) for row in rows) / 2
    assert table["all 2, mean"]["pixel_f1"] == pytest.approx(mean, abs=1e-3)


def test_evaluation_without_labels_reads_images_alone(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("small_0acd2c223d.png", "u2os_1f6b7cead1.png"):
        shutil.copy(data / "target" / name, images)
    code, out, _ = call(
        "evaluate", checkpoint, images, "--pixels", "--unlabelled",
        "--json", tmp_path / "figures.json", "--csv", tmp_path / "figures.csv",
    )  # fmt: skip
    assert code == 0
    for word in ("trust", "agreement", "separation", "all 2, mean", "u2os_1f6b7cead1.png"):
        assert word in out
    table = json.loads((tmp_path / "figures.json").read_text())
    assert len(table) == 3
    assert len((tmp_path / "figures.csv").read_text().splitlines()) == 3
    assert not read_info(checkpoint).figures


def test_evaluation_of_images_takes_no_axis_and_is_not_resumed(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(call("evaluate", checkpoint, data / "evaluate", "--axis", "all"), "--axis", "no volumes/")
    unlabelled = call("evaluate", checkpoint, data / "evaluate", "--unlabelled", "--axis", "x")
    assert_refused(unlabelled, "--axis", "planes across z")

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("darcnn.training.open_model.open_model", interrupt)
    code, _, err = call("evaluate", "run", data / "evaluate")
    assert (code, err.split()) == (130, ["interrupted"])


def test_evaluation_without_a_model_or_a_folder_is_refused_in_one_line(
    call: Callable[..., tuple[int, str, str]], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    assert_refused(call("evaluate", tmp_path / "none.darcnn", data / "evaluate"), "none.darcnn")
    assert_refused(call("evaluate", checkpoint, tmp_path / "nothing"), "no images")
    (tmp_path / "file").touch()
    for option in ("--json", "--csv"):
        within = tmp_path / "file" / "figures"
        code, _, err = call("evaluate", checkpoint, data / "evaluate", "--pixels", option, within)
        assert code == 2
        assert "Traceback" not in err
        assert str(within) in err
