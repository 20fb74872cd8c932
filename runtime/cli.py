"""`darcnn-run`: find the objects of slides and images and write them to files."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import click

from darcnn.runtime.batch import HERE, Finders, run_batch
from darcnn.runtime.cores import usable_cores
from darcnn.runtime.errors import EXIT_INTERRUPTED, EXIT_UNUSABLE, DarcnnError, UsageError
from darcnn.runtime.options import BACKENDS, read_diameter, read_window
from darcnn.runtime.pipeline import RunOptions
from darcnn.runtime.progress import JsonLines, Terminal
from darcnn.runtime.readers.ome_zarr import is_url
from darcnn.runtime.record import installed_version
from darcnn.runtime.run_options import EXTRA_FORMATS
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.slide_list import find_unread, list_slides
from darcnn.runtime.volumes.options import (
    EXTRA_VOLUME_FORMATS,
    AxisOption,
    VolumeOptions,
    parse_voxel_size,
)

__all__ = ["main"]


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
    required=True,
    metavar="PATH",
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
@click.option(
    "--engine",
    type=click.Path(path_type=Path, file_okay=False),
    help="Run this engine, a folder that darcnn-export engine --out wrote of the model.",
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
@click.option(
    "--window",
    metavar="LOW,HIGH",
    callback=read_window,
    help="Raw values that become black and white, in place of the model's rule: 0,4095 for 12 bits.",
)
@click.option("--channel", metavar="N|NAME", help="Which of several channels, by number (from 0) or name.")
@click.option("--z", type=click.IntRange(min=0), help="Only this plane of a volume, from 0.")
@click.option("--t", type=click.IntRange(min=0), help="Which time point of a series, from 0.")
@click.option("--series", is_flag=True, help="The planes of a stack are time points, whatever the file says.")
@click.option(
    "--project", is_flag=True, help="Of stacks at several time points: the brightest of each, as a series."
)
@click.option(
    "--axis",
    type=click.Choice(["auto", "z", "y", "x", "all"]),
    default="auto",
    show_default=True,
    help="Of a volume: the planes to look at; all: what two axes agree on, three times the work; "
    "auto: all for models of tomograms, else z.",
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
@click.option(
    "--min-score", type=click.FloatRange(0, 1), help="Leave out objects below this score; else the model's."
)
@click.option(
    "--filter",
    "row_filter",
    metavar="CONDITION",
    help='Report only objects that satisfy it, "mean_intensity < 140 and area_um2 > 20" say; columns may be '
    "compared and reckoned with (+ - * /).",
)
@click.option(
    "--tissue/--no-tissue",
    default=True,
    show_default=True,
    help="Leave out glass and empty background.",
)
@click.option(
    "--roi",
    metavar="X0,Y0,X1,Y1|GEOJSON",
    help="Report only objects inside: a rectangle in pixels of the slide, or polygons drawn in QuPath.",
)
@click.option(
    "--also",
    multiple=True,
    type=click.Choice(tuple(dict.fromkeys((*EXTRA_FORMATS, *EXTRA_VOLUME_FORMATS)))),
    help="Write this format too; repeatable. A finished slide gets it without being done again. "
    "labels-mrc is for volumes, ctc for series.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Compute in so many processes on this machine; extra cluster.",
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="Compute on the workers of this Dask scheduler: tcp://host:8786."
)
@click.option("--overwrite", is_flag=True, help="Replace complete results.")
@click.option("--restart", is_flag=True, help="Begin anew what an earlier run left unfinished.")
@click.option("--quiet", is_flag=True, help="No progress line.")
@click.option("--json", "as_json", is_flag=True, help="Progress and results as lines of JSON, for programs.")
@click.version_option(installed_version(), prog_name="darcnn-run")
def main(
    inputs: tuple[str, ...],
    *,
    model: str,
    out: str,
    device: str,
    backend: str,
    engine: Path | None,
    build: bool,
    mpp: float | None,
    pixels: bool,
    diameter: float | Literal["auto"] | None,
    window: tuple[float, float] | None,
    channel: str | None,
    z: int | None,
    t: int | None,
    series: bool,
    project: bool,
    axis: AxisOption,
    slab: int | None,
    voxel_size: tuple[float, float, float] | None,
    min_score: float | None,
    row_filter: str | None,
    tissue: bool,
    roi: str | None,
    also: tuple[str, ...],
    workers: int | None,
    scheduler: str | None,
    overwrite: bool,
    restart: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Find the objects of slides, images and volumes: INPUT is a file, a folder, a pattern or a URL.

    A file of several images stands for all of them; FILE/3 is one, counted from 0.

    One line a slide goes to standard output. The exit code is 0 when every slide is done, 1 when some
    failed or have damaged tiles, 2 when nothing usable was made, 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that it cannot encode stops no batch
        sys.stdout.reconfigure(errors="backslashreplace")
    options = RunOptions(
        mpp=mpp,
        pixels=pixels,
        diameter_px=diameter,
        channel=channel,
        window=window,
        z=z,
        t=t,
        tissue=tissue,
        roi=roi,
        row_filter=row_filter,
        also=tuple(one for one in dict.fromkeys(also) if one in EXTRA_FORMATS),
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
        series=series,
        project=project,
        channel=options.channel,
        window=window,
        row_filter=row_filter,
        also=tuple(one for one in dict.fromkeys(also) if one in EXTRA_VOLUME_FORMATS),
        overwrite=overwrite,
        restart=restart,
    )
    # what tifffile logs of a damaged file would stand beside our one line about it
    logging.getLogger("tifffile").addHandler(logging.NullHandler())
    shows_progress = not quiet and sys.stderr.isatty()
    terminal = JsonLines() if as_json else Terminal(shows_progress=shows_progress)
    try:
        from darcnn.runtime.load import load  # here, so that --help need not load an engine

        out_dir, slides = _read_out(out), list_slides(inputs)
        for line in find_unread(inputs):
            terminal.warn(line)
        if build and engine is not None:
            raise UsageError("goes without --engine", where="--build", fix="pass one of them")
        if build:
            _build_engine(model, backend, terminal)
        load_model = partial(load, _absolute(model), device=device, backend=backend, min_score=min_score)
        if engine is not None:
            load_model = partial(load_model, engine=engine.resolve())  # whole, for workers elsewhere
        with (
            _open_finders(load_model, workers, scheduler, options) as finders,
            load_model(tell=terminal.tell) as segmenter,
        ):
            outcome = run_batch(
                segmenter,
                slides,
                out_dir,
                options=options,
                volume_options=volume_options,
                listener=terminal,
                finders=finders,
            )
        code = outcome.exit_code
    except DarcnnError as err:
        terminal.fail(str(err))
        code = EXIT_UNUSABLE if not terminal.n_finished else 1
    except KeyboardInterrupt:
        terminal.fail(_after_interruption(overwrite=overwrite, restart=restart))
        code = EXIT_INTERRUPTED
    sys.exit(code)


def _read_out(text: str) -> Path:
    """Return the folder that --out names: not every shell expands the `~` of --out=~/results."""
    if is_url(text):
        raise UsageError("is a URL", where="--out", fix="give a folder and upload the results")
    return Path(os.path.expanduser(text))  # noqa: PTH111  # raises of no name


def _after_interruption(*, overwrite: bool, restart: bool) -> str:
    if overwrite:
        rest = "" if restart else ", and goes on with the one that is not"
        return f"interrupted; for --overwrite, the same command does finished slides again{rest}"
    without = " without --restart" if restart else ""
    return f"interrupted; the same command{without} goes on where it stopped"


def _absolute(model: str) -> str:
    """Return the whole path of a bundle, for workers that run elsewhere; a name stays."""
    return str(Path(model).resolve()) if os.path.isfile(model) else model  # noqa: PTH113  # raises of no name


@contextmanager
def _open_finders(
    load_model: partial[Segmenter], workers: int | None, scheduler: str | None, options: RunOptions
) -> Iterator[Finders]:
    """Give who finds the objects: this process, processes on this machine, or those of a scheduler."""
    if workers is None and scheduler is None:
        yield HERE
        return
    if workers is not None and scheduler is not None:
        raise UsageError("goes without --scheduler", where="--workers", fix="pass one of them")
    try:
        from darcnn.runtime.cluster import open_cluster
    except ImportError as err:
        option = "--scheduler" if workers is None else "--workers"
        raise UsageError("needs Dask", where=option, fix="run `pip install 'darcnn[cluster]'`") from err
    if workers is not None:  # the cores are shared out
        load_model = partial(load_model, threads=max(1, usable_cores() // workers))
    with open_cluster(load_model, n_workers=workers, scheduler=scheduler, z=options.z, t=options.t) as runner:
        yield Finders(runner.find_rows, runner.find_blocks, runner.run_pictures)


def _build_engine(model: str, backend: str, terminal: Terminal | JsonLines) -> None:
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
    if not has_engine(bundle, backend):
        targets = (gpu_capability(),) if backend == "tensorrt-rtx" else ()
        build_engine(bundle, BuildOptions(backend, targets), progress=terminal.show_phase)
