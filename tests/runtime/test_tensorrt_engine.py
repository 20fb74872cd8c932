"""Compiled engines on a GPU that is a fake: which one is taken, what is given back, what is said."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace

import numpy as np
import pytest

from darcnn.runtime.engines import cuda, engine_cache, tensorrt
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.engine_cache import read_engine, store_engine, write_engine
from darcnn.runtime.engines.protocol import UploadsTiles
from darcnn.runtime.engines.tensorrt import has_engine, open_engine_in, open_tensorrt
from darcnn.runtime.errors import DeviceError, ShapeError, UsageError
from darcnn.runtime.load import find_bundle, load, shipped_models

from .fake_gpu import FakeContext, FakeCudart, FakeEngine, FakeTensorRt, Status

RTX = "tensorrt-rtx"
PLANS = {"detect": b"detect", "mask": b"mask"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_cache, "_cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def use(monkeypatch, bundle):
    """Return what puts a fake GPU and a fake TensorRT in the place of the real ones."""

    def put(gpu=None, **options):
        gpu, trt = gpu or FakeCudart(), FakeTensorRt(bundle, **options)
        monkeypatch.setattr(cuda, "_cudart", lambda: gpu)
        monkeypatch.setattr(tensorrt, "load_backend", lambda backend: trt)
        return gpu, trt

    return put


@pytest.fixture
def opened(use, bundle, facts):
    """Return the fake GPU, and an engine on it."""
    gpu, _ = use()
    store_engine(facts, PLANS)
    return gpu, open_tensorrt(bundle, RTX)


def test_all_that_an_engine_holds_is_given_back(opened):
    gpu, engine = opened
    tiles = np.zeros((2, 8, 8, 3), np.uint8)
    for _ in range(4):  # recorded and launched as one from the third on
        found = engine.detect(tiles)
        engine.masks(found, np.float32([[0, 0, 8, 8]]), np.array([0]))
    kinds = [one[0] for one in gpu.held if isinstance(one, tuple)]
    assert sorted(kinds) == ["event"] * 3 + ["recorded"] * 2
    engine.close()
    engine.close()
    assert gpu.held == {}


def test_tiles_go_to_the_gpu_on_a_stream_of_their_own_while_it_computes(opened):
    gpu, engine = opened
    assert isinstance(engine, UploadsTiles)
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (2, 8, 8, 3), np.uint8) for _ in range(5)]
    on_gpu = engine._graphs["detect"].buffers["tile"]
    waiting = engine.upload(batches[0])
    for batch in [*batches[1:], None]:
        following = None if batch is None else engine.upload(batch)
        gpu.log.clear()
        engine.detect(waiting)
        (_, compute, event), copied = gpu.log[0], gpu.log[1]
        assert gpu.log[0][0] == "wait"  # before it is copied within the GPU
        assert event == waiting.is_there.handle
        assert copied == ("copy", compute, gpu.cudaMemcpyKind.cudaMemcpyDeviceToDevice)
        before = batches[-1] if batch is None else batches[[one is batch for one in batches].index(True) - 1]
        assert ctypes.string_at(on_gpu.address, on_gpu.n_bytes) == before.tobytes()
        waiting = following
    engine.close()
    assert gpu.held == {}


def test_an_upload_is_queued_on_another_stream_than_the_computation(opened):
    gpu, engine = opened
    uploaded = engine.upload(np.zeros((2, 8, 8, 3), np.uint8))
    (_, stream, kind), recorded = gpu.log[-2:]
    assert kind == gpu.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert recorded == ("record", stream, uploaded.is_there.handle)
    gpu.log.clear()
    engine.detect(uploaded)
    assert stream not in [one[1] for one in gpu.log]


def test_where_all_slots_are_taken_tiles_stay_on_the_host_until_one_is_free(opened):
    _, engine = opened
    tiles = np.full((2, 8, 8, 3), 7, np.uint8)
    held = [engine.upload(tiles) for _ in range(3)]
    assert not any(isinstance(one, np.ndarray) for one in held)
    assert engine.upload(tiles) is tiles
    del held[1]
    assert engine.upload(tiles) is not tiles
    with pytest.raises(ShapeError, match="not uint8"):
        engine.upload(tiles[:1])
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.upload(tiles)
    del held  # after the engine


@pytest.mark.parametrize("n_th", [1, 3, 5, 6, 8, 10])
def test_where_memory_gives_out_all_is_given_back(use, bundle, facts, n_th):
    gpu, _ = use(FakeCudart(fails_at_malloc=n_th))
    store_engine(facts, PLANS)
    with pytest.raises(DeviceError, match="free GPU memory, or choose another --backend"):
        open_tensorrt(bundle, RTX)
    assert gpu.held == {}


def test_a_second_graph_that_does_not_load_gives_back_the_first(use, bundle, facts):
    gpu, _ = use(refused={"mask"})
    store_engine(facts, PLANS)
    with pytest.raises(DeviceError, match=r"does not load mask\.plan"):
        open_tensorrt(bundle, RTX)
    assert gpu.held == {}


def test_a_context_that_cannot_be_made_is_said(use, bundle, facts):
    gpu, _ = use(has_contexts=False)
    store_engine(facts, PLANS)
    with pytest.raises(DeviceError, match="no memory on it to run the detect graph; free GPU memory"):
        open_tensorrt(bundle, RTX)
    assert gpu.held == {}


def test_the_next_engine_is_tried_where_one_does_not_load(use, bundle, facts):
    use(refused={"detect new"})
    store_engine(facts, PLANS)
    store_engine(replace(facts, precision="fp16"), {**PLANS, "detect": b"detect new"})
    assert "fp32" in open_tensorrt(bundle, RTX).spec.name


def test_only_an_engine_in_the_precision_asked_for_is_taken(use, bundle, facts):
    use()
    store_engine(facts, PLANS)
    assert has_engine(bundle, RTX)
    assert has_engine(bundle, RTX, precision="fp32")
    assert not has_engine(bundle, RTX, precision="fp16")
    with pytest.raises(DeviceError, match=r"computes in fp32, not in fp16; run .* --precision fp16`"):
        open_engine(bundle, backend=RTX, precision="fp16")
    store_engine(replace(facts, precision="fp16"), PLANS)
    assert "fp16" in open_engine(bundle, backend=RTX, precision="fp16").spec.name
    assert "fp32" in open_engine(bundle, backend=RTX, precision="fp32").spec.name


@pytest.mark.parametrize("is_compatible", [False, True])
def test_code_in_a_plan_runs_only_where_the_plan_is_version_compatible(use, bundle, facts, is_compatible):
    _, trt = use()
    store_engine(replace(facts, is_version_compatible=is_compatible), PLANS)
    open_tensorrt(bundle, RTX)
    assert [runtime.engine_host_code_allowed for runtime in trt.runtimes] == [is_compatible]


def test_an_engine_of_tensorrt_serves_the_kind_of_gpu_that_it_was_built_on(use, bundle, facts):
    gpu, _ = use(FakeCudart(name="NVIDIA A100", capability=(8, 0)))
    here = replace(facts, backend="tensorrt", targets=(), device=cuda.gpu_name())
    store_engine(replace(here, device=f"{here.device}1"), PLANS)  # of another driver
    assert has_engine(bundle, "tensorrt")
    gpu.properties.name = b"NVIDIA L4"
    with pytest.raises(DeviceError, match=r"was built on NVIDIA A100 sm80 .*, this GPU is NVIDIA L4 sm80"):
        open_tensorrt(bundle, "tensorrt")


def test_without_targets_an_engine_serves_sm80_and_later(use, bundle, facts):
    store_engine(replace(facts, targets=()), PLANS)
    use(FakeCudart(capability=(8, 9)))
    assert has_engine(bundle, RTX)
    use(FakeCudart(capability=(7, 5)))
    with pytest.raises(DeviceError, match=r"for sm80 and later.*--target sm75 --precision fp16`$"):
        open_tensorrt(bundle, RTX)


def test_the_command_that_builds_an_engine_can_be_pasted(use, bundle, tmp_path):
    use()
    path = tmp_path / "my models" / "it's.darcnn"
    with pytest.raises(DeviceError) as caught:
        open_tensorrt(replace(bundle, path=path), RTX)
    assert f"'{tmp_path}/my models/it'\"'\"'s.darcnn' --backend tensorrt-rtx`" in caught.value.fix
    shipped = find_bundle(shipped_models()[0])
    with pytest.raises(DeviceError, match=f"run `darcnn-export engine {shipped.manifest.name} --backend"):
        open_tensorrt(shipped, RTX)


def test_an_engine_in_a_folder_of_the_users_own_is_run(use, tiny_bundle, bundle, facts, tmp_path):
    use()
    write_engine(tmp_path / "mine", facts, PLANS)
    for backend in ("auto", RTX):
        with load(tiny_bundle, backend=backend, engine=tmp_path / "mine") as segmenter:
            assert segmenter.engine.spec.name == "tensorrt-rtx 1.7.1 fp32 sm86"
    with pytest.raises(
        UsageError, match="is an engine of tensorrt-rtx, not of tensorrt; leave out --backend"
    ):
        open_engine_in(tmp_path / "mine", bundle, "tensorrt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu"}, "--engine: a compiled engine does not run on cpu"),
        ({"backend": "openvino"}, "--engine: is for tensorrt and tensorrt-rtx, not for openvino"),
    ],
)
def test_an_engine_goes_with_no_other_backend(tiny_bundle, tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        load(tiny_bundle, engine=tmp_path, **options)


def test_an_engine_in_a_folder_that_does_not_fit_is_refused_with_the_reason(use, bundle, facts, tmp_path):
    use(version="1.8")
    write_engine(tmp_path / "mine", facts, PLANS)
    with pytest.raises(DeviceError, match=r"built by tensorrt-rtx 1\.7\.1, this is 1\.8"):
        open_engine(bundle, engine=tmp_path / "mine")
    with pytest.raises(DeviceError, match="no readable engine"):
        open_engine(bundle, engine=tmp_path / "none")


def test_advice_of_the_gpu_names_what_can_be_done(monkeypatch):
    gpu = FakeCudart()
    gpu.cudaGetDeviceCount = lambda: (gpu.cudaError_t.cudaSuccess, 0)
    monkeypatch.setattr(cuda, "_cudart", lambda: gpu)
    with pytest.raises(DeviceError, match="check the NVIDIA driver, or choose another --backend"):
        cuda.gpu_name()


@pytest.mark.parametrize(
    ("n_gpus", "chosen", "seen"),
    [(0, None, []), (2, None, ["0", "1"]), (2, "3,GPU-5", ["3", "GPU-5"]), (1, "2,-1,0", ["2"])],
)
def test_gpus_are_named_as_who_chose_them_did(monkeypatch, n_gpus, chosen, seen):
    gpu = FakeCudart()
    gpu.cudaGetDeviceCount = lambda: (gpu.cudaError_t.cudaSuccess, n_gpus)
    monkeypatch.setattr(cuda, "_cudart", lambda: gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert cuda.visible_gpus() == seen


def test_a_recording_that_fails_is_ended_and_not_tried_again(opened, monkeypatch):
    gpu, engine = opened
    tiles, log = np.zeros((2, 8, 8, 3), np.uint8), []
    for name in ("cudaStreamBeginCapture", "cudaStreamEndCapture"):
        plain = getattr(FakeCudart, name)
        monkeypatch.setattr(
            FakeCudart,
            name,
            lambda self, *rest, name=name, plain=plain: log.append(name) or plain(self, *rest),
        )
    for _ in range(2):
        engine.detect(tiles)
    with monkeypatch.context() as patch:
        patch.setattr(FakeContext, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(DeviceError, match="TensorRT failed on the detect graph"):
            engine.detect(tiles)
    for _ in range(3):
        engine.detect(tiles)
    assert log == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]
    engine.close()
    assert gpu.held == {}


@pytest.mark.parametrize("name", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_where_cuda_does_not_record_the_graph_runs_without(opened, monkeypatch, name):
    gpu, engine = opened
    calls = []

    def refuse(self, *rest):
        calls.append(name)
        return Status.cudaErrorMemoryAllocation, None

    monkeypatch.setattr(FakeCudart, name, refuse)
    for _ in range(6):
        engine.detect(np.zeros((2, 8, 8, 3), np.uint8))
    assert calls == [name]  # once
    engine.close()
    assert gpu.held == {}


class OnGpu:
    """An array on the fake GPU, as PyTorch (no stream) and CuPy (a stream) describe one."""

    def __init__(self, values, stream):
        self._values, self.shape, self.dtype = values, values.shape, values.dtype
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": "|u1",
            "data": (values.ctypes.data, False),
            "version": 3,
        } | ({} if stream is None else {"stream": stream})


@pytest.mark.parametrize(("stream", "waits"), [(None, True), (7, False)])
def test_what_fills_an_array_on_the_gpu_is_waited_for(opened, stream, waits):
    gpu, engine = opened
    tiles = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)
    engine.detect(OnGpu(tiles, stream))
    assert (("wait for all",) in gpu.log) == waits
    on_gpu = engine._graphs["detect"].buffers["tile"]
    assert ctypes.string_at(on_gpu.address, on_gpu.n_bytes) == tiles.tobytes()
    gpu.log.clear()
    assert np.array_equal(cuda.copy_to_host(OnGpu(tiles, stream).__cuda_array_interface__), tiles)
    assert (("wait for all",) in gpu.log) == waits
    engine.close()
    assert gpu.held == {}


def test_a_driver_that_is_too_old_is_one_line(use, bundle, facts):
    _, trt = use()
    store_engine(facts, PLANS)

    def refuse(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt.Runtime = refuse
    with pytest.raises(DeviceError, match="tensorrt-rtx does not start; check that the NVIDIA driver"):
        open_tensorrt(bundle, RTX)


def test_what_can_be_given_back_is_where_one_release_fails(opened, monkeypatch):
    gpu, engine = opened
    for _ in range(4):
        engine.detect(np.zeros((2, 8, 8, 3), np.uint8))
    monkeypatch.setattr(
        FakeCudart, "cudaGraphExecDestroy", lambda self, recorded: (Status.cudaErrorMemoryAllocation,)
    )
    with pytest.raises(DeviceError):
        engine.close()
    assert len(gpu.held) == 1  # the recording itself
    engine.close()


def test_an_engine_that_failed_does_not_stay_on_the_gpu(use, bundle, facts):
    use(FakeCudart(fails_at_malloc=3))
    store_engine(facts, PLANS)
    gc.collect()  # what other tests have left
    gc.disable()
    try:
        with pytest.raises(DeviceError):
            open_tensorrt(bundle, RTX)
        assert not [one for one in gc.get_objects() if type(one) in (FakeEngine, FakeContext)]
    finally:
        gc.enable()


def test_a_name_of_any_letters_is_written_as_it_is(bundle, facts, cache):
    folder = store_engine(replace(facts, bundle_name="Zellkerne-ä"), PLANS)
    assert "Zellkerne-ä" in (folder / "engine.json").read_text(encoding="utf-8")


def test_an_earlier_version_does_not_run_a_version_compatible_engine(bundle, facts, cache):
    folder = store_engine(replace(facts, version="11.4.0", is_version_compatible=True), PLANS)
    for version, serves in (("11.4.0", True), ("11.10.1", True), ("11.0.0", False), ("12.0.0", False)):
        try:
            read_engine(folder, bundle, version=version)
            assert serves
        except DeviceError:
            assert not serves
