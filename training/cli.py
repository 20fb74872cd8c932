"""`darcnn-train`: parse, call, exit code."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from darcnn.runtime.errors import EXIT_INTERRUPTED, EXIT_UNUSABLE, DarcnnError, UsageError
from darcnn.runtime.options import read_diameter

if TYPE_CHECKING:  # torch is imported inside the commands: --help is quick and works without it
    import torch

    from darcnn.runtime.volumes.options import AxisOption
    from darcnn.training.decisions import Decisions
    from darcnn.training.run import Run

__all__ = ["main"]


_RESUMABLE = {"source", "adapt", "refine", "run", "ablation"}  # commands


def main() -> None:
    """Run the command line; never shows a traceback for an error that a user can act on."""
    try:
        code = commands(standalone_mode=False)
    except click.ClickException as err:
        err.show()
        code = EXIT_UNUSABLE
    except (click.Abort, KeyboardInterrupt):
        goes_on = "; the same command with --resume goes on" if set(sys.argv[1:2]) & _RESUMABLE else ""
        click.echo(f"interrupted{goes_on}", err=True)
        code = EXIT_INTERRUPTED
    except DarcnnError as err:
        click.echo(str(err), err=True)
        code = EXIT_UNUSABLE
    except ModuleNotFoundError as err:
        if err.name is None or err.name.startswith("darcnn"):
            raise
        click.echo(f"darcnn-train: needs {err.name}; pip install 'darcnn[train]'", err=True)
        code = EXIT_UNUSABLE
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="darcnn")
def commands() -> None:
    """Learn objects from labelled photographs and adapt them to unlabelled images."""


def _stage_options(command: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("recipe", type=click.Path(path_type=Path)),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Folder of the run [default: runs/RECIPE NAME]"
        ),
        click.option(
            "--data", type=click.Path(path_type=Path), help="Data folder, in place of the recipe's."
        ),
        click.option("--resume", is_flag=True, help="Go on where an earlier run stopped."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto takes a GPU where there is one.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def _open_run(recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str) -> Iterator[Run]:
    """Yield the run that the options describe, joined with the other processes if torchrun started some."""
    from darcnn.training.config import read_recipe
    from darcnn.training.model.pretrained import channels_of, licence_of
    from darcnn.training.parallel import processes
    from darcnn.training.run import Run

    content = read_recipe(recipe)
    folder = data if data is not None else recipe.resolve().parent / content.data
    if not folder.is_dir():
        raise UsageError("no such data folder", where=folder, fix="pass --data with the folder of the images")
    content = replace(content, data=str(folder.resolve()))  # so that an export finds it from anywhere
    licence = licence_of(content.preset, content.weights, folder)
    if licence is not None and licence not in content.data_licence:
        content = replace(content, data_licence=f"{content.data_licence}; before that: {licence}")
    started = channels_of(content.weights, folder)
    if started not in (None, content.target.channels):
        click.echo(
            f"weights = {content.weights!r} learned from images of {started} channel(s), "
            f"target.channels is {content.target.channels}: is that meant?",
            err=True,
        )
    chosen = _device(device)
    with processes(chosen):
        yield Run(content, folder, out if out is not None else Path("runs") / content.name, resume, chosen)


def _device(name: str) -> torch.device:
    """Return the device called `name`; of several GPUs that of this process.

    Raises:
        UsageError: a GPU is asked for and there is none.
    """
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("PyTorch sees no GPU", where="--device cuda", fix="pass --device cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


_START = click.option(
    "--start", type=click.Path(path_type=Path), help="Checkpoint to start from [default: the stage before]"
)


@commands.command()
@_stage_options
def source(recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str) -> None:
    """Train a Mask R-CNN on the labelled photographs."""
    from darcnn.training.stages import run_source

    with _open_run(recipe, out, data, resume, device) as run:
        run_source(run)
        _tell(f"checkpoint: {run.out / 'source'}")


@commands.command()
@_stage_options
@_START
def adapt(
    recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str, start: Path | None
) -> None:
    """Stage 1: adapt the features to the unlabelled images."""
    from darcnn.training.stages import run_adapt

    with _open_run(recipe, out, data, resume, device) as run:
        run_adapt(run, start or run.out / "source")
        _tell(f"checkpoint: {run.out / 'adapt'}")


@commands.command()
@_stage_options
@_START
def refine(
    recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str, start: Path | None
) -> None:
    """Stage 2: learn from augmented pseudo-labels."""
    from darcnn.training.stages import run_refine

    with _open_run(recipe, out, data, resume, device) as run:
        run_refine(run, start or run.out / "adapt")
        _tell(f"checkpoint: {run.out / 'refine'}")


@commands.command()
@_stage_options
@click.option("--yes", is_flag=True, help="Do not ask whether the objects' size and polarity are right.")
def run(recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str, yes: bool) -> None:
    """Run all stages: source, adapt, refine.

    Before it adapts, it shows the size and polarity of the objects that it takes for granted and, in a
    terminal, asks whether they are right.
    """
    from darcnn.training.parallel import is_first
    from darcnn.training.report import write_report
    from darcnn.training.stages import run_all
    from darcnn.training.trust import most_trusted_round

    with _open_run(recipe, out, data, resume, device) as plan:

        def is_right(decisions: Decisions) -> bool:
            click.echo(f"{decisions.in_words()}; see {plan.out / 'decisions.png'}")
            if yes or sys.stdin.isatty():
                return yes or click.confirm("Go on?", default=True)
            click.echo("no terminal to ask in: taken for right, as with --yes", err=True)
            return True

        run_all(plan, is_right)
        if is_first():
            write_report(plan.out, plan.recipe)
        _tell(
            f"report: {plan.out / 'report.html'}\n"
            f"most trusted round: {most_trusted_round(plan.out).name}; next: "
            f"darcnn-export bundle {shlex.quote(str(plan.out))} --out {shlex.quote(plan.recipe.name)}.darcnn"
        )


def _tell(words: str) -> None:
    """Print `words`, once where several processes run."""
    from darcnn.training.parallel import is_first

    if is_first():
        click.echo(words)


@commands.command()
@_stage_options
def ablation(recipe: Path, out: Path | None, data: Path | None, resume: bool, device: str) -> None:
    """Train every arm of the paper's ablation and score it on the recipe's [ablation] images.

    Writes ablation.csv, ablation.md and ablation.png. Arms that are done are not run again with --resume.
    """
    from darcnn.training.ablation import run_ablation

    with _open_run(recipe, out, data, resume, device) as plan:
        run_ablation(plan)
        _tell(f"table: {plan.out / 'ablation.md'}")


@commands.command()
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--mpp", type=float, help="Micrometres per pixel of the images.")
@click.option(
    "--diameter",
    metavar="PX|auto",
    callback=read_diameter,
    help="Diameter of a typical object, pixels of the images; auto estimates it in each.",
)
@click.option("--pixels", is_flag=True, help="Take the pixels as they are.")
@click.option("--min-score", type=float, help="Objects below this score do not count.")
@click.option(
    "--axis",
    type=click.Choice(["auto", "z", "y", "x", "all"]),
    default="auto",
    show_default=True,
    help="Of volumes: the planes to look at, as for darcnn-run.",
)
@click.option("--unlabelled", is_flag=True, help="FOLDER has no labels: figures that need none.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here as well.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(path_type=Path),
    help="Write the figures of each image or volume here.",
)
def evaluate(
    model: str,
    folder: Path,
    mpp: float | None,
    diameter: float | Literal["auto"] | None,
    pixels: bool,
    min_score: float | None,
    axis: AxisOption,
    unlabelled: bool,
    json_path: Path | None,
    csv_path: Path | None,
) -> None:
    """Score MODEL (a bundle, the name of a shipped one, or a checkpoint folder) on a labelled FOLDER.

    FOLDER holds images/ and labels/ (16-bit PNG of the same names, one number an object). The figures
    of a checkpoint are noted in it and go into the training.json of a bundle made of it.

    With --unlabelled, FOLDER holds images alone, and MODEL is judged by whether it agrees with itself on
    mirrored, smaller and larger images and whether what it finds looks different from the rest.

    A FOLDER of volumes holds volumes/ and labels/ (TIFF stacks of the same names).
    """
    from darcnn.training.open_model import open_model

    if axis not in ("auto", "z") and unlabelled:
        raise UsageError("--unlabelled looks at planes across z", where="--axis", fix="leave it out")
    if axis != "auto" and not (unlabelled or (folder / "volumes").is_dir()):
        raise UsageError(
            f"means nothing to {folder}, which has no volumes/", where="--axis", fix="leave it out"
        )
    if unlabelled:
        from darcnn.training import unlabelled as trust

        with open_model(model, min_score=min_score) as segmenter:
            figures = trust.judge_folder(folder, segmenter, mpp=mpp, diameter_px=diameter, pixels=pixels)
        _give(trust.as_table(figures), json_path)
        if csv_path is not None:
            trust.write_csv(figures, csv_path)
        return

    if (folder / "volumes").is_dir():
        from darcnn.training.evaluate_volumes import as_rows, by_volume, evaluate_volumes

        if mpp is not None:
            raise UsageError("means nothing to volumes", where="--mpp", fix="pass --diameter, in voxels")

        with open_model(model, min_score=min_score) as segmenter:
            found = evaluate_volumes(folder, segmenter, diameter_px=diameter, pixels=pixels, axis=axis)
        table, singly, of = as_rows(found), by_volume(found), "volume"
    else:
        from darcnn.training import evaluate as images

        with open_model(model, min_score=min_score) as segmenter:

            def segment(reader: Any) -> Any:
                return segmenter(reader, mpp=mpp, diameter_px=diameter, pixels=pixels)

            result = images.evaluate_folder(folder, segment)
        table, singly, of = images.as_rows(result), images.by_image(result), "image"
    _give(table, json_path)
    if csv_path is not None:
        from darcnn.training.writing import write_csv

        write_csv(singly, csv_path, of=of)
    _note(model, folder, table)  # a checkpoint may lie where nothing can be written


def _note(model: str, folder: Path, table: dict[str, dict[str, float]]) -> None:
    """Keep the figures of a checkpoint in it."""
    from darcnn.training.open_model import is_checkpoint

    if is_checkpoint(model):
        from darcnn.training.checkpoint import record_figures
        from darcnn.training.trust import checkpoint_in

        place = folder.resolve()
        record_figures(checkpoint_in(Path(model)), f"{place.parent.name}/{place.name}", table)


def _give(table: dict[str, dict[str, float]], json_path: Path | None) -> None:
    """Print the table, and write it where asked."""
    click.echo(_as_text(table))
    if json_path is not None:
        from darcnn.training.writing import new_file

        with new_file(json_path) as temporary:
            temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")


def _as_text(table: dict[str, dict[str, float]]) -> str:
    width = max(len(row) for row in table)
    figures = next(iter(table.values()))
    lines = [" " * width + "  ".join(["", *(f"{name:>10}" for name in figures)])]
    for row, values in table.items():
        lines.append(f"{row:<{width}}" + "  ".join(["", *(f"{v:10.4f}" for v in values.values())]))
    return "\n".join(lines)
