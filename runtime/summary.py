"""`summary.csv`: one line for each slide of a command."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from filelock import Timeout

from darcnn.runtime.errors import OutputError, without_secrets
from darcnn.runtime.pipeline import RunSummary
from darcnn.runtime.readers.base import make_slide_name
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.sinks.atomic import atomic_file, translated
from darcnn.runtime.sinks.result_folder import RUN_FILE, drop_lock, make_folder_name, take_lock

__all__ = ["SUMMARY_FILE", "SlideOutcome", "write_summary"]

SUMMARY_FILE = "summary.csv"
_LOCK = ".summary.lock"
_WAIT_SECONDS = 30
_COLUMNS = (
    "slide",
    "file",
    "state",
    "objects",
    "objects_per_mm2",
    "tissue_mm2",
    "tiles_unreadable",
    "seconds",
    "warnings",
    "error",
)
_FILE, _STATE = 1, 2
_OF_COMMAND = {_FILE, _STATE, _COLUMNS.index("seconds")}  # else a line tells of the result


@dataclass(frozen=True, slots=True)
class SlideOutcome:
    """What came of one slide of a command: a summary, or an error of one line."""

    path: Location
    summary: RunSummary | None = None
    error: str = ""
    below: Path = Path()  # the folder below that of all slides that the slide's own lies in


def write_summary(out_dir: Path, outcomes: Sequence[SlideOutcome]) -> None:
    """Write `out_dir`/summary.csv; areas are those that were looked at.

    Lines that another command wrote of other slides stay, above, and so does that of a result that was left
    as it is, with the error beside it. Nothing is written where no slide was done, nor where all were done
    before and have their lines: such results may lie on a disk that is read-only.

    Raises:
        OutputError: it cannot be written.
    """
    if all(outcome.summary is None for outcome in outcomes):
        return
    rows = [_row(outcome) for outcome in outcomes]
    if all(row[_STATE] == "done before" for row in rows) and _has_lines(out_dir / SUMMARY_FILE, rows):
        return
    with translated(out_dir), _alone(out_dir):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(_joined(_earlier_rows(out_dir / SUMMARY_FILE), rows, out_dir))
        with atomic_file(out_dir / SUMMARY_FILE) as file:
            file.write(text.getvalue().encode(errors="backslashreplace"))  # names that are no UTF-8


@contextmanager
def _alone(out_dir: Path) -> Iterator[None]:
    """Let other commands wait that write the summary of the same folder: none loses the other's lines."""
    try:
        lock = take_lock(out_dir / _LOCK, wait_s=_WAIT_SECONDS)
    except Timeout as err:
        raise OutputError(
            f"another run has been writing its {SUMMARY_FILE} for {_WAIT_SECONDS} s",
            where=out_dir,
            fix=f"end it; the slides are done, and running the command again writes {SUMMARY_FILE}",
        ) from err
    try:
        yield
    finally:
        if lock is not None:  # results need one, a table can do without
            drop_lock(lock)


def _has_lines(path: Path, rows: list[list[str]]) -> bool:
    """Tell whether a summary says what `rows` say of finished slides."""
    try:
        told = _read_rows(path)
    except OSError:
        return False
    results = [_of_result(row) for row in told or ()]
    return all(_of_result(row) in results for row in rows)


def _of_result(row: list[str]) -> list[str]:
    return [cell for column, cell in enumerate(row) if column not in _OF_COMMAND]


def _joined(earlier: list[list[str]], rows: list[list[str]], out_dir: Path) -> Iterator[list[str]]:
    """Yield the lines that stay of an earlier summary, then the new ones."""
    failed = {row[0]: row for row in rows if row[_STATE] == "failed"}
    names = {row[0] for row in rows}
    told: set[str] = set()
    for row in earlier:
        new = failed.get(row[0])
        stands = new is not None and row[_STATE] != "failed" and _has_result(out_dir, row[0])
        if stands and new is not None and new[_FILE] == row[_FILE]:
            told.add(row[0])
            yield [*row[:-1], new[-1]]
        elif stands or row[0] not in names:
            yield row
    yield from (row for row in rows if row[0] not in told)


def _has_result(out_dir: Path, name: str) -> bool:
    below, _, own = name.rpartition("/")
    return (out_dir / below / make_folder_name(own) / RUN_FILE).is_file()


def _earlier_rows(path: Path) -> list[list[str]]:
    """Return the lines of an earlier summary.

    A table with other columns, of somebody's own or an earlier version, is kept beside under another name.
    """
    try:
        rows = _read_rows(path)
    except FileNotFoundError:
        return []
    if rows is None:
        path.replace(_free_name(path))
    return rows or []


def _read_rows(path: Path) -> list[list[str]] | None:
    """Return the lines of a summary, None where it is a table with other columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # other programs put a mark before it
            header, *rows = csv.reader(file)
    except (ValueError, csv.Error):
        return None
    return [row for row in rows if len(row) == len(_COLUMNS)] if tuple(header) == _COLUMNS else None


def _free_name(path: Path) -> Path:
    """Return a name beside `path` that is not taken: summary.1.csv."""
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in count(1))
    return next(name for name in names if not name.exists())


def _row(outcome: SlideOutcome) -> list[str]:
    found = outcome.summary
    if found is None:
        return [
            _name(outcome, make_slide_name(outcome.path)),
            without_secrets(outcome.path),
            "failed",
            *[""] * (len(_COLUMNS) - 4),
            outcome.error,
        ]
    return [
        _name(outcome, found.name),
        without_secrets(outcome.path),
        "done before" if found.was_done else "done",
        str(found.n_objects),
        _number(found.objects_per_mm2, 1),
        _number(found.ground_mm2, 6),
        str(found.n_unreadable),
        "" if found.was_done else _number(found.seconds, 1),
        "; ".join(found.warnings),
        "",
    ]


def _name(outcome: SlideOutcome, name: str) -> str:
    return (outcome.below / name).as_posix()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
