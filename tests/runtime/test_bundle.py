"""A bundle opens exactly as it was written, or is refused in one line that names the file and the fix."""

import json
import os
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from darcnn.runtime.bundle import MEMBER_CAPS, open_bundle, write_bundle
from darcnn.runtime.errors import BundleError, OutputError
from darcnn.runtime.load import find_bundle
from darcnn.runtime.manifest import FORMAT, manifest_to_json
from darcnn.runtime.slab import Slab

SMALL = {"detect.onnx": b"detect" * 9, "mask.onnx": b"mask" * 9, "training.json": b"{}", "LICENSE": b"none\n"}


@pytest.fixture
def small(tmp_path, manifest):
    path = tmp_path / "small.darcnn"
    write_bundle(path, manifest, SMALL)
    return path


def contents(bundle):
    return {name: bundle.read(name) for name in MEMBER_CAPS}


def write_zip(path, entries, *, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def manifest_text(manifest, **changes):
    files = {name: sha256(content).hexdigest() for name, content in SMALL.items()}
    return json.dumps({**manifest_to_json(replace(manifest, files=files)), **changes})


def check_refused(path, problem):
    with pytest.raises(BundleError) as caught:
        open_bundle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "\n" not in message


def test_bundle_reads_back_what_was_written(small, manifest):
    bundle = open_bundle(small)
    assert bundle.path == small
    assert bundle.sha256 == sha256(small.read_bytes()).hexdigest()
    assert {name: bundle.read(name) for name in SMALL} == SMALL
    assert replace(bundle.manifest, files={}) == manifest
    assert bundle.manifest.files == {name: sha256(content).hexdigest() for name, content in SMALL.items()}


def test_the_slab_of_a_model_for_volumes_comes_back(tmp_path, manifest, members):
    deep = replace(manifest, input=replace(manifest.input, slab=Slab(0.5, 0.2)))
    write_bundle(tmp_path / "deep.darcnn", deep, members)
    assert open_bundle(tmp_path / "deep.darcnn").manifest.input.slab == Slab(0.5, 0.2)


def test_bundle_is_readable_by_any_zip_program_and_not_compressed(small):
    with zipfile.ZipFile(small) as archive:
        assert archive.namelist() == list(MEMBER_CAPS)
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert archive.testzip() is None


def test_same_input_gives_the_same_bytes(small, tmp_path, manifest):
    again = tmp_path / "again.darcnn"
    write_bundle(again, manifest, dict(reversed(SMALL.items())))
    assert again.read_bytes() == small.read_bytes()


def test_bundle_holds_the_file_no_longer(small):
    bundle = open_bundle(small)
    small.unlink()
    assert bundle.read("LICENSE") == SMALL["LICENSE"]
    with pytest.raises(KeyError):
        bundle.read("weights.pt")


def test_every_flipped_byte_of_a_member_is_refused(small):
    content = small.read_bytes()
    with zipfile.ZipFile(small) as archive:
        payloads = [archive.read(name) for name in MEMBER_CAPS]
    for payload in payloads:
        start = content.index(payload)
        for place in range(start, start + len(payload)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            small.write_bytes(damaged)
            with pytest.raises(BundleError):
                open_bundle(small)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(small, place, bit):
    whole = contents(open_bundle(small))
    content = small.read_bytes()
    damaged = bytearray(content)
    damaged[place % len(damaged)] ^= 1 << bit
    small.write_bytes(damaged)
    try:
        found = contents(open_bundle(small))
    except BundleError:
        found = whole
    finally:
        small.write_bytes(content)
    assert found == whole


def test_every_truncation_is_refused(small):
    content = small.read_bytes()
    for length in range(0, len(content), 7):
        small.write_bytes(content[:length])
        with pytest.raises(BundleError, match=r"is empty|is cut short|is not a bundle"):
            open_bundle(small)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200))
def test_noise_is_refused(tmp_path, content):
    path = tmp_path / "noise.darcnn"
    path.write_bytes(content)
    with pytest.raises(BundleError):
        open_bundle(path)


def test_missing_file_is_refused(tmp_path):
    check_refused(tmp_path / "none.darcnn", "no such file")


def test_folder_is_refused(tmp_path):
    check_refused(tmp_path, "is a folder")


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.darcnn").touch()
    check_refused(tmp_path / "empty.darcnn", "is empty")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="this user may read everything")
def test_unreadable_file_is_refused(small):
    small.chmod(0)
    check_refused(small, "cannot be read")


def test_other_file_is_refused(tmp_path):
    path = tmp_path / "model.darcnn"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    check_refused(path, "is not a bundle")


def test_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.darcnn"
    with path.open("wb") as file:
        file.truncate(sum(MEMBER_CAPS.values()) + 2**21)
    check_refused(path, "more than any bundle")


def test_compressed_member_is_refused(tmp_path, manifest):
    path = tmp_path / "repacked.darcnn"
    entries = [("manifest.json", manifest_text(manifest)), *SMALL.items()]
    write_zip(path, entries, compression=zipfile.ZIP_DEFLATED)
    check_refused(path, "is compressed")


@pytest.mark.parametrize("name", ["weights.pkl", "../LICENSE", "/LICENSE", "code/"])
def test_other_member_is_refused(tmp_path, manifest, name):
    path = tmp_path / "more.darcnn"
    write_zip(path, [("manifest.json", manifest_text(manifest)), *SMALL.items(), (name, b"")])
    check_refused(path, "which no bundle has")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", ["manifest.json", "detect.onnx"])
def test_repeated_member_is_refused(tmp_path, manifest, name):
    path = tmp_path / "twice.darcnn"
    entries = {"manifest.json": manifest_text(manifest), **SMALL}
    write_zip(path, [*entries.items(), (name, entries[name])])
    check_refused(path, f"{name} more than once")


@pytest.mark.parametrize("name", MEMBER_CAPS)
def test_lacking_member_is_refused(tmp_path, manifest, name):
    path = tmp_path / "less.darcnn"
    entries = {"manifest.json": manifest_text(manifest), **SMALL}
    del entries[name]
    write_zip(path, entries.items())
    check_refused(path, f"lacks {name}")


def test_member_beyond_its_cap_is_refused(tmp_path, manifest):
    path = tmp_path / "large.darcnn"
    large = {**SMALL, "LICENSE": bytes(MEMBER_CAPS["LICENSE"] + 1)}
    write_zip(path, [("manifest.json", manifest_text(manifest)), *large.items()])
    check_refused(path, "LICENSE has 1.0 MiB, more than")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("not json", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not a table"),
        ("{}", "names no format"),
        ('{"format": "1"}', "names no format"),
        ('{"format": true}', "names no format"),
        ('{"format": 0}', "names no format"),
        ('{"format": 1}', "lacks name"),
        ('{"format": 1, "graphs": {"detect": [1]}}', "manifest.json is wrong"),
        ('{"format": 1, "graphs": {"detect": {"tile": 3}}}', "manifest.json is wrong"),
    ],
)
def test_broken_manifest_is_refused(tmp_path, text, problem):
    path = tmp_path / "broken.darcnn"
    write_zip(path, [("manifest.json", text), *SMALL.items()])
    check_refused(path, problem)


def test_unknown_field_is_refused(tmp_path, manifest):
    path = tmp_path / "field.darcnn"
    write_zip(path, [("manifest.json", manifest_text(manifest, colour="red")), *SMALL.items()])
    check_refused(path, "unknown field colour")


@pytest.mark.parametrize("tile_px", [0, -512, 1_000_000])
def test_tiles_that_no_machine_holds_are_refused_before_anything_is_made_of_them(tmp_path, manifest, tile_px):
    changed = replace(manifest, input=replace(manifest.input, tile_px=tile_px))
    write_bundle(tmp_path / "large.darcnn", changed, SMALL)
    check_refused(tmp_path / "large.darcnn", f"states tiles of {tile_px} px")


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("input.halo_px", 4, "leaves nothing of a tile"),
        ("input.halo_px", [2], "input.halo_px is not of type int"),
        ("input.channels", True, "input.channels is not of type int"),
        ("input.nominal_diameter_px", float("nan"), "input.nominal_diameter_px is nan, not between"),
        ("input.mpp", -1.0, "input.mpp is -1.0, not between"),
        ("input.intensity", {"kind": "range", "low": 2, "high": 1}, "not from a lower to a higher value"),
        ("input.intensity", {"kind": "percentile", "low": -1, "high": 1}, "to a higher percentile"),
        ("input.intensity", {"kind": "guess"}, "kind is none of full_range, percentile, range"),
        ("limits.min_score", 1e308, "limits.min_score is 1e+308, not between 0 and 1"),
        ("limits.detections", 10**400, "limits.detections is 1000"),
        ("anchors.ratios", 3, "anchors.ratios is not a list"),
        ("anchors.ratios", ["x"], "anchors.ratios is not of type float"),
        ("name", None, "name is not of type str"),
        ("name", "", "name is ''"),
        ("name", "..", "name is '..'"),
        ("name", "/tmp/x", "name holds '/'"),
        ("name", "..\\x", "name holds"),
        ("name", "a\0b", "name holds"),
        ("name", "\ud800", "name holds"),
        ("name", "x" * 101, "name has 101 characters, more than 100"),
        ("precision", "banana", "precision is none of fp32, fp16, int8"),
        ("graphs", {"mask": {"masks": ["float32", [float("inf")]]}}, "graphs.mask.masks is not of type int"),
        ("graphs", {"mask": {"masks": ["float32"]}}, "graphs.mask.masks is not a type and a shape"),
        ("files", {"LICENSE": 3}, "files is not of type str"),
    ],
)
def test_values_that_no_model_can_have_are_refused(tmp_path, manifest, field, value, problem):
    path = tmp_path / "value.darcnn"
    table = json.loads(manifest_text(manifest))
    *tables, last = field.split(".")
    parent = table
    for name in tables:
        parent = parent[name]
    parent[last] = value
    write_zip(path, [("manifest.json", json.dumps(table)), *SMALL.items()])
    check_refused(path, problem)


def test_newer_format_is_refused_whatever_else_it_brings(tmp_path):
    path = tmp_path / "newer.darcnn"
    write_zip(path, [("manifest.json", json.dumps({"format": FORMAT + 1})), ("extra.onnx", b"")])
    check_refused(path, "made by a newer darcnn")
    check_refused(path, "upgrade")


def test_replaced_member_is_refused(tmp_path, manifest):
    path = tmp_path / "replaced.darcnn"
    replaced = {**SMALL, "mask.onnx": b"another graph"}
    write_zip(path, [("manifest.json", manifest_text(manifest)), *replaced.items()])
    check_refused(path, "mask.onnx is not what manifest.json says")


def test_a_graph_that_keeps_weights_elsewhere_is_refused(tmp_path, manifest):
    onnx = pytest.importorskip("onnx", reason="the graph is made with onnx")
    weights = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    weights.ClearField("float_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights.bin")
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "mask", [], [], [weights]))
    path = tmp_path / "elsewhere.darcnn"
    write_bundle(path, manifest, {**SMALL, "mask.onnx": graph.SerializeToString()})
    check_refused(path, "mask.onnx keeps weights in another file")


@pytest.mark.parametrize("suffix", ["", ".darcnn"])
def test_a_name_that_no_disk_holds_is_one_line(suffix):
    with pytest.raises(BundleError, match=r"no such model|cannot be read"):
        find_bundle("n" * 300 + suffix)


def test_manifest_that_leaves_a_member_out_is_refused(tmp_path, manifest):
    path = tmp_path / "unlisted.darcnn"
    write_zip(path, [("manifest.json", manifest_text(manifest, files={})), *SMALL.items()])
    check_refused(path, "does not list the other members")


def test_wrong_members_are_a_mistake_of_the_caller(tmp_path, manifest):
    for wrong in ({**SMALL, "code.py": b""}, {"LICENSE": b""}, {**SMALL, "manifest.json": b"{}"}):
        with pytest.raises(ValueError, match="a bundle does not have, or lacks"):
            write_bundle(tmp_path / "wrong.darcnn", manifest, wrong)


def test_too_large_member_is_not_written(tmp_path, manifest):
    path = tmp_path / "large.darcnn"
    with pytest.raises(BundleError, match=r"training\.json has"):
        write_bundle(path, manifest, {**SMALL, "training.json": bytes(2**20 + 1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../tiny", "", "x" * 101])
def test_a_name_that_readers_refuse_is_not_written(tmp_path, manifest, name):
    with pytest.raises(BundleError, match="give the model another name"):
        write_bundle(tmp_path / "named.darcnn", replace(manifest, name=name), SMALL)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_bundle(small, manifest):
    before = small.read_bytes()
    with pytest.raises(TypeError):
        write_bundle(small, manifest, {**SMALL, "mask.onnx": 7})
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_write_into_a_missing_folder_says_so(tmp_path, manifest):
    with pytest.raises(OutputError):
        write_bundle(tmp_path / "none" / "a.darcnn", manifest, SMALL)
