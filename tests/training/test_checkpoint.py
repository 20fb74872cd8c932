"""Checkpoints: what goes in comes out, nothing is pickled, and a damaged one is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from darcnn.runtime.errors import InputError, OutputError
from darcnn.training.checkpoint import (
    CheckpointInfo,
    is_complete,
    load_network,
    load_optimizer,
    read_info,
    record_figures,
    save_checkpoint,
)
from darcnn.training.config import Recipe
from darcnn.training.model.network import Darcnn
from darcnn.training.steps import learning_parts

WEIGHTS, INFO = "checkpoint.safetensors", "checkpoint.json"


@pytest.fixture
def info(recipe: Recipe) -> CheckpointInfo:
    return CheckpointInfo(
        "adapt", 7, False, recipe, figures={"aji": 0.5}, state={"best": 1.5, "best_step": 3}
    )


@pytest.fixture
def folder(tmp_path: Path, network: Darcnn, info: CheckpointInfo) -> Path:
    """A folder with a good checkpoint."""
    save_checkpoint(tmp_path / "run", network, info)
    return tmp_path / "run"


def stepped_optimizer(network: Darcnn) -> torch.optim.Optimizer:
    """Return an optimiser that has taken one step of the source stage with made-up gradients."""
    optimizer = torch.optim.AdamW(network.select_trainable(*learning_parts(network, "source")), lr=1e-3)
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        if number % 3:  # some have no gradient, hence no moments
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_network_and_facts_come_back_as_they_went_in(
    folder: Path, network: Darcnn, info: CheckpointInfo
) -> None:
    loaded, facts = load_network(folder)
    assert facts == info
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_files_are_safetensors_and_json_and_nothing_else(folder: Path, network: Darcnn) -> None:
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, INFO}
    assert set(load_file(folder / WEIGHTS)) == set(network.state_dict())
    content = json.loads((folder / INFO).read_text(encoding="utf-8"))
    assert content["stage"] == "adapt"
    head = (folder / WEIGHTS).read_bytes()[:2]
    assert head not in (b"PK", b"\x80\x02", b"\x80\x04")  # a zip of pickles, a pickle


def test_optimizer_goes_on_with_its_moments(tmp_path: Path, network: Darcnn, info: CheckpointInfo) -> None:
    first = stepped_optimizer(network)
    save_checkpoint(tmp_path, network, info, first)
    loaded, _ = load_network(tmp_path)
    second = torch.optim.AdamW(loaded.select_trainable(*learning_parts(loaded, "source")), lr=1e-3)
    load_optimizer(tmp_path, loaded, second)
    assert len(second.state) == len(first.state) > 0
    torch.manual_seed(1)
    noise = [torch.randn_like(parameter) for parameter in first.param_groups[0]["params"]]
    for optimizer in (first, second):
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], noise, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_saving_again_replaces_the_checkpoint(
    folder: Path, network: Darcnn, info: CheckpointInfo, recipe: Recipe
) -> None:
    assert not is_complete(folder)
    save_checkpoint(folder, network, CheckpointInfo("adapt", 9, True, recipe))
    assert is_complete(folder)
    assert read_info(folder).step == 9
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, INFO}


def test_a_folder_without_a_checkpoint_is_not_complete(tmp_path: Path) -> None:
    assert not is_complete(tmp_path)
    assert not is_complete(tmp_path / "none")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no facts": (INFO, lambda path: path.unlink()),
    "facts cut short": (INFO, _truncate),
    "facts that are no table": (INFO, lambda path: path.write_text("[]")),
    "facts without a stage": (INFO, lambda path: path.write_text('{"step": 1}')),
    "facts that are no text": (INFO, lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "no weights": (WEIGHTS, lambda path: path.unlink()),
    "weights cut short": (WEIGHTS, _truncate),
    "weights that are none": (WEIGHTS, lambda path: path.write_bytes(b"PK\x03\x04 a pickle")),
    "empty weights": (WEIGHTS, lambda path: path.write_bytes(b"")),
    "a layer missing": (WEIGHTS, _drop_tensor),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line(folder: Path, damage: str) -> None:
    name, harm = DAMAGES[damage]
    harm(folder / name)
    with pytest.raises(InputError) as caught:
        load_network(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message


def test_a_checkpoint_of_a_wrong_recipe_names_the_key(folder: Path) -> None:
    content = json.loads((folder / INFO).read_text(encoding="utf-8"))
    content["recipe"]["preste"] = 1
    (folder / INFO).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(Exception, match="did you mean preset") as caught:
        load_network(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_an_output_error(
    tmp_path: Path, network: Darcnn, info: CheckpointInfo
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        save_checkpoint(tmp_path / "file" / "run", network, info)


def test_figures_are_added_to_what_the_checkpoint_says_of_itself(folder: Path, info: CheckpointInfo) -> None:
    record_figures(folder, "set/val", {"all, mean": {"aji": 0.25}})
    facts = read_info(folder)
    assert facts.figures == {"aji": 0.5, "set/val": {"all, mean": {"aji": 0.25}}}
    assert (facts.stage, facts.step, facts.recipe, facts.state) == (
        info.stage,
        info.step,
        info.recipe,
        info.state,
    )
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, INFO}


def test_figures_of_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no readable checkpoint"):
        record_figures(tmp_path, "set/val", {})


def test_an_interruption_between_the_two_files_does_not_take_new_weights_for_old_ones(
    tmp_path: Path, network: Darcnn, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, network, CheckpointInfo("adapt", 100, False, recipe, state={"best": 2.0}))

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("darcnn.training.checkpoint._write_info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, network, CheckpointInfo("adapt", 200, True, recipe, state={"best": 1.0}))
    facts = read_info(tmp_path)
    assert (facts.step, facts.complete, facts.state) == (200, True, {"best": 1.0})


def test_moments_come_back_to_the_device_and_layout_of_their_parameters(
    tmp_path: Path, network: Darcnn, info: CheckpointInfo
) -> None:
    save_checkpoint(tmp_path, network, info, stepped_optimizer(network))
    for device in ("cpu", "meta"):  # meta stands for a GPU
        loaded = load_network(tmp_path)[0].to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(loaded.select_trainable(*learning_parts(loaded, "source")), lr=1e-3)
        load_optimizer(tmp_path, loaded, optimizer)
        assert len(optimizer.state) > 0
        for parameter, moments in optimizer.state.items():
            assert moments["step"].device.type == "cpu"
            for name in ("exp_avg", "exp_avg_sq"):
                assert moments[name].device == parameter.device
                assert moments[name].stride() == parameter.stride()
