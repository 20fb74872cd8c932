"""`darcnn-run`: find the objects of slides and images and write them to files."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Literal

import click

from darcnn.runtime.batch import list_slides, run_batch
from darcnn.runtime.errors import EXIT_INTERRUPTED, EXIT_UNUSABLE, DarcnnError, UsageError
from darcnn.runtime.options import BACKENDS, read_diameter
from darcnn.runtime.pipeline import RunOptions, RunSummary
from darcnn.runtime.record import installed_version
from darcnn.runtime.volumes.options import VolumeOptions, parse_voxel_size

__all__ = ["main"]

_REDRAW_SECONDS = 0.2
_CLEAR_LINE = "\r\x1b[K"
_NAME_WIDTH = 40  # so that the progress line fits a terminal


def _show_machine(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from darcnn.runtime.engines.choose import examine_machine

        click.echo("\n".join(examine_machine()))
        context.exit()


def _read_voxel_size(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, float, float] | None:
    try:
        return None if text is None else parse_voxel_size(text)
    except UsageError as err:
        raise click.BadParameter(f"{err.problem}; {err.fix}") from err


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--model", required=True, metavar="NAME_OR_BUNDLE", help="A model's name, or a .darcnn bundle file."
)
@click.option(
    "--out",
    "out_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="Where results go: OUT/<slide name>/.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="What computes.",
)
@click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="What runs the graphs; tensorrt and tensorrt-rtx need an engine: darcnn-export engine, or --build.",
)
@click.option("--build", is_flag=True, help="Compile an engine for --backend first if none fits.")
@click.option(
    "--doctor",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_machine,
    help="Say what this machine offers, and exit.",
)
@click.option(
    "--mpp",
    type=click.FloatRange(min=0, min_open=True),
    help="Micrometres per pixel, in place of what the file says.",
)
@click.option("--pixels", is_flag=True, help="Take the pixels as they are, whatever their size.")
@click.option(
    "--diameter",
    metavar="PX|auto",
    callback=read_diameter,
    help="Diameter of a typical object in pixels of the image, or auto to estimate it; decides the scale.",
)
@click.option("--channel", metavar="N|NAME", help="Which of several channels, by number (from 0) or name.")
@click.option("--z", type=click.IntRange(min=0), help="Only this plane of a volume, from 0.")
@click.option("--t", type=click.IntRange(min=0), help="Which moment of a series, from 0.")
@click.option(
    "--axis",
    type=click.Choice(["z", "y", "x", "all"]),
    default="z",
    show_default=True,
    help="Of a volume: the planes to look at; all: what two axes agree on.",
)
@click.option(
    "--slab", type=click.IntRange(1, 99), help="Of a volume: planes averaged into one, an odd number."
)
@click.option(
    "--voxel-size",
    metavar="SIZE",
    callback=_read_voxel_size,
    help="Of a volume: 1.35 (nm), 13.5A or Z,Y,X, in place of what the file says.",
)
@click.option("--labels-mrc", is_flag=True, help="Of a volume: write labels.mrc too.")
@click.option(
    "--min-score", type=click.FloatRange(0, 1), help="Leave out objects below this score; else the model's."
)
@click.option(
    "--filter",
    "row_filter",
    metavar="CONDITION",
    help='Report only objects that satisfy it, "mean_intensity < 140 and area_um2 > 20" say.',
)
@click.option("--overwrite", is_flag=True, help="Replace complete results.")
@click.option("--restart", is_flag=True, help="Begin anew what an earlier run left unfinished.")
@click.option("--quiet", is_flag=True, help="No progress line.")
@click.version_option(installed_version(), prog_name="darcnn-run")
def main(
    inputs: tuple[str, ...],
    *,
    model: str,
    out_dir: Path,
    device: str,
    backend: str,
    build: bool,
    mpp: float | None,
    pixels: bool,
    diameter: float | Literal["auto"] | None,
    channel: str | None,
    z: int | None,
    t: int | None,
    axis: Literal["z", "y", "x", "all"],
    slab: int | None,
    voxel_size: tuple[float, float, float] | None,
    labels_mrc: bool,
    min_score: float | None,
    row_filter: str | None,
    overwrite: bool,
    restart: bool,
    quiet: bool,
) -> None:
    """Find the objects of slides, images and volumes: INPUT is a file, a folder of images or a pattern.

    One line a slide goes to standard output. The exit code is 0 when every slide is done, 1 when some
    failed, 2 when nothing usable was made, 130 after Ctrl-C.
    """
    options = RunOptions(
        mpp=mpp,
        pixels=pixels,
        diameter_px=diameter,
        channel=int(channel) if channel is not None and channel.isdecimal() else channel,
        z=z,
        t=t,
        row_filter=row_filter,
        overwrite=overwrite,
        restart=restart,
    )
    volume_options = VolumeOptions(
        axis=axis,
        n_joined=slab,
        voxel_nm=voxel_size,
        diameter_px=diameter,
        pixels=pixels,
        t=t,
        channel=options.channel,
        row_filter=row_filter,
        labels_mrc=labels_mrc,
        overwrite=overwrite,
        restart=restart,
    )
    # what tifffile logs of a damaged file would stand beside our one line about it
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    terminal = _Terminal(shows_progress=not quiet and sys.stderr.isatty())
    try:
        from darcnn.runtime.load import load  # here, so that --help need not load an engine

        slides = list_slides(inputs)
        if build:
            _build_engine(model, backend, terminal)
        with load(
            model, device=device, backend=backend, min_score=min_score, tell=terminal.tell
        ) as segmenter:
            outcome = run_batch(
                segmenter,
                slides,
                out_dir,
                options=options,
                volume_options=volume_options,
                listener=terminal,
            )
        code = outcome.exit_code
    except DarcnnError as err:
        terminal.fail(str(err))
        code = EXIT_UNUSABLE if not terminal.n_finished else 1
    except KeyboardInterrupt:
        terminal.fail("interrupted; the same command goes on where it stopped")
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _build_engine(model: str, backend: str, terminal: _Terminal) -> None:
    """Compile an engine of `model` into the user's cache, unless one fits already."""
    from darcnn.runtime.engines.cuda import gpu_capability
    from darcnn.runtime.engines.tensorrt import has_engine
    from darcnn.runtime.engines.tensorrt_build import BACKENDS as TENSORRT
    from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_engine

    if backend not in TENSORRT:
        raise UsageError(
            f"{backend} compiles nothing", where="--build", fix=f"pass --backend {' or '.join(TENSORRT)}"
        )
    from darcnn.runtime.load import find_bundle

    bundle = find_bundle(model)
    targets = (gpu_capability(),) if backend == "tensorrt-rtx" else ()
    if not has_engine(bundle, backend):
        build_engine(bundle, BuildOptions(backend, targets), progress=terminal.show_phase)


class _Terminal:
    """Results to standard output; one progress line and errors to standard error."""

    def __init__(self, *, shows_progress: bool) -> None:
        self._shows_progress = shows_progress
        self._title = ""
        self._started = self._drawn = 0.0
        self.n_finished = 0

    def tell(self, words: str) -> None:
        """Print a line about what runs, where there is somebody to read it."""
        if self._shows_progress:
            click.echo(words, err=True)

    def show_phase(self, phase: str, done: int, total: int) -> None:
        """Draw how far an engine is compiled."""
        self._title = "building"
        self._draw(f"{phase} {done}/{total}")

    def begin(self, path: Path, number: int, total: int) -> None:
        """Remember what the progress line is about."""
        name = path.name if len(path.name) <= _NAME_WIDTH else f"{path.name[: _NAME_WIDTH - 3]}..."
        self._title = f"[{number}/{total}] {name}"
        self._started, self._drawn = time.monotonic(), 0.0
        self._draw("opening")

    def advance(self, done: int, total: int) -> None:
        """Draw the progress line, a few times a second."""
        now = time.monotonic()
        if done < total and now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        if done == total:
            self._draw("writing")
        else:
            left = (now - self._started) / done * (total - done)
            self._draw(f"{100 * done // total:3d} %  tile {done}/{total}  {left:.0f} s left")

    def finish(self, summary: RunSummary) -> None:
        """Print one line for a slide."""
        self._draw(None)
        objects = f"{summary.n_objects:,} object{'' if summary.n_objects == 1 else 's'}"
        self.n_finished += 1
        if summary.was_done:
            click.echo(f"{summary.name}: {objects}, done before, {summary.overview}")
            return
        speed = summary.megapixels / max(summary.seconds, 1e-9)
        click.echo(
            f"{summary.name}: {objects}, {summary.seconds:.1f} s, {speed:.1f} Mpx/s, {summary.overview}"
        )
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
