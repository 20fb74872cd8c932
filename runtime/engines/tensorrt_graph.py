"""One compiled graph on an NVIDIA GPU: its context, its stream and its buffers.

None of this ever ran on a GPU.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

from numpy.typing import NDArray

from darcnn.runtime.engines.cuda import (
    DeviceBuffer,
    PinnedBuffer,
    Stream,
    copy_in,
    copy_on_gpu,
    copy_out,
    release_recorded,
)
from darcnn.runtime.engines.engine_cache import CompiledEngine
from darcnn.runtime.engines.graphs import INPUTS, OUTPUTS
from darcnn.runtime.engines.tensorrt_build import DTYPES
from darcnn.runtime.engines.uploads import UploadedTiles
from darcnn.runtime.errors import DeviceError

__all__ = ["REBUILD", "LoadedGraph"]

_RUNS_BEFORE_CAPTURE = 2  # the first run allocates, which cannot be recorded
REBUILD = "build it again on this machine with `darcnn-export engine`"


class LoadedGraph:
    """One plan on the GPU, with its buffers."""

    def __init__(
        self,
        runtime: Any,
        name: str,
        compiled: CompiledEngine,
        shared: dict[str, DeviceBuffer],
        advice: str,
    ) -> None:
        engine = runtime.deserialize_cuda_engine(compiled.plans[name])
        if engine is None:
            raise DeviceError(
                f"the GPU does not load {name}.plan",
                where=compiled.folder,
                fix=REBUILD,
            )
        self.name, self._advice = name, advice
        self.signature = {
            tensor: (
                DTYPES.get(engine.get_tensor_dtype(tensor).name, "unknown"),
                tuple(int(n) for n in engine.get_tensor_shape(tensor)),
            )
            for tensor in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        }
        self._engine = engine  # the context does not hold it
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            self._engine = engine = None  # the error's frames must not keep it
            raise DeviceError(f"no memory on it to run the {name} graph", where="GPU", fix=advice)
        self._n_runs, self._recorded = 0, None
        self._own: dict[str, DeviceBuffer] = {}
        self._pinned: dict[str, PinnedBuffer] = {}
        self._stream = Stream()
        try:
            self._allocate(shared)
        except BaseException:
            self.close()
            raise

    def _allocate(self, shared: dict[str, DeviceBuffer]) -> None:
        for tensor, (kind, shape) in self.signature.items():
            if tensor not in shared:
                self._own[tensor] = DeviceBuffer(shape, kind)
        self.buffers = {**self._own, **shared}
        for tensor, buffer in self._own.items():
            if tensor != "atlas":
                self._pinned[tensor] = PinnedBuffer(buffer.shape, str(buffer.dtype))
        for tensor, buffer in self.buffers.items():
            self._context.set_tensor_address(tensor, buffer.address)

    def run(self, inputs: dict[str, Any]) -> dict[str, NDArray[Any]]:
        """Return the outputs but for the atlas, which stays on the GPU; the arrays are the caller's."""
        outputs = [tensor for tensor in OUTPUTS[self.name] if tensor != "atlas"]
        try:
            for tensor in INPUTS[self.name]:
                if tensor in inputs:
                    self._take(tensor, inputs[tensor])
            self._compute()
            for tensor in outputs:
                copy_out(self._pinned[tensor].array, self.buffers[tensor], self._stream)
        except BaseException:
            with suppress(DeviceError):  # what was queued may still read the inputs
                self._stream.wait()
            raise
        self._stream.wait()
        return {tensor: self._pinned[tensor].array.copy() for tensor in outputs}

    def _take(self, tensor: str, source: Any) -> None:
        if isinstance(source, UploadedTiles):
            self._stream.wait_for(source.is_there)
            copy_on_gpu(self.buffers[tensor], source.buffer, self._stream)
        else:
            copy_in(self.buffers[tensor], source, self._pinned[tensor].array, self._stream)

    def _compute(self) -> None:
        self._n_runs += 1
        if self._n_runs == _RUNS_BEFORE_CAPTURE + 1:  # once: where it fails now it would again
            self._stream.wait()
            self._record()
        if self._recorded is not None:
            self._stream.launch(self._recorded)
        else:
            self._enqueue()

    def _record(self) -> None:
        """Record the graph's kernels; where that fails it is run without, from then on."""
        with suppress(DeviceError):
            self._stream.begin_capture()
            try:
                self._enqueue()
            except BaseException:
                with suppress(DeviceError):  # the stream must not stay in recording
                    release_recorded(self._stream.end_capture())
                raise
            self._recorded = self._stream.end_capture()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise DeviceError(
                f"TensorRT failed on the {self.name} graph",
                where="GPU",
                fix=self._advice,
            )

    def close(self) -> None:
        recorded, self._recorded = self._recorded, None
        own, self._own = self._own, {}
        pinned, self._pinned = self._pinned, {}
        self._context = self._engine = None
        with ExitStack() as releases:  # all of them, whatever becomes of one
            for buffer in own.values():
                releases.callback(buffer.close)
            for array in pinned.values():
                releases.callback(array.close)
            releases.callback(self._stream.close)
            if recorded is not None:
                releases.callback(release_recorded, recorded)
