"""`darcnn-run`: one line a slide, one line a failure, and an exit code that says how it went."""

import json
import os
import sys
import types
from contextlib import contextmanager

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from darcnn.runtime.batch import HERE
from darcnn.runtime.cli import main
from darcnn.runtime.engines.oracle import OracleEngine, encode_labels, make_oracle_manifest
from darcnn.runtime.errors import BundleError, DeviceError
from darcnn.runtime.segmenter import Segmenter

NAMES = {"objects.parquet", "objects.geojson.gz", "labels.ome.zarr", "overview.png", "run.json"}


@pytest.fixture
def loaded(monkeypatch):
    """Stands in for the loader of bundles; keeps what it was asked for."""
    calls = []

    def load(model, *, device, backend, min_score, tell, engine=None):
        assert backend == "auto"
        calls.append((model, device, min_score) if engine is None else (model, engine))
        if model == "broken":
            raise BundleError("is no bundle", where=model, fix="name a .darcnn file")
        engine = OracleEngine(tile_px=64)
        return Segmenter(engine, make_oracle_manifest(engine, halo_px=16), min_score=min_score)

    module = types.ModuleType("darcnn.runtime.load")
    module.load = load
    monkeypatch.setitem(sys.modules, "darcnn.runtime.load", module)
    return calls


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    labels = np.zeros((100, 90), np.int32)
    labels[10:20, 10:20] = 1
    labels[40:52, 60:70] = 2
    for name in ("a.png", "b.png"):
        Image.fromarray(encode_labels(labels)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_folder_of_images_is_run_in_order(loaded, slides, tmp_path):
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out", "--pixels", "--device", "cpu")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["a: 2 objects", "b: 2 objects"]
    assert lines[0].endswith(str(tmp_path / "out" / "a" / "overview.png"))
    assert {path.name for path in (tmp_path / "out" / "b").iterdir()} == NAMES
    assert loaded == [("oracle", "cpu", None)]


def test_a_name_that_the_terminal_cannot_show_stops_no_batch(loaded, slides, tmp_path):
    (slides / "a.png").rename(slides / "a 細胞.png")
    result = CliRunner(charset="cp1252").invoke(
        main, [str(slides), "--model", "oracle", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.exception
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["a \\u7d30\\u80de", "b"]


def test_options_reach_the_run(loaded, slides, tmp_path):
    out = tmp_path / "out"
    arguments = ["--mpp", 0.5, "--diameter", 28, "--channel", "red", "--z", 0, "--min-score", 0.75, "--quiet"]
    assert run(slides / "a.png", "--model", "oracle", "--out", out, *arguments).exit_code == 0
    assert loaded == [("oracle", "auto", 0.75)]
    record = json.loads((out / "a" / "run.json").read_text())
    expected = {"mpp": 0.5, "diameter_px": 28, "channel": "red", "z": 0, "t": None}
    assert {name: record["options"][name] for name in expected} == expected
    assert (record["network"]["channel"], record["model"]["min_score"]) == (0, 0.75)
    assert record["input"]["file"]["name"] == "a.png"


def test_one_bad_slide_among_several_is_one_line_and_exit_1(loaded, slides, tmp_path):
    (slides / "a2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["a", "b"]
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "a2.png" in errors[0]
    assert "Traceback" not in result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "summary.csv"]


def test_results_go_home_and_never_to_a_url(loaded, slides, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # where Windows has it
    monkeypatch.chdir(tmp_path)
    assert run("slides/a.png", "--model", "oracle", "--out", "~/results").exit_code == 0
    assert (tmp_path / "home" / "results" / "a" / "run.json").is_file()
    result = run("slides/a.png", "--model", "oracle", "--out", "s3://bucket/out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --out: is a URL; give a folder and upload the results\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "slides"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_no_utf_8_stops_no_slide(loaded, slides, tmp_path):
    (slides / "a.png").rename(slides / os.fsdecode(b"Pr\xe4parat.png"))
    ask = (slides, "--model", "oracle", "--out", tmp_path / "out", "--also", "csv", "--also", "labels-tiff")
    assert run(*ask).exit_code == 0
    folder = tmp_path / "out" / "Pr_udce4parat"
    assert {path.name for path in folder.iterdir()} == NAMES | {"objects.csv", "labels.ome.tiff"}
    again = run(*ask)
    assert again.exit_code == 0
    assert again.stdout.count("done before") == 2


def test_only_bad_slides_are_exit_2(loaded, slides, tmp_path):
    result = run(slides / "no.png", slides / "notes.txt", "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 2
    assert result.stdout == ""


def test_complete_results_are_refused_unless_overwritten(loaded, slides, tmp_path):
    arguments = [slides / "a.png", "--model", "oracle", "--out", tmp_path / "out"]
    assert run(*arguments).exit_code == 0
    again = run(*arguments, "--min-score", "0.9")  # another question
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr
    assert run(*arguments, "--overwrite").exit_code == 0


def test_a_file_in_place_of_the_output_folder_is_exit_2(loaded, slides, tmp_path):
    (tmp_path / "out").touch()
    result = run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "stands where a folder is needed" in result.stderr


def test_a_full_disk_is_one_line(loaded, slides, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("darcnn.runtime.outputs.write_parquet", fail)
    result = run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert "no space left" in result.stderr
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == [".parts"]


def test_an_unforeseen_system_error_is_one_line_too(loaded, slides, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error", "a.png")

    monkeypatch.setattr("darcnn.runtime.batch.open_source", fail)
    result = run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Input/output error" in result.stderr


def test_a_bug_shows_itself(loaded, slides, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr("darcnn.runtime.outputs.write_parquet", fail)
    with pytest.raises(ZeroDivisionError):
        run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out")


def test_ctrl_c_keeps_finished_slides(loaded, slides, tmp_path, monkeypatch):
    from darcnn.runtime import outputs

    write, calls = outputs.write_geojson, []

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments, **options)

    monkeypatch.setattr(outputs, "write_geojson", interrupt)
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert [path.name for path in (tmp_path / "out" / "b").iterdir()] == [".parts"]
    assert "Traceback" not in result.output
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "out" / "a").iterdir()} == NAMES


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ([], "the same command goes on where it stopped"),
        (["--restart"], "the same command without --restart goes on"),
        (["--overwrite"], "does finished slides again, and goes on with the one that is not"),
        (["--overwrite", "--restart"], "for --overwrite, the same command does finished slides again\n"),
    ],
)
def test_an_interruption_says_what_goes_on(loaded, slides, tmp_path, monkeypatch, option, words):
    from darcnn.runtime import outputs

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "write_geojson", interrupt)
    result = run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out", *option)
    assert result.exit_code == 130
    assert words in result.stderr


def test_the_same_command_goes_on_and_does_no_slide_twice(loaded, slides, tmp_path, monkeypatch):
    from darcnn.runtime import outputs

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_geojson", interrupt)
        assert run(slides / "b.png", "--model", "oracle", "--out", tmp_path / "out").exit_code == 130
    assert run(slides / "a.png", "--model", "oracle", "--out", tmp_path / "out").exit_code == 0
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "a: " in result.stdout.splitlines()[0]
    assert ", done before, " in result.stdout.splitlines()[0]
    assert {path.name for path in (tmp_path / "out" / "b").iterdir()} == NAMES


@pytest.mark.parametrize(("n_before", "code"), [(0, 2), (1, 1)])
def test_a_failing_device_ends_the_batch(loaded, slides, tmp_path, monkeypatch, n_before, code):
    segment, calls = OracleEngine.detect, []

    def fail(self, tiles):
        calls.append(1)
        if len(calls) > n_before * 6:
            raise DeviceError("out of memory", where="cuda:0", fix="pass --device cpu")
        return segment(self, tiles)

    monkeypatch.setattr(OracleEngine, "detect", fail)
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == code
    assert result.stderr.count("out of memory") == 1


def test_an_unknown_model_is_exit_2_before_any_slide(loaded, slides, tmp_path):
    result = run(slides, "--model", "broken", "--out", tmp_path / "out")
    assert (result.exit_code, result.stderr) == (2, "Error: broken: is no bundle; name a .darcnn file\n")
    assert not (tmp_path / "out").exists()


def test_slides_of_one_name_are_refused_before_any_work(loaded, slides, tmp_path):
    (slides / "b.jpg").write_bytes((slides / "b.png").read_bytes())
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "would both be written" in result.stderr
    assert loaded == []


def test_slides_of_one_name_in_several_folders_keep_their_folders(loaded, slides, tmp_path):
    for well in ("A1", "A2"):
        (slides / well).mkdir()
        (slides / well / "field.png").write_bytes((slides / "b.png").read_bytes())
    (slides / "A2" / "field.png").write_bytes(b"broken")
    out = tmp_path / "out"
    result = run(slides / "*" / "field.png", slides / "a.png", "--model", "oracle", "--out", out)
    assert result.exit_code == 1
    assert (out / "A1" / "field" / "run.json").is_file()
    assert (out / "a" / "run.json").is_file()
    lines = (out / "summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["slide", "A1/field", "A2/field", "a"]


def test_the_window_is_what_becomes_black_and_white(loaded, slides, tmp_path):
    for window, code in (("0,255", 0), ("0,10,20", 2), ("5,5", 2), ("a,b", 2)):
        out = tmp_path / window
        result = run(slides / "b.png", "--model", "oracle", "--out", out, "--window", window)
        assert result.exit_code == code
        assert code == 0 or "is no window: give LOW,HIGH such as 0,4095" in result.output
    record = json.loads((tmp_path / "0,255" / "b" / "run.json").read_text())
    assert record["options"]["window"] == [0.0, 255.0]


def test_a_slide_named_twice_is_run_once_and_patterns_are_expanded(loaded, slides, tmp_path):
    result = run(slides / "b.png", slides / "*.png", slides, "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["b", "a"]


def test_a_pattern_looks_into_folders_below(loaded, slides, tmp_path):
    (slides / "deep" / "er").mkdir(parents=True)
    (slides / "deep" / "er" / "c.png").write_bytes((slides / "b.png").read_bytes())
    result = run(slides / "**" / "*.png", "--model", "oracle", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert sorted(line.split(":")[0] for line in result.stdout.splitlines()) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--axis", "x"), ("--slab", "5"), ("--voxel-size", "1.3"), ("--roi", "900,900,950,950")],
)
def test_options_that_mean_nothing_to_a_picture_are_refused(loaded, slides, tmp_path, option, value):
    result = run(slides / "b.png", "--model", "oracle", "--out", tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert not (tmp_path / "out" / "b").exists()


@pytest.mark.parametrize(("option", "value"), [("--mpp", "0.3"), ("--roi", "0,0,9,9")])
def test_options_that_mean_nothing_to_a_volume_are_refused(loaded, tmp_path, option, value):
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((5, 40, 50), np.uint8), photometric="minisblack")
    result = run(tmp_path / "s.tif", "--model", "oracle", "--out", tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert f"{option}: means nothing to" in result.stderr


def test_a_series_takes_the_pixel_size_of_a_picture(loaded, tmp_path):
    planes = np.zeros((3, 64, 64), np.uint8)
    planes[:, 10:20, 10:20] = 1
    tifffile.imwrite(tmp_path / "s.tif", planes, photometric="minisblack")
    arguments = (tmp_path / "s.tif", "--model", "oracle", "--out", tmp_path / "out", "--mpp", 0.5)
    assert "--voxel-size" in run(*arguments).stderr  # a volume
    assert run(*arguments, "--series").exit_code == 0
    record = json.loads((tmp_path / "out" / "s" / "run.json").read_text())
    assert record["input"]["pixel_um_yx"] == [0.5, 0.5]


def test_stacks_at_several_time_points_are_projected_when_asked(loaded, slides, tmp_path):
    stacks = np.zeros((3, 2, 64, 64), np.uint8)
    stacks[:, 0, 10:20, 10:20], stacks[:, 1, 40:50, 10:20] = 1, 2  # on planes of their own
    tifffile.imwrite(tmp_path / "s.ome.tif", stacks, metadata={"axes": "TZYX"})
    arguments = (tmp_path / "s.ome.tif", "--model", "oracle", "--out", tmp_path / "out")
    assert "--project" in run(*arguments).stderr
    assert run(*arguments, "--project", "--mpp", 0.5).exit_code == 0
    record = json.loads((tmp_path / "out" / "s" / "run.json").read_text())
    assert record["input"]["pixel_um_yx"] == [0.5, 0.5]
    tracks = pq.read_table(tmp_path / "out" / "s" / "tracks.parquet")
    assert tracks["t"].to_pylist() == [0, 0, 1, 1, 2, 2]
    for chosen in (
        (slides / "b.png",),
        (*arguments[:1], "--z", "0", "--t", "0"),
        (*arguments[:1], "--t", "1"),
    ):
        result = run(*chosen, "--model", "oracle", "--out", tmp_path / "other", "--project")
        assert result.exit_code == 2
        assert "--project" in result.stderr


def test_a_filter_on_what_is_not_known_is_refused(loaded, slides, tmp_path):
    ask = ("--model", "oracle", "--out", tmp_path / "out", "--filter", "area_um2 > 20 and score > 0")
    result = run(slides / "b.png", *ask)
    assert result.exit_code == 2
    assert "area_um2 is not known" in result.stderr
    assert "--mpp" in result.stderr
    assert run(slides / "b.png", *ask, "--mpp", "0.5").exit_code == 0


def test_each_image_of_a_file_has_results_of_its_own(loaded, tmp_path):
    path, out = tmp_path / "two.ome.tif", tmp_path / "out"
    with tifffile.TiffWriter(path) as file:
        for count in (1, 2):
            labels = np.zeros((60, 70), np.int32)
            for number in range(count):
                labels[10:20, 10 + 20 * number : 20 + 20 * number] = number + 1
            facts = {"axes": "YXS", "Name": f"well {count}"}
            file.write(encode_labels(labels), photometric="rgb", metadata=facts)
    result = run(path, "--model", "oracle", "--out", out)
    assert result.exit_code == 0
    for number, count in ((0, 1), (1, 2)):
        assert len(pq.read_table(out / f"two-{number}" / "objects.parquet")) == count
        record = json.loads((out / f"two-{number}" / "run.json").read_text())
        assert (record["input"]["image_name"], record["input"]["file"]["image"]) == (f"well {count}", number)
    alone = run(path / "1", "--model", "oracle", "--out", tmp_path / "alone")
    assert alone.exit_code == 0
    assert [entry.name for entry in (tmp_path / "alone").iterdir() if entry.is_dir()] == ["two-1"]
    assert run(path / "2", "--model", "oracle", "--out", tmp_path / "none").exit_code == 2


def test_nothing_to_run_is_said(loaded, tmp_path):
    for asked, message in ((tmp_path, "holds no images"), (tmp_path / "*.svs", "matches no file")):
        result = run(asked, "--model", "oracle", "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("wrong", [["--mpp", "0"], ["--min-score", "2"], ["--z", "-1"], ["--device", "tpu"]])
def test_options_out_of_range_are_refused(loaded, slides, tmp_path, wrong):
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out", *wrong)
    assert result.exit_code == 2
    assert wrong[0] in result.stderr


def test_help_and_version_need_no_model():
    assert "exit code" in run("--help").stdout
    assert run("--version").stdout.startswith("darcnn-run")


def test_the_doctor_says_what_the_machine_offers():
    result = run("--doctor")
    assert result.exit_code == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == ["GPU", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]


def test_build_is_for_engines_that_are_compiled(loaded, slides, tmp_path):
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out", "--build")
    assert result.exit_code == 2
    assert "pass --backend tensorrt or tensorrt-rtx" in result.stderr


def test_an_engine_of_ones_own_reaches_the_run_by_its_whole_path(loaded, slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [slides / "a.png", "--model", "oracle", "--out", tmp_path / "out", "--engine", "mine"]
    assert run(*command).exit_code == 0
    assert loaded == [("oracle", tmp_path.resolve() / "mine")]
    result = run(*command, "--build", "--overwrite")
    assert result.exit_code == 2
    assert "--build: goes without --engine" in result.stderr


def test_workers_load_the_engine_too(loaded, slides, tmp_path, monkeypatch):
    made = []

    @contextmanager
    def open_finders(load_model, workers, scheduler, options):
        made.append(load_model)
        yield HERE

    monkeypatch.setattr("darcnn.runtime.cli._open_finders", open_finders)
    run(
        slides / "a.png", "--model", "oracle", "--out", tmp_path / "out", "--engine", tmp_path, "--workers", 2
    )
    assert made[0].keywords["engine"] == tmp_path.resolve()


def test_a_stack_is_run_as_a_volume_and_one_plane_of_it_as_an_image(loaded, tmp_path):
    pytest.importorskip("starfile", reason="volumes need the extra volumes")
    labels = np.zeros((6, 70, 60), np.uint8)
    labels[1:5, 10:18, 12:20] = 1
    labels[2:6, 40:47, 30:36] = 2
    tifffile.imwrite(tmp_path / "stack.tif", labels, metadata={"axes": "ZYX"})
    options = ("--model", "oracle", "--out", tmp_path / "out", "--pixels")
    result = run(tmp_path / "stack.tif", *options, "--axis", "all", "--voxel-size", "13.5A", "--slab", 1)
    assert result.exit_code == 0
    assert result.stdout.startswith("stack: 2 objects")
    folder = tmp_path / "out" / "stack"
    wanted = {"objects.parquet", "labels.ome.zarr", "overview.png", "run.json"}
    assert {one.name for one in folder.iterdir()} == wanted | {
        "particles.star",
        "particles.txt",
        "scroll.gif",
    }
    assert json.loads((folder / "run.json").read_text())["input"]["voxel_nm_zyx"] == [1.35, 1.35, 1.35]
    plane = run(tmp_path / "stack.tif", *options, "--z", 2, "--overwrite")
    assert plane.exit_code == 0
    assert {one.name for one in folder.iterdir()} == NAMES
    assert run(tmp_path / "stack.tif", *options, "--voxel-size", "wide").exit_code == 2
    assert "slab" in run(tmp_path / "stack.tif", *options, "--slab", 4, "--overwrite").output


def test_json_is_all_that_standard_output_holds(loaded, slides, tmp_path):
    (slides / "a2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    result = run(slides, "--model", "oracle", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 1
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "progress"]
    assert kinds == ["begin", "finish", "begin", "fail", "begin", "finish"]
    assert [event["objects"] for event in events if event["event"] == "finish"] == [2, 2]


def test_region_tissue_and_formats_reach_the_run(loaded, slides, tmp_path):
    out = tmp_path / "out"
    arguments = ["--roi", "0,0,40,40", "--no-tissue", "--also", "csv", "--also", "labels-tiff"]
    assert run(slides, "--model", "oracle", "--out", out, *arguments).exit_code == 0
    record = json.loads((out / "a" / "run.json").read_text())
    assert (record["options"]["tissue"], record["counts"]["objects"]) == (False, 1)
    assert {path.name for path in (out / "b").iterdir()} == NAMES | {"objects.csv", "labels.ome.tiff"}
    assert (out / "summary.csv").read_text().count("\n") == 3
