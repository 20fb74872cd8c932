"""All stages of a training with tensors that say they are on a GPU, and whose values are the host's.

    python pretend_gpu.py RECIPE.json DATA OUT

As on a GPU, tensors of both places do not mix, but where PyTorch allows it, and none of a GPU becomes a NumPy
array. What it cannot show: bfloat16, speed, memory, and what only CUDA's own kernels do.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
# PyTorch's own exceptions: copies between places, and tensors of a GPU indexed by tensors of the host
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put", "aten::index_put_"}


class Module:
    """What PyTorch asks of the device's module."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def _is_in_bad_fork(self) -> bool:
        return False


class OnGpu(torch.Tensor):
    """A tensor on the device; `held` has its values."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        tensor.held = held
        return tensor

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor of a GPU is no NumPy array")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Every operation of a thread goes through `compute`."""

    def __enter__(self) -> Pretending:
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is a copy, and seen
        super().__enter__()
        return self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(function, args, kwargs or {})


def held_by(value: Any) -> Any:
    return value.held if isinstance(value, OnGpu) else value


def compute(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run `function` on the host; its result is where PyTorch would put it."""
    name = function._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim() > 0]
    first_is_on_host = bool(tensors) and not isinstance(tensors[0], OnGpu)
    if on_gpu and on_host and (name not in MAY_MIX or ("index" in name and first_is_on_host)):
        raise RuntimeError(f"{name}: some tensors are on the GPU, some are not")
    device = kwargs.get("device")
    inner = dict(kwargs) if device is None else dict(kwargs) | {"device": torch.device("cpu")}
    result = function(*tree_map(held_by, args), **tree_map(held_by, inner))
    if function._schema.is_mutable:  # in place, or into `out`
        return args[0] if "out" not in kwargs else kwargs["out"]
    if on_gpu if device is None else torch.device(device).type == NAME:
        return tree_map(lambda one: OnGpu(one) if type(one) is torch.Tensor else one, result)
    return result


def pretend() -> None:
    """Have a device called NAME, for all threads that this process begins."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    write, run = safetensors.torch.save_file, threading.Thread.run

    def save_file(tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> None:
        write({name: held_by(tensor).clone() for name, tensor in tensors.items()}, *args, **kwargs)

    def run_pretending(thread: threading.Thread) -> None:
        with Pretending():
            run(thread)

    safetensors.torch.save_file = save_file
    threading.Thread.run = run_pretending  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    from darcnn.training.config import recipe_from_table
    from darcnn.training.run import Run
    from darcnn.training.stages import run_all

    path, data, out = map(Path, sys.argv[1:])
    recipe = recipe_from_table(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    with Pretending():
        run_all(Run(recipe, data, out, device=torch.device(NAME, 0)))
