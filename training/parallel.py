"""Several processes, one batch: what `torchrun` starts. With one process everything here does nothing.

A recipe's batch is that of all processes together, so that the result does not depend on their number:
each takes its share of the images, sums of losses are divided by counts of the whole batch, the losses
that compare images see all of them, and gradients are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from darcnn.runtime.cores import usable_cores
from darcnn.runtime.errors import UsageError

__all__ = [
    "average_gradients",
    "gather",
    "is_first",
    "mean_count",
    "mean_over_processes",
    "processes",
    "share_of",
    "wait_for_all",
]


_PATIENCE = timedelta(days=1)  # the first process labels images and draws while the others wait for it
_LEAST_COUNT = 1e-3  # below the mean over any number of processes of a count above 0


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that `torchrun` started, if it did: NCCL between GPUs, gloo between CPUs."""
    # OpenMP knows the cores that the process is bound to, but not the share of a container
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def is_first() -> bool:
    """Tell whether this process is the one that writes files and shows progress."""
    return _rank() == 0


def share_of(batch: int) -> range:
    """Return which images of a batch are this process's.

    Raises:
        UsageError: the batch cannot be shared evenly.
    """
    n = _count()
    if batch % n:
        raise UsageError(
            f"a batch of {batch} cannot be shared by {n} processes",
            where="torchrun",
            fix="make every batch of the recipe a multiple of --nproc-per-node",
        )
    return range(_rank() * batch // n, (_rank() + 1) * batch // n)


def mean_over_processes(value: Tensor) -> Tensor:
    """Return the mean of `value` over the processes, without gradient.

    A sum of losses divided by the mean of the processes' counts, with gradients averaged, is the sum over
    the whole batch divided by its count.
    """
    if _count() == 1:
        return value.detach()
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / _count()


def mean_count(n: Tensor) -> Tensor:
    """Return the mean of the count `n` over the processes, to divide a sum by: never 0."""
    return mean_over_processes(n.float()).clamp_min(_LEAST_COUNT)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        parts = [torch.empty_like(value) for _ in range(_count())]
        distributed.all_gather(parts, value)
        ctx.rows = len(value)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # others may hold the gradient
        distributed.all_reduce(total)
        return total[_rank() * ctx.rows : (_rank() + 1) * ctx.rows]


def gather(value: Tensor) -> Tensor:
    """Return the rows of all processes, (n * N, ...), in their order; each gets its gradient back.

    Args:
        value: (N, ...), as many rows in each process.
    """
    if _count() == 1:
        return value
    gathered: Tensor = _Gather.apply(value.contiguous())
    return gathered


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of the processes' gradients, in one message."""
    if _count() == 1:
        return
    learning = list(parameters)
    # a part that no image of this process reached has no gradient here, but may have one elsewhere
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning])
    reached = torch.tensor([float(p.grad is not None) for p in learning], device=flat.device)
    distributed.all_reduce(flat)
    distributed.all_reduce(reached)
    flat /= _count()
    for parameter, part, n in zip(
        learning, torch.split(flat, [p.numel() for p in learning]), reached.tolist(), strict=True
    ):
        parameter.grad = part.view_as(parameter).clone() if n else None


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _count() > 1:
        distributed.barrier()
