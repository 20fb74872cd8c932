"""Runs the two graphs of a bundle with OpenVINO, on a CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.cores import core_limit
from darcnn.runtime.engines.graphs import (
    OUTPUTS,
    advise_memory,
    check_signature,
    check_tiles,
    first_line,
    make_spec,
    run_masks,
)
from darcnn.runtime.engines.openvino_parts import Part, cut_for_bfloat16
from darcnn.runtime.engines.openvino_pooling import fuse_pooling
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import BundleError, DeviceError, UsageError

__all__ = ["OpenVinoEngine", "computes_bfloat16"]

_DEVICE = "CPU"
_OPTIONS = {"PERFORMANCE_HINT": "LATENCY"}


class _Step(NamedTuple):
    """A compiled part of a graph."""

    request: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OpenVinoEngine:
    """An `Engine` on OpenVINO; all results are the caller's, the atlas lies on the host."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, bfloat16: bool = False) -> None:
        """Compile both graphs, some seconds.

        Args:
            bundle: the model; not needed afterwards.
            threads: None: one a core that this process may use.
            bfloat16: what handles features computes in it, which is faster; all else stays in float32.
        Raises:
            UsageError: bfloat16 is asked of a bundle in another precision.
            DeviceError: OpenVINO is not installed, is too old, or the CPU does not compute in bfloat16.
            BundleError: OpenVINO cannot compile a graph, or its tensors are not those of the manifest.
        """
        openvino = _import_openvino()
        core = openvino.Core()
        if bfloat16:
            _check_bfloat16(core, bundle)
        threads = threads or core_limit()
        options = _OPTIONS if threads is None else _OPTIONS | {"INFERENCE_NUM_THREADS": str(threads)}
        self._steps: dict[str, list[_Step]] = {}
        for graph in OUTPUTS:
            try:
                model = core.read_model(bundle.read(f"{graph}.onnx"))
                inputs, outputs = _signature(model.inputs), _signature(model.outputs)
                check_signature(bundle, graph, inputs | outputs)
                fuse_pooling(model)
                whole = Part(model, tuple(inputs), tuple(outputs))
                parts = cut_for_bfloat16(model) if bfloat16 else [whole]
                self._steps[graph] = [_compile(core, part, options) for part in parts]
            except RuntimeError as err:
                raise BundleError(
                    f"OpenVINO {openvino.__version__} cannot compile {graph}.onnx ({first_line(err)})",
                    where=bundle.path,
                    fix="upgrade with `pip install --upgrade openvino`, or pass --backend onnxruntime",
                ) from err
        name = f"openvino {openvino.__version__.split('-')[0]} {_DEVICE}"
        self._spec = make_spec(bundle, f"{name} bfloat16" if bfloat16 else name)

    @property
    def spec(self) -> EngineSpec:
        """The static sizes."""
        return self._spec

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        """Find objects on `tiles`, (B, S, S, C) uint8 with exactly B = spec.batch.

        Raises:
            ShapeError: `tiles` has another shape or type.
            DeviceError: memory gave out.
        """
        check_tiles(self._spec, tiles)
        found = self._run("detect", {"tile": np.ascontiguousarray(tiles)})
        return Detections(
            boxes=found["boxes"],
            scores=found["scores"],
            converged=found["converged"].astype(np.bool_),
            atlas=found["atlas"],
        )

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return (M, m, m) mask probabilities for `boxes` (M, 4) px on tiles `tile_index` (M,); M is free.

        Raises:
            ShapeError: the arrays do not fit each other, or an index names no tile of the batch.
            DeviceError: memory gave out.
        """
        atlas = {"atlas": detections.atlas}
        return run_masks(
            self._spec, boxes, tile_index, lambda feeds: self._run("mask", atlas | feeds)["masks"]
        )

    def close(self) -> None:
        """Release both graphs; closing twice is allowed."""
        self._steps = {}

    def _run(self, graph: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if not self._steps:
            raise ValueError("the engine is closed")
        values = dict(feeds)
        try:
            for request, inputs, outputs in self._steps[graph]:
                # inputs are read in place; what is given away is copied: it stays when the engine goes on
                is_given_away = not set(outputs).isdisjoint(OUTPUTS[graph])
                given = {place: values[name] for place, name in enumerate(inputs)}
                found = request.infer(given, share_inputs=True, share_outputs=not is_given_away)
                values |= {name: found[place] for place, name in enumerate(outputs)}
        except RuntimeError as err:
            raise DeviceError(
                f"OpenVINO failed on the {graph} graph ({first_line(err)})",
                where=_DEVICE,
                fix=advise_memory(self._spec, "free memory, or pass --backend onnxruntime"),
            ) from err
        return {name: values[name] for name in OUTPUTS[graph]}


def computes_bfloat16() -> bool:
    """Tell whether OpenVINO is installed and this CPU computes in bfloat16."""
    try:
        return _has_bfloat16(_import_openvino().Core())
    except DeviceError:
        return False


def _has_bfloat16(core: Any) -> bool:
    return "BF16" in core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")


def _check_bfloat16(core: Any, bundle: Bundle) -> None:
    where, fix = "--backend openvino-bf16", "pass --backend openvino"
    if bundle.precision != "fp32":
        raise UsageError(f"{bundle.path.name} is in {bundle.precision} already", where=where, fix=fix)
    if not _has_bfloat16(core):
        raise DeviceError("this CPU does not compute in bfloat16", where=where, fix=fix)


def _compile(core: Any, part: Part, options: dict[str, str]) -> _Step:
    # float32 where nothing else is asked for: OpenVINO would take bfloat16 unasked where a CPU has it
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if part.in_bfloat16 else "f32"}
    compiled = core.compile_model(part.model, _DEVICE, options | precision)
    return _Step(compiled.create_infer_request(), part.inputs, part.outputs)


def _signature(ports: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        port.get_any_name(): (str(np.dtype(port.element_type.to_dtype())), tuple(int(n) for n in port.shape))
        for port in ports
    }


def _import_openvino() -> Any:
    """Return the package, without what tells its maker of the import (docs/runtime.md).

    `openvino_telemetry` has no switch in the environment; where it is not installed, OpenVINO does without.
    """
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    name = "openvino_telemetry"
    is_hidden = modules.setdefault(name, None) is None  # importing it raises ImportError
    try:
        import openvino
        import openvino.opset8  # which older ones have elsewhere
    except ImportError as err:
        raise DeviceError(
            "OpenVINO 2025.0 or later is not installed",
            where="--backend openvino",
            fix="run `pip install 'darcnn[openvino]'`",
        ) from err
    finally:
        if is_hidden:
            del modules[name]
    return openvino
