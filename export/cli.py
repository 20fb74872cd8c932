"""`darcnn-export`: trained networks to model bundles, and bundles checked against their networks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from darcnn.export.parity import (
    Parity,
    compare_bundles,
    compare_runtimes,
    compare_with_checkpoint,
    limits_of,
)
from darcnn.export.printing import describe_bundle, parity_record, parity_table, to_json
from darcnn.runtime.bundle import MEMBER_CAPS, Bundle
from darcnn.runtime.engines.tensorrt_build import BACKENDS as TENSORRT
from darcnn.runtime.engines.tensorrt_build import MAX_WORKSPACE_MIB, BuildOptions, build_engine
from darcnn.runtime.errors import (
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    EXIT_UNUSABLE,
    DarcnnError,
    InputError,
    OutputError,
    UsageError,
)
from darcnn.runtime.load import find_bundle, names_bundle
from darcnn.runtime.manifest import check_name
from darcnn.runtime.options import BACKENDS
from darcnn.runtime.sinks.atomic import atomic_file, translated

__all__ = ["cli", "main"]

_NEEDS = ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript")  # of what exports a network

_folder = click.Path(path_type=Path, file_okay=False)
_file = click.Path(path_type=Path, dir_okay=False)
_precision = click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="fp16: layers in half precision, boxes and scores in float32; derived from the bundle.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit: 0 success, 1 verification failed, 2 nothing usable, 130 interrupted."""
    try:
        code = cli.main(
            None if arguments is None else list(arguments), "darcnn-export", standalone_mode=False
        )
    except DarcnnError as err:
        click.echo(str(err), err=True)
        code = EXIT_UNUSABLE
    except click.ClickException as err:
        err.show()
        code = EXIT_UNUSABLE
    except (click.Abort, KeyboardInterrupt):
        code = EXIT_INTERRUPTED
    sys.exit(code or 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Turn trained networks into model bundles, and check bundles."""


@cli.command()
@click.argument("source")
@click.option("--out", required=True, type=_file, help="The bundle to write, NAME.darcnn.")
@click.option("--name", help="Name of the model; the recipe's by default, or the bundle's.")
@click.option("--tile", type=int, help="Side of a tile, pixels; the recipe's by default, or the bundle's.")
@click.option("--batch", type=int, help="Tiles per call; 1 by default, or the bundle's.")
@click.option("--proposals", type=int, help="Candidates a level, and proposals of a tile; 400 by default.")
@click.option("--detections", type=int, help="Most objects of a tile; 256 by default.")
@click.option("--mask-batch", type=int, help="Objects per call of the mask graph; 64 by default.")
@click.option(
    "--min-score",
    type=float,
    help="What scores less is not reported; the recipe's by default, or the bundle's.",
)
@click.option("--data", type=_folder, help="Images to verify on; the recipe's by default, or in their place.")
@click.option("--licence", type=_file, help="Text of the model's licence.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
def bundle(
    source: str,
    out: Path,
    name: str | None,
    min_score: float | None,
    data: Path | None,
    licence: Path | None,
    overwrite: bool,
    **sizes: int | None,
) -> None:
    """Export SOURCE, a folder that darcnn-train wrote, and write the bundle if it agrees with PyTorch.

    Of the folder of a whole run, the round that is trusted most on the unlabelled images is taken. SOURCE
    may be a bundle too, or the name of a shipped model: the same network with another --tile or --batch.
    """
    _require(*_NEEDS)
    from darcnn.export.draft import Sizes, draft_of_bundle, draft_of_checkpoint, write_verified

    _check_place(out, overwrite)
    if name is not None:
        _check_model_name(name, "--name")
    wanted = Sizes(tile_px=sizes.pop("tile"), **sizes)
    terms = None if licence is None else _read_licence(licence)
    if names_bundle(source):
        draft = draft_of_bundle(find_bundle(source), wanted, name=name, data=data, licence=terms)
        _tell(f"exporting {draft.manifest.name} anew: some half a minute for tiles of 512 px")
    else:
        folder = Path(source)
        draft = draft_of_checkpoint(folder, wanted, name=name, data=data, licence=terms, tell=_tell)
    if min_score is not None:
        draft = draft.reporting(min_score)
    parity = write_verified(out, draft)
    click.echo(parity_table(parity), err=True)
    if not parity.n_objects:
        raise _no_object()
    if not parity.agrees:
        raise InputError(
            f"the exported graphs do not agree with PyTorch: {', '.join(parity.complaints)}",
            where=source,
            fix="nothing was written; report this with the checkpoint",
        )
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@cli.command()
@click.argument("model")
@click.option("--checkpoint", type=_folder, help="The folder that the bundle was made of.")
@click.option("--data", type=_folder, help="Images to verify on; the recipe's by default.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice([name for name in BACKENDS if name not in ("auto", "openvino-bf16")]),
    help="What runs the bundle, repeatable; by default ONNX Runtime, and OpenVINO where it is installed.",
)
@_precision
@click.option("--json", "record", type=_file, help="Write rows, versions, limits and the verdict here.")
def verify(
    model: str,
    checkpoint: Path | None,
    data: Path | None,
    backends: tuple[str, ...],
    precision: str,
    record: Path | None,
) -> int:
    """Compare MODEL with the checkpoint that it was made of; exit code 1 where they disagree.

    Without a checkpoint, what runs it is compared: each backend with the bundle itself in ONNX Runtime.
    """
    if record is not None:
        _check_place(record, overwrite=True)
    opened = find_bundle(model)
    derived = _in_precision(opened, precision)
    limits_of(derived.precision, str(opened.path))
    has_openvino = importlib.util.find_spec("openvino") is not None
    backends = backends or ("onnxruntime", *(["openvino"] if has_openvino else []))
    if checkpoint is None:
        found = compare_runtimes(opened, derived, data, backends, tell=_tell)
    else:
        _require(*_NEEDS)
        found = compare_with_checkpoint(derived, checkpoint, data, backends, tell=_tell)
    compared: dict[str, Parity] = {}
    for backend, parity in found:
        compared[backend] = parity
        click.echo(f"{backend}\n{parity_table(parity)}")
    if record is not None:
        with translated(record), atomic_file(record) as file:
            file.write(to_json(parity_record(derived, compared)))
    return 0 if all(parity.agrees for parity in compared.values()) else EXIT_PARTIAL


@cli.command()
@click.argument("model")
@click.option(
    "--backend",
    type=click.Choice(list(TENSORRT)),
    default="tensorrt-rtx",
    show_default=True,
    help="tensorrt compiles on the GPU that is to run it; tensorrt-rtx anywhere.",
)
@click.option(
    "--target", "targets", multiple=True, help="GPUs to compile for, sm86 say; tensorrt-rtx only, repeatable."
)
@_precision
@click.option(
    "--workspace", type=click.IntRange(1, MAX_WORKSPACE_MIB), help="Most scratch memory of a layer, MiB."
)
@click.option("--version-compatible", is_flag=True, help="Later versions run it too; tensorrt only.")
@click.option("--out", type=_folder, help="Folder to write; the user's cache by default, where runs look.")
@click.option("--overwrite", is_flag=True, help="Replace what is in the folder --out.")
def engine(
    model: str,
    backend: str,
    targets: tuple[str, ...],
    precision: str,
    workspace: int | None,
    version_compatible: bool,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Compile the graphs of MODEL, a bundle or the name of a shipped one, into a TensorRT engine."""

    def show(phase: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{phase} {done}/{total}", err=True, nl=False)

    options = BuildOptions(backend, targets, workspace, version_compatible)
    opened = _in_precision(find_bundle(model), precision)
    try:
        folder = build_engine(opened, options, out=out, overwrite=overwrite, progress=show)
    finally:
        if sys.stderr.isatty():
            click.echo("\r\x1b[K", err=True, nl=False)
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


@cli.command()
@click.argument("model")
@click.option("--data", required=True, type=_folder, help="Images like those that the model is to see.")
@click.option("--diameter", type=float, help="Typical object, pixels; for images without a pixel size.")
@click.option("--tiles", default=16, show_default=True, type=click.IntRange(1), help="To calibrate on.")
@click.option("--tensorrt", is_flag=True, help="Without offsets, as TensorRT needs it; slow on ONNX Runtime.")
@click.option("--out", required=True, type=_file, help="The bundle to write, NAME.darcnn.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
def quantise(
    model: str,
    data: Path,
    diameter: float | None,
    tiles: int,
    tensorrt: bool,
    out: Path,
    overwrite: bool,
) -> None:
    """Write MODEL as a bundle whose encoders compute in int8, calibrated on unlabelled images.

    Score both on labelled images (darcnn-train evaluate) before you use it: findings differ.
    """
    _require("onnx")
    from darcnn.export.quantise import quantise as to_int8
    from darcnn.export.quantise import write_quantised
    from darcnn.export.tiles import images_in, read_tiles

    _check_place(out, overwrite)
    _check_model_name(out.stem, "--out")
    opened = find_bundle(model)
    chosen = read_tiles(images_in(data, diameter), opened, limit=tiles)
    few = "" if len(chosen) == tiles else f" of the {tiles} asked for: give more images"
    click.echo(f"calibrating on {len(chosen)} tiles{few}", err=True)
    quantised = to_int8(opened, list(chosen.values()), has_offsets=not tensorrt)
    parity = compare_bundles(opened, quantised, chosen, backend="onnxruntime")
    if not parity.n_objects:
        raise _no_object()
    write_quantised(out, opened, quantised, n_tiles=len(chosen), has_offsets=not tensorrt)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    click.echo(f"on these tiles, {parity.unmatched:.0%} of its objects and of those in float32 are unmatched")


@cli.command()
@click.argument("model")
@click.option("--out", required=True, type=_folder, help="The model repository; others in it stay.")
@click.option("--engine", type=_folder, help="Serve this TensorRT engine of MODEL instead of its graphs.")
@click.option("--overwrite", is_flag=True, help="Replace what the repository has of this model.")
def triton(model: str, out: Path, engine: Path | None, overwrite: bool) -> None:
    """Write a repository from which Triton Inference Server serves MODEL: NAME_detect and NAME_mask."""
    from darcnn.export.triton import plan_repository, write_repository
    from darcnn.runtime.engines.engine_cache import read_engine

    opened = find_bundle(model)
    graphs = plan_repository(opened, None if engine is None else read_engine(engine, opened))
    write_repository(out, graphs, overwrite=overwrite)
    click.echo("\n".join(str(out / graph.name) for graph in graphs))


@cli.command()
@click.argument("model")
def info(model: str) -> None:
    """Say what MODEL, a bundle or the name of a shipped one, is: sizes, hashes, figures of its training."""
    click.echo("\n".join(describe_bundle(find_bundle(model))))


def _check_place(out: Path, overwrite: bool) -> None:
    """Refuse a place where nothing can be written, before the work is done."""
    with translated(out):
        exists = out.exists()
    if exists and not overwrite:
        raise OutputError("exists already", where=out, fix="pass --overwrite, or choose another name")
    if not out.parent.is_dir():
        raise OutputError(
            "its folder does not exist", where=out, fix="make the folder, or choose another name"
        )
    if not os.access(out.parent, os.W_OK):
        raise OutputError("its folder may not be written", where=out, fix="choose another folder")


def _check_model_name(name: str, where: str) -> None:
    try:
        check_name(name)
    except ValueError as err:
        raise UsageError(f"no model may have this name ({err})", where=where, fix="give another one") from err


def _no_object() -> InputError:
    problem = "the model finds no object on any of the images, so that nothing can be compared"
    return InputError(problem, where="--data", fix="give images on which it does; nothing was written")


def _in_precision(bundle: Bundle, precision: str) -> Bundle:
    if precision == "fp32":
        return bundle
    _require("onnx")
    from darcnn.export.half import derive_half

    return derive_half(bundle)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        install = "'darcnn[export]'" if len(packages) > 1 else missing[0]
        raise UsageError(
            f"needs {', '.join(missing)}", where="darcnn-export", fix=f"run pip install {install}"
        )


def _tell(words: str) -> None:
    click.echo(words, err=True)


def _read_licence(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("cannot be read as text", where=path, fix="give a text file in UTF-8") from err
    if len(text.encode()) > MEMBER_CAPS["LICENSE"]:
        raise InputError("is longer than 1 MiB", where=path, fix="give a shorter text")
    return text
