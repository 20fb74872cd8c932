"""The source stage that comes with the package: a `lite` network that learned objects from photographs.

It spares a user the photographs and the hours. `python -m darcnn.training.model.photographs CHECKPOINT`
writes it again from the checkpoint of a source stage.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click
import torch
from safetensors.torch import load, save_file

from darcnn.runtime.errors import InputError
from darcnn.training.model.network import Darcnn

__all__ = ["load_photographs", "read_photographs", "save_photographs"]

_FILE = "photographs-lite.safetensors"  # beside this module
_PARTS = ("trunk", "shared_encoder", "proposer", "source_heads")  # what a source stage leaves behind


def read_photographs() -> bytes:
    """Return the content of the file that comes with the package."""
    return resources.files("darcnn.training.model").joinpath(_FILE).read_bytes()


def load_photographs(network: Darcnn) -> None:
    """Start a `lite` network from the source stage of examples/recipes/nuclei-he.toml.

    Raises:
        InputError: the file that comes with the package is another version's.
    """
    state = {name: tensor.float() for name, tensor in load(read_photographs()).items()}
    shapes = {name: tensor.shape for name, tensor in _source_state(network).items()}
    if {name: tensor.shape for name, tensor in state.items()} != shapes:
        raise InputError("has other layers than preset lite", where=_FILE, fix="install darcnn again")
    network.load_state_dict(state, strict=False)
    network.start_adaptation()


def save_photographs(network: Darcnn, path: Path) -> None:
    """Write what the source stage of `network` learned, and its trunk, in half precision."""
    state = {name: tensor.half().contiguous() for name, tensor in _source_state(network).items()}
    save_file(state, path)


def _source_state(network: Darcnn) -> dict[str, torch.Tensor]:
    return {name: t for name, t in network.state_dict().items() if name.partition(".")[0] in _PARTS}


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
def _main(checkpoint: Path) -> None:
    """Write the file of the package from the CHECKPOINT folder of a source stage."""
    from darcnn.training.checkpoint import load_network

    network, _ = load_network(checkpoint)
    save_photographs(network, Path(__file__).resolve().with_name(_FILE))


if __name__ == "__main__":
    _main()
