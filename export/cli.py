"""`darcnn-export`: trained networks to model bundles, and bundles checked against their networks."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from darcnn.export.printing import describe_bundle, parity_table
from darcnn.runtime.bundle import Bundle, open_bundle, write_bundle
from darcnn.runtime.engines.tensorrt_build import BACKENDS as TENSORRT
from darcnn.runtime.engines.tensorrt_build import BuildOptions, build_engine
from darcnn.runtime.errors import (
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    EXIT_UNUSABLE,
    DarcnnError,
    InputError,
    OutputError,
    UsageError,
)
from darcnn.runtime.load import find_bundle
from darcnn.runtime.manifest import Manifest
from darcnn.runtime.options import BACKENDS

if TYPE_CHECKING:
    from darcnn.export.parity import Parity
    from darcnn.export.tiles import TileSource
    from darcnn.training.config import Recipe
    from darcnn.training.model.network import Darcnn

__all__ = ["cli", "main"]

_NEEDS = ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript")

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
@click.argument("checkpoint", type=_folder)
@click.option("--out", required=True, type=_file, help="The bundle to write, NAME.darcnn.")
@click.option("--name", help="Name of the model; the recipe's by default.")
@click.option("--tile", type=int, help="Side of a tile, pixels; the recipe's by default.")
@click.option("--batch", type=int, default=1, show_default=True, help="Tiles per call.")
@click.option("--proposals", type=int, help="Candidates a level, and proposals of a tile; 400 by default.")
@click.option("--detections", type=int, help="Most objects of a tile; 256 by default.")
@click.option("--data", type=_folder, help="Images to verify on; the recipe's by default, or in their place.")
@click.option("--licence", type=_file, help="Text of the model's licence.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
def bundle(
    checkpoint: Path,
    out: Path,
    name: str | None,
    tile: int | None,
    batch: int,
    proposals: int | None,
    detections: int | None,
    data: Path | None,
    licence: Path | None,
    overwrite: bool,
) -> None:
    """Export CHECKPOINT, a folder that darcnn-train wrote, and write the bundle if it agrees with PyTorch.

    Of the folder of a whole run, the round that is trusted most on the unlabelled images is taken.
    """
    _require_export()
    from darcnn.export.pack import make_licence, make_members, make_training, options_of
    from darcnn.export.tiles import images_of, learned_images, measure_mpp
    from darcnn.training.checkpoint import load_network
    from darcnn.training.trust import checkpoint_in

    _refuse_existing(out, overwrite)
    chosen = checkpoint_in(checkpoint)
    if chosen != checkpoint:
        click.echo(f"taking the most trusted round, {chosen.name}", err=True)
    network, info = load_network(chosen)
    recipe = info.recipe
    name = name or recipe.name
    sources = images_of(recipe, data)
    terms = make_licence(name, recipe.data_licence) if licence is None else _read_text(licence)
    sizes = {"proposals_per_level": proposals, "proposals": proposals, "detections": detections}
    given = {size: value for size, value in sizes.items() if value is not None}
    target = recipe.target
    if target.mpp is None and not target.finds_diameter:
        target = replace(target, mpp=measure_mpp(learned_images(recipe, data), target.nominal_diameter_px))
        if target.mpp is not None:
            click.echo(f"the images tell the scale: {target.mpp:g} um per network pixel", err=True)
    recipe = replace(recipe, target=target)
    manifest = _make_manifest(network, recipe, name, tile or recipe.export.tile_px, batch=batch, **given)
    click.echo(f"exporting {name}, stage {info.stage}, step {info.step}", err=True)
    members = make_members(network, options_of(manifest), make_training(info), terms)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.darcnn"
        write_bundle(draft, manifest, members)
        parity = _compare(open_bundle(draft), network, sources)
    click.echo(parity_table(parity), err=True)
    if not parity.agrees:
        raise InputError(
            f"the exported graphs do not agree with PyTorch: {', '.join(parity.complaints)}",
            where=checkpoint,
            fix="nothing was written; report this with the checkpoint",
        )
    write_bundle(out, manifest, members)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@cli.command()
@click.argument("bundle", type=_file)
@click.option("--checkpoint", required=True, type=_folder, help="The folder that the bundle was made of.")
@click.option("--data", type=_folder, help="Images to verify on; the recipe's by default.")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice([name for name in BACKENDS if name != "auto"]),
    help="What runs the bundle, repeatable; by default ONNX Runtime, and OpenVINO where it is installed.",
)
@_precision
def verify(
    bundle: Path, checkpoint: Path, data: Path | None, backends: tuple[str, ...], precision: str
) -> int:
    """Compare BUNDLE with the checkpoint that it was made of; exit code 1 where they disagree."""
    _require_export()
    from darcnn.export.tiles import images_of
    from darcnn.training.checkpoint import load_network
    from darcnn.training.trust import checkpoint_in

    opened = _in_precision(open_bundle(bundle), precision)
    network, info = load_network(checkpoint_in(checkpoint))
    if opened.precision == "int8":
        raise UsageError(
            "is in int8, which finds other boxes than PyTorch",
            where=bundle,
            fix="score it with `darcnn-train evaluate`, or verify the one that it was made of",
        )
    if network.preset.name != opened.manifest.preset:
        raise UsageError(
            f"holds preset {network.preset.name}, the bundle {opened.manifest.preset}",
            where=checkpoint,
            fix="give the folder that the bundle was made of",
        )
    has_openvino = importlib.util.find_spec("openvino") is not None
    sources, agrees = images_of(info.recipe, data), True
    for backend in backends or ("onnxruntime", *(["openvino"] if has_openvino else [])):
        parity = _compare(opened, network, sources, backend)
        click.echo(f"{backend}\n{parity_table(parity)}")
        agrees = agrees and parity.agrees
    return 0 if agrees else EXIT_PARTIAL


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
@click.option("--workspace", type=click.IntRange(1), help="Most scratch memory of a layer, MiB.")
@click.option("--version-compatible", is_flag=True, help="Later versions run it too; tensorrt only.")
@click.option("--out", type=_folder, help="Folder to write; the user's cache by default, where runs look.")
def engine(
    model: str,
    backend: str,
    targets: tuple[str, ...],
    precision: str,
    workspace: int | None,
    version_compatible: bool,
    out: Path | None,
) -> None:
    """Compile the graphs of MODEL, a bundle or the name of a shipped one, into a TensorRT engine."""

    def show(phase: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{phase} {done}/{total}", err=True, nl=False)

    options = BuildOptions(backend, targets, workspace, version_compatible)
    opened = _in_precision(find_bundle(model), precision)
    folder = build_engine(opened, options, out=out, progress=show)
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
    _require_export()
    from darcnn.export.pack import write_quantised
    from darcnn.export.tiles import images_in, read_tiles

    _refuse_existing(out, overwrite)
    opened = find_bundle(model)
    chosen = read_tiles(images_in(data, diameter), opened, limit=tiles)
    click.echo(f"calibrating on {len(chosen)} tiles", err=True)
    write_quantised(out, opened, list(chosen.values()), has_offsets=not tensorrt)
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


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


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise OutputError("exists already", where=out, fix="pass --overwrite, or choose another name")


def _in_precision(bundle: Bundle, precision: str) -> Bundle:
    if precision == "fp32":
        return bundle
    _require_export()
    from darcnn.export.half import derive_half

    return derive_half(bundle)


def _require_export() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"needs {', '.join(missing)}", where="darcnn-export", fix="run pip install 'darcnn[export]'"
        )


def _make_manifest(network: Darcnn, recipe: Recipe, name: str, tile_px: int, **sizes: int) -> Manifest:
    from darcnn.export.pack import make_manifest
    from darcnn.export.static import ExportOptions
    from darcnn.training.engine import halo_for

    target, limit = recipe.target, recipe.export.max_diameters
    options = ExportOptions(
        channels=target.channels,
        tile_px=tile_px,
        halo_px=halo_for(target.nominal_diameter_px, max(network.preset.strides_px)),
        **sizes,
    )
    return make_manifest(
        network,
        options,
        name=name,
        intensity=target.intensity,
        nominal_diameter_px=target.nominal_diameter_px,
        mpp=target.mpp,
        min_score=recipe.export.min_score,
        finds_diameter=target.finds_diameter,
        found_diameter_px=recipe.export.found_diameter_px,
        slab=target.slab,
        max_diameter_px=None if limit is None else limit * target.nominal_diameter_px,
    )


def _compare(
    bundle: Bundle, network: Darcnn, sources: list[TileSource], backend: str = "onnxruntime"
) -> Parity:
    from darcnn.export.parity import verify_bundle
    from darcnn.export.tiles import read_tiles

    tiles = read_tiles(sources, bundle)
    click.echo(f"comparing on {len(tiles)} tiles", err=True)
    parity = verify_bundle(bundle, network, tiles, backend=backend)
    if parity.n_objects == 0:
        click.echo("no object on any tile: only the features were compared", err=True)
    return parity


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("cannot be read as text", where=path, fix="give a text file in UTF-8") from err
