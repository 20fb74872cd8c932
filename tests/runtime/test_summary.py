"""summary.csv has a line for each slide of a command, and `--json` an event for each step."""

import csv
import errno
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from filelock import FileLock

from darcnn.runtime import summary as summary_module
from darcnn.runtime.errors import OutputError
from darcnn.runtime.pipeline import RunSummary
from darcnn.runtime.progress import JsonLines, Terminal
from darcnn.runtime.summary import SlideOutcome, write_summary


def summary(tmp_path, **changes):
    facts = {
        "name": "a, b",
        "folder": tmp_path / "a, b",
        "overview": tmp_path / "a, b" / "overview.png",
        "n_objects": 30,
        "seconds": 2.0,
        "megapixels": 4.0,
        "warnings": ("one", "two"),
        "ground_mm2": 0.5,
    }
    return RunSummary(**(facts | changes))


def test_the_summary_tells_count_density_area_warnings_and_failures(tmp_path):
    outcomes = [
        SlideOutcome(tmp_path / "a, b.svs", summary(tmp_path, n_unreadable=3)),
        SlideOutcome(tmp_path / "c.svs", summary(tmp_path, name="c", ground_mm2=None, was_done=True)),
        SlideOutcome(tmp_path / "d.svs", error="d.svs: is damaged"),
    ]
    write_summary(tmp_path, outcomes)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["state"] for line in lines] == ["done", "done before", "failed"]
    assert [line["slide"] for line in lines] == ["a, b", "c", "d"]
    assert (lines[0]["objects"], lines[0]["objects_per_mm2"], lines[0]["tissue_mm2"]) == (
        "30",
        "60.0",
        "0.500000",
    )
    assert lines[0]["warnings"] == "one; two"
    assert [line["tiles_unreadable"] for line in lines] == ["3", "0", ""]
    assert (lines[1]["objects_per_mm2"], lines[1]["seconds"]) == ("", "")
    assert lines[2]["error"] == "d.svs: is damaged"


def test_two_commands_that_write_at_once_lose_no_line(tmp_path, monkeypatch):
    read = summary_module._earlier_rows

    def read_slowly(path):
        rows = read(path)
        time.sleep(0.05)
        return rows

    monkeypatch.setattr(summary_module, "_earlier_rows", read_slowly)
    names = [f"slide {number}" for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        for written in [
            pool.submit(
                write_summary,
                tmp_path,
                [SlideOutcome(tmp_path / f"{name}.svs", summary(tmp_path, name=name))],
            )
            for name in names
        ]:
            written.result()
    lines = (tmp_path / "summary.csv").read_text().splitlines()[1:]
    assert sorted(line.split(",")[0] for line in lines) == names
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.csv"]


def test_a_summary_that_stays_locked_is_an_error_of_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(summary_module, "_WAIT_SECONDS", 0.1)
    with (
        FileLock(tmp_path / ".summary.lock"),
        pytest.raises(OutputError, match="another run has been writing"),
    ):
        write_summary(tmp_path, [SlideOutcome(tmp_path / "a.svs", summary(tmp_path))])


def test_nothing_is_written_where_nothing_was_done(tmp_path):
    write_summary(tmp_path / "out", [SlideOutcome(tmp_path / "d.svs", error="d.svs: is damaged")])
    write_summary(tmp_path / "out", [])
    assert not (tmp_path / "out").exists()


def test_a_summary_stays_where_all_was_done_before_and_is_told(tmp_path, monkeypatch):
    def outcome(**changes):
        return SlideOutcome(tmp_path / "a.svs", summary(tmp_path, name="a", **changes))

    write_summary(tmp_path, [outcome()])
    before = (tmp_path / "summary.csv").read_bytes()

    def refuse(path, **_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(summary_module, "take_lock", refuse)  # root may write anywhere
    write_summary(tmp_path, [outcome(was_done=True)])
    assert (tmp_path / "summary.csv").read_bytes() == before
    for changed in ({"was_done": True, "n_objects": 7}, {}):
        with pytest.raises(OutputError, match="read-only"):
            write_summary(tmp_path, [outcome(**changed)])


def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("darcnn.runtime.progress.time.monotonic", lambda: now[0])
    return now


def test_json_tells_each_step_in_a_line(tmp_path, capsys, monkeypatch):
    now = clock(monkeypatch)
    listener = JsonLines()
    listener.begin(tmp_path / "a.svs", 1, 2)
    for done in range(1, 11):
        now[0] += 0.5
        listener.advance(done, 10, n_objects=3 * done, megapixels=0.25 * done)
    listener.finish(summary(tmp_path))
    listener.fail("b.svs: no such file; check the path")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["begin", *["progress"] * 6, "finish", "fail"]
    steps = [event for event in events if event["event"] == "progress"]
    assert [event["tiles"] for event in steps] == [1, 3, 5, 7, 9, 10]  # once a second, and the last
    assert (steps[1]["tiles_per_second"], steps[1]["megapixels_per_second"]) == (2.0, 0.5)
    assert (steps[1]["seconds_left"], steps[1]["objects"]) == (3.5, 9)
    assert events[-2]["objects_per_mm2"] == 60.0
    assert events[-1]["error"].startswith("b.svs")
    assert [event["slide"] for event in events] == [str(tmp_path / "a.svs")] * 8 + [None]  # of no slide


def test_no_event_tells_the_secrets_of_a_url(capsys):
    for listener in (JsonLines(), Terminal(shows_progress=True)):
        listener.begin("https://me:secret@a.org/b.zarr?token=secret", 1, 1)
        listener.advance(1, 2)
        listener.fail("it is gone")
    told = capsys.readouterr()
    assert "secret" not in told.out + told.err
    assert "b.zarr" in told.err


def test_the_progress_line_tells_pace_objects_and_time_left(tmp_path, capsys, monkeypatch):
    now = clock(monkeypatch)
    listener = Terminal(shows_progress=True)
    listener.begin(tmp_path / "a.svs", 1, 2)
    listener.advance(50, 100, n_objects=1000, megapixels=10.0)  # of an earlier run: at once
    now[0] += 2.0
    listener.advance(54, 100, n_objects=1200, megapixels=10.8)
    line = capsys.readouterr().err.split("\r")[-1]
    assert " 54 %  2.0 tiles/s  0.4 Mpx/s  1,200 objects  23 s left" in line
    quiet = Terminal(shows_progress=False)
    quiet.begin(tmp_path / "a.svs", 1, 2)
    quiet.advance(1, 2)
    assert capsys.readouterr().err == ""


def test_the_speed_of_a_small_picture_says_nothing_and_is_left_out(tmp_path, capsys):
    for megapixels, seconds in ((0.3, 20.0), (30.0, 20.0), (5.3, 111.0)):
        Terminal(shows_progress=False).finish(summary(tmp_path, megapixels=megapixels, seconds=seconds))
    small, large, slow = capsys.readouterr().out.splitlines()
    assert "20.0 s, " in small
    assert "Mpx/s" not in small
    assert "20.0 s, 1.5 Mpx/s, " in large
    assert "111.0 s, 0.048 Mpx/s, " in slow


def test_a_measured_size_is_told_so_that_a_wrong_one_is_noticed(tmp_path, capsys):
    Terminal(shows_progress=False).finish(summary(tmp_path, measured_px=18.6))
    Terminal(shows_progress=False).finish(summary(tmp_path))
    JsonLines().finish(summary(tmp_path, measured_px=18.6))
    measured, given, event = capsys.readouterr().out.splitlines()
    assert "30 objects (taken to be 19 px across), " in measured
    assert "30 objects, " in given
    assert json.loads(event)["measured_diameter_px"] == 18.6


def test_lines_of_other_slides_stay_and_those_of_the_same_are_replaced(tmp_path):
    write_summary(tmp_path, [SlideOutcome(tmp_path / f"{n}.svs", summary(tmp_path, name=n)) for n in "ab"])
    again = [SlideOutcome(tmp_path / f"{n}.svs", summary(tmp_path, name=n, n_objects=7)) for n in "bc"]
    write_summary(tmp_path, again)
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == ["a", "b", "c"]
    assert [row["objects"] for row in rows][1:] == ["7", "7"]
    assert rows[0]["objects"] != "7"


def test_a_file_of_that_name_that_is_no_summary_is_replaced(tmp_path):
    (tmp_path / "summary.csv").write_bytes(b"\xff\xfe,something else\n")
    write_summary(tmp_path, [SlideOutcome(tmp_path / "a.svs", summary(tmp_path, name="a"))])
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 2


def test_lines_stay_where_another_program_has_marked_the_file(tmp_path):
    write_summary(tmp_path, [SlideOutcome(tmp_path / "a.svs", summary(tmp_path, name="a"))])
    path = tmp_path / "summary.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    write_summary(tmp_path, [SlideOutcome(tmp_path / "b.svs", summary(tmp_path, name="b"))])
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["slide", "a", "b"]


def test_a_table_of_somebody_s_own_is_kept_beside(tmp_path):
    path = tmp_path / "summary.csv"
    for number in (1, 2):
        path.write_text(f"name,note\na,mine {number}\n")
        write_summary(tmp_path, [SlideOutcome(tmp_path / "b.svs", summary(tmp_path, name="b"))])
        assert f"mine {number}" in (tmp_path / f"summary.{number}.csv").read_text()
        assert "note" not in path.read_text()


def test_a_result_that_was_left_as_it_is_keeps_its_line_with_the_error_beside_it(tmp_path):
    done = SlideOutcome(tmp_path / "x" / "f:g.svs", summary(tmp_path, name="f:g"))
    (tmp_path / "f_g").mkdir()
    (tmp_path / "f_g" / "run.json").touch()
    write_summary(tmp_path, [done])
    other = SlideOutcome(tmp_path / "g.svs", summary(tmp_path, name="g"))
    again = SlideOutcome(done.path, error="holds a complete result")
    write_summary(tmp_path, [again, other])
    namesake = SlideOutcome(tmp_path / "y" / "f:g.svs", error="holds a complete result")
    write_summary(tmp_path, [namesake, other])
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    told = [(line["slide"], line["state"], line["objects"], line["error"]) for line in lines]
    assert told == [
        ("f:g", "done", "30", "holds a complete result"),
        ("f:g", "failed", "", "holds a complete result"),
        ("g", "done", "30", ""),
    ]
    (tmp_path / "f_g" / "run.json").unlink()  # it does not stand any more
    write_summary(tmp_path, [again, other])
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        states = [line["state"] for line in csv.DictReader(file)]
    assert states == ["failed", "done"]
