"""Compiles the two graphs of a bundle with TensorRT, or with TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.cuda import gpu_name
from darcnn.runtime.engines.engine_cache import EngineFacts, engine_folder, timing_cache_path, write_engine
from darcnn.runtime.engines.graphs import OUTPUTS, first_line
from darcnn.runtime.errors import BundleError, DeviceError, UsageError
from darcnn.runtime.sinks.atomic import atomic_file, translated

__all__ = ["BACKENDS", "BuildOptions", "build_engine", "build_plans", "load_backend"]

BACKENDS: Mapping[str, str] = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
}  # name -> its Python module

_MIB = 1 << 20

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a user may choose when engines are built. The precision is that of the graphs."""

    backend: str  # one of BACKENDS
    targets: tuple[str, ...] = ()  # "sm86", "sm89": GPUs to compile for; none: the one in this machine
    workspace_mib: int | None = None  # the most scratch memory a layer may take; None: what the GPU has
    is_version_compatible: bool = False  # TensorRT only: later versions of the same major run the engine


def load_backend(backend: str) -> Any:
    """Return the Python module of `backend`.

    Raises:
        UsageError: there is no such backend.
        DeviceError: it is not installed.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"no backend {backend!r}", where="--backend", fix=f"use one of {', '.join(BACKENDS)}"
        )
    try:
        return importlib.import_module(BACKENDS[backend])
    except ImportError as err:
        raise DeviceError(
            f"{backend} is not installed ({err})",
            where="--backend",
            fix=f"run `pip install 'darcnn[{backend}]'`",
        ) from err


def build_engine(
    bundle: Bundle,
    options: BuildOptions,
    *,
    out: Path | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Path:
    """Compile both graphs of `bundle` into the user's cache, or into the folder `out`; return the folder.

    Raises:
        DeviceError: the backend is not installed, or needs a GPU that is not there.
        UsageError: a target is unknown, or the backend compiles for the machine's own GPU only.
        BundleError: a graph cannot be compiled.
        OutputError: the engine cannot be written; nothing is left behind.
    """
    version: str = load_backend(options.backend).__version__
    sizes = bundle.manifest.input
    is_built_on_gpu = options.backend == "tensorrt"
    facts = EngineFacts(
        bundle_name=bundle.manifest.name,
        bundle_sha256=bundle.sha256,
        backend=options.backend,
        version=version,
        targets=tuple(target.lower() for target in options.targets),
        device=gpu_name() if is_built_on_gpu else None,
        batch=sizes.batch,
        tile_px=sizes.tile_px,
        is_version_compatible=options.is_version_compatible,
        precision=bundle.precision,
    )
    timings = timing_cache_path(options.backend, version, facts.device or "")
    known = timings.read_bytes() if is_built_on_gpu and timings.is_file() else b""
    plans, known = build_plans(bundle, options, timing_cache=known, progress=progress)
    folder = engine_folder(facts) if out is None else out
    write_engine(folder, facts, plans)
    if is_built_on_gpu:
        with translated(timings):
            timings.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(timings) as file:
                file.write(known)
    return folder


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector away meanwhile.

    TensorRT calls our logger with a lock held. A collection in there may free the builder of a build that
    failed, out of the traceback of its error, and the builder's end waits for that very lock.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collection()
def build_plans(
    bundle: Bundle,
    options: BuildOptions,
    *,
    timing_cache: bytes = b"",
    progress: Progress = lambda phase, done, total: None,
) -> tuple[dict[str, bytes], bytes]:
    """Return the compiled plan of each graph, and TensorRT's timing cache to be given next time.

    Shapes are static, so that the one optimisation profile is the graph itself.

    Args:
        bundle: the model.
        options: for what and how.
        timing_cache: what an earlier build with the same version on the same GPU returned; TensorRT-RTX,
            which times nothing, keeps none.
        progress: told how far a graph's compilation is.
    Raises:
        DeviceError: the backend is not installed, or needs a GPU that is not there.
        UsageError: a target is unknown, or the backend compiles for the machine's own GPU only.
        BundleError: a graph cannot be compiled.
    """
    trt = load_backend(options.backend)
    logger = _make_logger(trt)
    plans: dict[str, bytes] = {}
    for graph in OUTPUTS:
        builder = trt.Builder(logger)
        if builder is None:
            raise DeviceError(
                f"{options.backend} does not start ({logger.last})",
                where="--backend",
                fix="build on a machine with an NVIDIA GPU and driver, or pass --backend tensorrt-rtx",
            )
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse(bundle.read(f"{graph}.onnx")):
            raise _refused(
                bundle, graph, trt, parser.get_error(0).desc() if parser.num_errors else logger.last
            )
        config = builder.create_builder_config()
        _configure(trt, config, options)
        cache = None
        if options.backend == "tensorrt":
            cache = config.create_timing_cache(timing_cache)
            config.set_timing_cache(cache, ignore_mismatch=False)
        config.progress_monitor = _make_monitor(trt, graph, progress)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _refused(bundle, graph, trt, logger.last)
        plans[graph] = bytes(plan)
        if cache is not None:
            timing_cache = bytes(cache.serialize())
    return plans, timing_cache


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if options.is_version_compatible:
        if options.backend != "tensorrt":
            raise UsageError(
                "engines of TensorRT-RTX fit the version that built them only",
                where="--version-compatible",
                fix="leave it out",
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if not options.targets:
        return
    if options.backend != "tensorrt-rtx":
        raise UsageError(
            "TensorRT compiles for the GPU in this machine",
            where="--target",
            fix="leave it out, or pass --backend tensorrt-rtx",
        )
    config.num_compute_capabilities = len(options.targets)
    for index, target in enumerate(options.targets):
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        if capability is None or not target.lower().startswith("sm"):
            known = (name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
            raise UsageError(f"no target {target!r}", where="--target", fix=f"use some of {', '.join(known)}")
        config.set_compute_capability(capability, index)


def _make_logger(trt: Any) -> Any:
    """Return a logger that prints nothing and remembers the last error, for our one line."""

    class _Logger(trt.ILogger):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "it gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:  # the lower, the worse
                self.last = first_line(message)

    return _Logger()


def _make_monitor(trt: Any, graph: str, progress: Progress) -> Any:
    """Return what TensorRT tells of its progress; only whole phases at the top are passed on."""

    class _Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings are untyped
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.totals:
                progress(f"{graph}: {phase_name}", step + 1, self.totals[phase_name])
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return _Monitor()


def _refused(bundle: Bundle, graph: str, trt: Any, reason: str) -> BundleError:
    return BundleError(
        f"{trt.__name__} {trt.__version__} cannot compile {graph}.onnx ({reason})",
        where=bundle.path,
        fix="try another version of it, or run the model with --backend onnxruntime",
    )
