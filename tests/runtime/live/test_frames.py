import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darcnn.runtime.errors import DeviceError, InputError
from darcnn.runtime.live.frames import BufferPool, check_frame, view_frame


class Dlpack:
    """An array of another library, on a device of your choice."""

    def __init__(self, array, device=1):
        self.array, self.device = array, device

    def __dlpack_device__(self):
        return (self.device, 0)

    def __dlpack__(self, **options):
        if self.device != 1 and options.get("dl_device") != (1, 0):
            raise BufferError("not in host memory")
        return self.array.__dlpack__()


class OnGpu:
    """What PyCUDA and Numba give: an address on a GPU that this machine may not have."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (4, 4),
        "typestr": "<u2",
        "data": (4096, True),
        "strides": None,
        "version": 3,
    }


def test_numpy_and_dlpack_in_host_memory_are_viewed_without_a_copy():
    frame = np.arange(12, dtype=np.uint16).reshape(3, 4)
    for given_ in (frame, frame[:, ::2], frame.T, Dlpack(frame), memoryview(frame)):
        array, is_copy = view_frame(given_)
        assert np.shares_memory(array, frame)
        assert not is_copy


def test_a_torch_tensor_is_viewed_without_a_copy():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    array, is_copy = view_frame(tensor)
    tensor[1, 2] = 99
    assert array[1, 2] == 99
    assert not is_copy


def test_what_its_owner_brings_from_a_device_is_a_copy():
    frame = np.arange(12, dtype=np.uint16).reshape(3, 4)
    array, is_copy = view_frame(Dlpack(frame, device=2))
    assert is_copy
    np.testing.assert_array_equal(array, frame)


def test_what_cannot_be_fetched_from_a_device_says_so_in_one_line():
    class Stays(Dlpack):
        def __dlpack__(self, **options):
            raise BufferError("stays where it is")

    with pytest.raises(InputError, match=r"DLPack device 2 \(stays where it is\); copy it to a NumPy array"):
        view_frame(Stays(np.zeros((2, 2)), device=2))


def test_a_frame_on_a_gpu_that_does_not_answer_is_an_error_of_one_line():
    with pytest.raises(DeviceError) as caught:
        view_frame(OnGpu())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frame", [None, "frame", [[1, 2], [3, 4]], 5])
def test_what_is_no_array_is_refused(frame):
    with pytest.raises(InputError, match="no array; push a NumPy array"):
        view_frame(frame)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.zeros(5), "has the shape"),
        (np.zeros((2, 2, 2, 2)), "has the shape"),
        (np.zeros((0, 5)), "has no pixels"),
        (np.zeros((5, 5, 0)), "has no pixels"),
        (np.zeros((5, 5), np.complex64), "holds complex64"),
        (np.zeros((5, 5), object), "holds object"),
    ],
)
def test_what_is_no_image_is_refused(frame, words):
    with pytest.raises(InputError, match=words):
        check_frame(frame)


@given(
    st.lists(
        st.tuples(st.sampled_from(["u1", ">u2", "f4"]), st.integers(1, 4), st.integers(1, 4), st.booleans())
    )
)
def test_copies_are_equal_contiguous_and_their_own_whatever_was_given_back(frames):
    pool, held = BufferPool(2), []
    for index, (dtype, height, width, gives_back) in enumerate(frames):
        frame = np.full((2 * height, width), index % 100, dtype)[::2]
        copied = pool.copy(frame)
        assert copied.flags.c_contiguous
        assert copied.dtype == frame.dtype
        held.append((copied, index % 100, height, width))
        if gives_back:
            pool.give_back(held.pop(0)[0])
        for array, value, *shape in held:
            np.testing.assert_array_equal(array, np.full(shape, value))


def test_a_steady_camera_costs_no_new_memory():
    pool = BufferPool(2)
    first = pool.copy(np.zeros((8, 8), np.uint16))
    pool.give_back(first)
    assert np.shares_memory(first, pool.copy(np.ones((8, 8), np.uint16)))
