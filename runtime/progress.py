"""How a command over many slides tells how it goes: to a person, or in lines of JSON to a program."""

from __future__ import annotations

import json
import time
from pathlib import PurePath
from typing import Any, Protocol

import click

from darcnn.runtime.errors import without_secrets
from darcnn.runtime.pipeline import RunSummary
from darcnn.runtime.readers.protocol import Location

__all__ = ["JsonLines", "Listener", "Terminal"]

_REDRAW_SECONDS = 0.2
_JSON_SECONDS = 1.0
_CLEAR_LINE = "\r\x1b[K"
_MIN_MEGAPIXELS = 1.0  # below it a speed says how long opening and writing took
_NAME_WIDTH = 24  # so that the progress line fits a terminal


class Listener(Protocol):
    """Who is told how a batch goes on."""

    def tell(self, words: str) -> None:
        """Something that a person may want to know."""
        ...

    def begin(self, path: Location, number: int, total: int) -> None:
        """Slide `number` (from 1) of `total` begins; of several done at once, each as it is finished."""
        ...

    def advance(self, done: int, total: int, /, *, n_objects: int = 0, megapixels: float = 0.0) -> None:
        """So many tiles of the current slide are done; in them so many objects, in so many Mpx of level 0."""
        ...

    def finish(self, summary: RunSummary) -> None:
        """The current slide is complete."""
        ...

    def fail(self, message: str) -> None:
        """The current slide failed, or between slides the command; `message` is one line."""
        ...


class Terminal:
    """Results to standard output; one progress line and errors to standard error."""

    def __init__(self, *, shows_progress: bool) -> None:
        self._shows_progress = shows_progress
        self._title = ""
        self._drawn = 0.0
        self._pace = _Pace()
        self.n_finished = 0

    def tell(self, words: str) -> None:
        """Print a line about what runs, where there is somebody to read it."""
        if self._shows_progress:
            click.echo(words, err=True)

    def warn(self, words: str) -> None:
        """Print a line that matters, whoever reads it."""
        click.echo(words, err=True)

    def show_phase(self, phase: str, done: int, total: int) -> None:
        """Draw how far an engine is compiled."""
        self._title = "building"
        self._draw(f"{phase} {done}/{total}")

    def begin(self, path: Location, number: int, total: int) -> None:
        """Remember what the progress line is about."""
        name = PurePath(without_secrets(path)).name
        name = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."
        self._title = f"[{number}/{total}] {name}"
        self._pace, self._drawn = _Pace(), 0.0
        self._draw("opening")

    def advance(self, done: int, total: int, /, *, n_objects: int = 0, megapixels: float = 0.0) -> None:
        """Draw the progress line, a few times a second."""
        self._pace.add(done, megapixels)
        now = time.monotonic()
        if done < total and now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        if done == total:
            self._draw("writing")
        else:
            tiles, pixels = self._pace.per_second()
            words = [f"{100 * done // total:3d} %", f"{tiles:.1f} tiles/s", _speed(pixels)]
            words.append(f"{n_objects:,} objects")
            if tiles:
                words.append(f"{(total - done) / tiles:.0f} s left")
            self._draw("  ".join(words))

    def finish(self, summary: RunSummary) -> None:
        """Print one line for a slide."""
        self._draw(None)
        objects = f"{summary.n_objects:,} object{'' if summary.n_objects == 1 else 's'}"
        self.n_finished += 1
        if summary.was_done:
            pace = "done before"
        else:
            pace = f"{summary.seconds:.1f} s"
            if summary.megapixels >= _MIN_MEGAPIXELS:
                pace += f", {_speed(summary.megapixels / max(summary.seconds, 1e-9))}"
        if summary.measured_px is not None and summary.n_objects:  # else it was not measured but assumed
            objects += f" (taken to be {summary.measured_px:.0f} px across)"
        click.echo(f"{summary.name}: {objects}, {pace}, {summary.overview}")
        for warning in summary.warnings:
            click.echo(f"{summary.name}: {warning}", err=True)

    def fail(self, message: str) -> None:
        """Print one line for a failure."""
        self._draw(None)
        click.echo(f"Error: {message}", err=True)

    def _draw(self, text: str | None) -> None:
        """Replace the progress line; None removes it."""
        if self._shows_progress:
            line = "" if text is None else f"{self._title}  {text}"
            click.echo(f"{_CLEAR_LINE}{line}", err=True, nl=False)


class JsonLines:
    """One JSON object a line on standard output: what happened, and how far the work is, once a second."""

    def __init__(self) -> None:
        self._pace = _Pace()
        self._slide: str | None = None  # between slides: what fails then is the whole command
        self._told = 0.0
        self.n_finished = 0

    def tell(self, words: str) -> None:
        """Say what runs."""
        _print({"event": "note", "text": words})

    warn = tell

    def show_phase(self, phase: str, done: int, total: int) -> None:
        """Say how far an engine is compiled."""
        _print({"event": "build", "phase": phase, "done": done, "total": total})

    def begin(self, path: Location, number: int, total: int) -> None:
        """Say that a slide begins."""
        self._slide, self._pace, self._told = without_secrets(path), _Pace(), 0.0
        _print({"event": "begin", "slide": self._slide, "number": number, "total": total})

    def advance(self, done: int, total: int, /, *, n_objects: int = 0, megapixels: float = 0.0) -> None:
        """Say how far the slide is, at most once a second and at its end."""
        self._pace.add(done, megapixels)
        now = time.monotonic()
        if done < total and now - self._told < _JSON_SECONDS:
            return
        self._told = now
        tiles, pixels = self._pace.per_second()
        _print(
            {
                "event": "progress",
                "slide": self._slide,
                "tiles": done,
                "tiles_total": total,
                "objects": n_objects,
                "tiles_per_second": round(tiles, 3),
                "megapixels_per_second": round(pixels, 3),
                "seconds_left": round((total - done) / tiles, 1) if tiles else None,
            }
        )

    def finish(self, summary: RunSummary) -> None:
        """Say what came of a slide."""
        self.n_finished += 1
        _print(
            {
                "event": "finish",
                "slide": self._slide,
                "folder": str(summary.folder),
                "objects": summary.n_objects,
                "objects_per_mm2": summary.objects_per_mm2,
                "measured_diameter_px": summary.measured_px,
                "seconds": round(summary.seconds, 3),
                "tiles_unreadable": summary.n_unreadable,
                "was_done": summary.was_done,
                "warnings": list(summary.warnings),
            }
        )
        self._slide = None

    def fail(self, message: str) -> None:
        """Say what went wrong."""
        _print({"event": "fail", "slide": self._slide, "error": message})
        self._slide = None


class _Pace:
    """How fast tiles come, since the first was reported: those of an earlier run come all at once."""

    def __init__(self) -> None:
        self._first: tuple[float, int, float] | None = None
        self._last = (0.0, 0, 0.0)  # when, tiles, Mpx

    def add(self, tiles: int, megapixels: float) -> None:
        self._last = (time.monotonic(), tiles, megapixels)
        self._first = self._first or self._last

    def per_second(self) -> tuple[float, float]:
        """Return tiles and Mpx a second, 0 while unknown."""
        first = self._first or self._last
        seconds = self._last[0] - first[0]
        if seconds <= 0:
            return 0.0, 0.0
        return (self._last[1] - first[1]) / seconds, (self._last[2] - first[2]) / seconds


def _speed(megapixels: float) -> str:
    """Return how much is done a second; of volumes, whose voxels are looked at many times, that is little."""
    return f"{megapixels:.{1 if megapixels >= 0.1 else 3}f} Mpx/s"


def _print(event: dict[str, Any]) -> None:
    click.echo(json.dumps(event))
