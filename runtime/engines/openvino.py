"""Runs the two graphs of a bundle with OpenVINO, on a CPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, cast

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
from darcnn.runtime.engines.protocol import Detections, EngineSpec
from darcnn.runtime.errors import BundleError, DeviceError

__all__ = ["OpenVinoEngine"]

_DEVICE = "CPU"
# float32 throughout: on CPUs with bfloat16 OpenVINO would take that unasked, and scores would differ
_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}


class OpenVinoEngine:
    """An `Engine` on OpenVINO; all results are the caller's, the atlas lies on the host."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Compile both graphs, some seconds.

        Args:
            bundle: the model; not needed afterwards.
            threads: None: one a core that this process may use.
        Raises:
            DeviceError: OpenVINO is not installed.
            BundleError: OpenVINO cannot compile a graph, or its tensors are not those of the manifest.
        """
        openvino = _import_openvino()
        core = openvino.Core()
        threads = threads or core_limit()
        options = _OPTIONS if threads is None else _OPTIONS | {"INFERENCE_NUM_THREADS": str(threads)}
        self._requests: dict[str, Any] = {}
        for graph in OUTPUTS:
            try:
                model = core.compile_model(core.read_model(bundle.read(f"{graph}.onnx")), _DEVICE, options)
            except RuntimeError as err:
                raise BundleError(
                    f"OpenVINO {openvino.__version__} cannot compile {graph}.onnx ({first_line(err)})",
                    where=bundle.path,
                    fix="upgrade with `pip install --upgrade openvino`, or pass --backend onnxruntime",
                ) from err
            found = {
                port.get_any_name(): (
                    str(np.dtype(port.element_type.to_dtype())),
                    tuple(int(n) for n in port.shape),
                )
                for port in (*model.inputs, *model.outputs)
            }
            check_signature(bundle, graph, found)
            self._requests[graph] = model.create_infer_request()
        self._spec = make_spec(bundle, f"openvino {openvino.__version__.split('-')[0]} {_DEVICE}")

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
        self._requests = {}

    def _run(self, graph: str, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if not self._requests:
            raise ValueError("the engine is closed")
        try:
            # its inputs are read in place, its outputs copied: they stay when the engine goes on
            found = self._requests[graph].infer(feeds, share_inputs=True, share_outputs=False)
        except RuntimeError as err:
            raise DeviceError(
                f"OpenVINO failed on the {graph} graph ({first_line(err)})",
                where=_DEVICE,
                fix=advise_memory(self._spec, "free memory, or pass --backend onnxruntime"),
            ) from err
        return {name: found[name] for name in OUTPUTS[graph]}


def _import_openvino() -> Any:
    """Return the package, without what tells its maker of the import (docs/runtime.md).

    `openvino_telemetry` has no switch in the environment; where it is not installed, OpenVINO does without.
    """
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    name = "openvino_telemetry"
    is_hidden = modules.setdefault(name, None) is None  # importing it raises ImportError
    try:
        import openvino
    except ImportError as err:
        raise DeviceError(
            "OpenVINO is not installed",
            where="--backend openvino",
            fix="run `pip install 'darcnn[openvino]'`",
        ) from err
    finally:
        if is_hidden:
            del modules[name]
    return openvino
