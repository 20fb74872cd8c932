"""Files of other programs: tensors come out as they went in, and nothing in such a file runs."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darcnn.runtime.errors import InputError
from darcnn.training.model.tensor_file import read_tensors

ARRAYS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "transposed": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "half": np.array([0.5, -2.0], np.float16),
    "big_endian": np.array([1.0, 2.0, 3.0], ">f4"),
    "n": np.array(7, np.int64),
}


class Runs:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def write(path: Path, content: Any, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_arrays_of_a_pickle_come_out_as_they_went_in(tmp_path: Path, protocol: int, kind: type) -> None:
    content = {"model": kind(ARRAYS), "__author__": "someone", "matching_heuristics": True, "iteration": 3}
    tensors = read_tensors(write(tmp_path / "a.pkl", content, protocol))
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name].numpy(), array)


def test_a_pickle_of_an_older_numpy_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", {"model": ARRAYS})
    path.write_bytes(path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(read_tensors(path)["a"].numpy(), ARRAYS["a"])


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(  # {"model": {"w": array([1.5, -3.0], float32)}}, all text and bytes as `str`
        b"\x80\x02}U\x05model}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + np.array([1.5, -3.0], "<f4").tobytes() + b"tbss."
    )
    assert read_tensors(path)["w"].tolist() == [1.5, -3.0]


def test_tensors_of_torch_come_out_with_and_without_a_table_around_them(tmp_path: Path) -> None:
    state = {"w": torch.arange(3.0)}
    for number, content in enumerate([state, {"model": state, "iteration": 9, "optimizer": {"lr": 0.1}}]):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        tensors = read_tensors(path)
        assert list(tensors) == ["w"]
        assert torch.equal(tensors["w"], state["w"])


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch ran"), "posix.system"),
        (Runs(builtins.eval, "open('ran', 'w')"), "__builtin__.eval"),
        (Runs(getattr, {}, "pop"), "__builtin__.getattr"),
        (Runs(np.load, "ran"), "numpy.load"),
        (Path("ran"), "pathlib"),
        (torch.zeros(2), "torch._utils._rebuild_tensor_v2"),
        (np.array([None, {}]), "numpy.dtype(O8)"),
        (np.array(["text"]), "numpy.dtype(U4)"),
        (np.zeros(2, [("x", "f4")]), "numpy.dtype(V4)"),
    ],
)
def test_what_could_run_is_refused_by_name_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.pkl", {"model": {"a": ARRAYS["a"]}, "extra": value})
    assert name in refusal(path)
    assert not (tmp_path / "ran").exists()


def test_text_is_decoded_as_numpy_encodes_it_and_in_no_other_way(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pkl", {"model": ARRAYS})
    path.write_bytes(path.read_bytes().replace(b"latin1", b"rot_13"))
    assert "_codecs.encode(rot_13)" in refusal(path)


def test_a_pickle_cannot_change_what_builds_its_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    for change in (b"}U\x08__code__K\x01s", b"N}U\x08__code__K\x01s\x86", b"}U\x05_pathK\x01s"):
        path.write_bytes(b"\x80\x02cnumpy\ndtype\n" + change + b"b.")
        refusal(path)
    np.testing.assert_array_equal(
        read_tensors(write(tmp_path / "b.pkl", {"model": ARRAYS}))["a"].numpy(), ARRAYS["a"]
    )


def test_what_could_run_in_a_file_of_torch_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.zeros(2)}, "extra": Runs(os.system, "touch ran")}, path)
    assert "posix.system" in refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pkl", "a.pth"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"not a pickle", b"\x80\x02.", b"PK\x03\x04 cut", b"\x80\x02K\x01.", b"\xff" * 99],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert "give a checkpoint" in refusal(path)


@pytest.mark.parametrize("name", ["a.pkl", "a.pth"])
@pytest.mark.parametrize("content", [[], {"model": {}}, {"model": 3}, {"model": {"a": 1}}, {"blobs": {}}])
def test_a_file_without_named_tensors_is_refused(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    if name == "a.pkl":
        write(path, content)
    else:
        torch.save(content, path)
    assert "no named tensors" in refusal(path)


def test_tensors_without_text_for_a_name_are_refused(tmp_path: Path) -> None:
    assert "no named tensors" in refusal(write(tmp_path / "a.pkl", {"model": {3: ARRAYS["a"]}}))


@pytest.mark.parametrize("name", ["none.pkl", "none.pth", "folder.pkl", "folder.pth"])
def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "folder.pth").mkdir()
    assert "give the path of a checkpoint" in refusal(tmp_path / name)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    torch.save({"model": {"w": torch.zeros(999)}}, tmp_path / "a.pth")
    write(tmp_path / "a.pkl", {"model": {"w": np.zeros(999)}})
    for path in (tmp_path / "a.pkl", tmp_path / "a.pth"):
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        assert "damaged" in refusal(path)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_damage_is_refused_in_one_line_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(
        pickle.dumps({"model": collections.OrderedDict(ARRAYS)}, data.draw(st.integers(0, 5)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(content)
    try:
        read_tensors(path)
    except InputError as err:
        message = str(err)
    else:
        message = ""  # a number is another, or a name
    assert "\n" not in message
