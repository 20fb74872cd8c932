"""Which engine runs a model on this machine, and why not another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

import onnxruntime

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.cores import has_amx
from darcnn.runtime.engines.cuda import gpu_name
from darcnn.runtime.engines.onnxruntime import DEVICES, OnnxRuntimeEngine
from darcnn.runtime.engines.openvino import OpenVinoEngine, computes_bfloat16
from darcnn.runtime.engines.protocol import Engine
from darcnn.runtime.engines.tensorrt import open_engine_in, open_tensorrt
from darcnn.runtime.engines.tensorrt_build import BACKENDS as TENSORRT
from darcnn.runtime.engines.tensorrt_build import load_backend
from darcnn.runtime.errors import DeviceError, UsageError
from darcnn.runtime.options import BACKENDS

__all__ = ["examine_machine", "open_engine"]

_OPENVINO = ("openvino", "openvino-bf16")


def open_engine(
    bundle: Bundle,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int | None = None,
    tell: Callable[[str], None] = lambda words: None,
    engine: Path | None = None,
    precision: str | None = None,
) -> Engine:
    """Return the engine that is to run `bundle`.

    "auto" takes a compiled TensorRT engine where one fits the GPU, else ONNX Runtime: on a GPU where it
    finds one, else on the CPU. OpenVINO, an extra that takes a second longer to load, is taken when asked
    for.

    Args:
        bundle: the model.
        device: "auto", "cpu" or "cuda".
        backend: one of `darcnn.runtime.options.BACKENDS`.
        threads: that compute on a CPU; None: one a core that this process may use.
        tell: is told in a line each what runs, and why what would be faster does not.
        engine: the folder of the compiled engine to run; None: of those in the user's cache one that fits.
        precision: of the layers of such a one from the cache, "fp16" say; None: any.
    Raises:
        UsageError: no such device or backend, or the backend does not run on the device, or not the engine.
        DeviceError: what was asked for does not serve.
        BundleError: the graphs do not load.
    """
    _check_choice(device, backend, engine)
    opened = _open(bundle, device, backend, threads, tell, engine, precision)
    tell(f"runs on {opened.spec.name}")
    return opened


def _check_choice(device: str, backend: str, engine: Path | None) -> None:
    if device not in DEVICES:
        raise UsageError(f"no device {device!r}", where="--device", fix=f"choose one of {', '.join(DEVICES)}")
    if backend not in BACKENDS:
        raise UsageError(
            f"no backend {backend!r}", where="--backend", fix=f"choose one of {', '.join(BACKENDS)}"
        )
    if (backend in TENSORRT and device == "cpu") or (backend in _OPENVINO and device == "cuda"):
        raise UsageError(f"{backend} does not run on {device}", where="--backend", fix="leave out --device")
    if engine is not None and backend not in ("auto", *TENSORRT):
        raise UsageError(
            f"is for {' and '.join(TENSORRT)}, not for {backend}", where="--engine", fix="leave out --backend"
        )
    if engine is not None and device == "cpu":
        raise UsageError("a compiled engine does not run on cpu", where="--engine", fix="leave out --device")


def _open(
    bundle: Bundle,
    device: str,
    backend: str,
    threads: int | None,
    tell: Callable[[str], None],
    engine: Path | None,
    precision: str | None,
) -> Engine:
    if engine is not None:
        return open_engine_in(engine, bundle, backend)
    if backend in TENSORRT:
        return open_tensorrt(bundle, backend, precision=precision)
    if backend in _OPENVINO:
        return OpenVinoEngine(bundle, threads=threads, bfloat16=backend == "openvino-bf16")
    if backend == "auto" and device != "cpu":
        for name, module in TENSORRT.items():
            if util.find_spec(module) is not None:
                try:
                    return open_tensorrt(bundle, name, precision=precision)
                except DeviceError as err:
                    tell(f"not on {name}: {err}")
    opened = OnnxRuntimeEngine(bundle, device=device, threads=threads, tell=tell)
    if backend == "auto" and opened.spec.name.endswith("CPUExecutionProvider"):
        if bundle.precision == "int8":
            tell("OpenVINO is faster in int8: --backend openvino")
        elif has_amx():
            tell("this CPU is about twice as fast in bfloat16, and finds as much: --backend openvino-bf16")
    return opened


def examine_machine() -> Iterator[str]:
    """Yield what this machine offers, a line each; nothing is loaded onto a GPU."""
    try:
        yield f"GPU            {gpu_name()}"
    except DeviceError as err:
        yield f"GPU            none: {err}"
    yield f"onnxruntime    {onnxruntime.__version__}: {', '.join(onnxruntime.get_available_providers())}"
    faster = ", with --backend openvino-bf16 about twice as fast" if computes_bfloat16() else ""
    yield f"openvino       {_installed('openvino')}{faster}"
    for name in TENSORRT:
        try:
            yield f"{name:14} {load_backend(name).__version__}"
        except DeviceError as err:
            yield f"{name:14} {err}"


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed; run `pip install 'darcnn[{package}]'`"
