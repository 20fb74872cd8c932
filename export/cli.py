"""`darcnn-export`: trained networks to model bundles, and bundles checked against their networks."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

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
from darcnn.runtime.manifest import Manifest
from darcnn.runtime.options import BACKENDS

if TYPE_CHECKING:
    from darcnn.export.parity import Parity, TileSource
    from darcnn.training.config import Recipe
    from darcnn.training.model.network import Darcnn

__all__ = ["cli", "main"]

_NEEDS = ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript")

_folder = click.Path(path_type=Path, file_okay=False)
_file = click.Path(path_type=Path, dir_okay=False)


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
@click.option("--data", type=_folder, help="Images to verify on; the recipe's by default.")
@click.option("--licence", type=_file, help="Text of the model's licence.")
@click.option("--overwrite", is_flag=True, help="Replace the bundle if it exists.")
def bundle(
    checkpoint: Path,
    out: Path,
    name: str | None,
    tile: int | None,
    batch: int,
    data: Path | None,
    licence: Path | None,
    overwrite: bool,
) -> None:
    """Export CHECKPOINT, a folder that darcnn-train wrote, and write the bundle if it agrees with PyTorch.

    Of the folder of a whole run, the round that is trusted most on the unlabelled images is taken.
    """
    _require_export()
    from darcnn.export.pack import make_licence, make_members, make_training, options_of
    from darcnn.training.checkpoint import load_network
    from darcnn.training.trust import most_trusted_round

    if out.exists() and not overwrite:
        raise OutputError("exists already", where=out, fix="pass --overwrite, or choose another name")
    if not (checkpoint / "checkpoint.json").is_file() and (checkpoint / "refine").is_dir():
        checkpoint = most_trusted_round(checkpoint)
        click.echo(f"taking the most trusted round, {checkpoint.name}", err=True)
    network, info = load_network(checkpoint)
    recipe = info.recipe
    name = name or recipe.name
    sources = _sources(recipe, data)
    terms = make_licence(name, recipe.data_licence) if licence is None else _read_text(licence)
    manifest = _make_manifest(network, recipe, name, tile or recipe.export.tile_px, batch)
    click.echo(f"exporting {name}, stage {info.stage}, step {info.step}", err=True)
    members = make_members(network, options_of(manifest), make_training(info), terms)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.darcnn"
        write_bundle(draft, manifest, members)
        parity = _compare(open_bundle(draft), network, sources)
    click.echo(_table(parity), err=True)
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
def verify(bundle: Path, checkpoint: Path, data: Path | None, backends: tuple[str, ...]) -> int:
    """Compare BUNDLE with the checkpoint that it was made of; exit code 1 where they disagree."""
    _require_export()
    from darcnn.training.checkpoint import load_network

    opened = open_bundle(bundle)
    network, info = load_network(checkpoint)
    if network.preset.name != opened.manifest.preset:
        raise UsageError(
            f"holds preset {network.preset.name}, the bundle {opened.manifest.preset}",
            where=checkpoint,
            fix="give the folder that the bundle was made of",
        )
    has_openvino = importlib.util.find_spec("openvino") is not None
    sources, agrees = _sources(info.recipe, data), True
    for backend in backends or ("onnxruntime", *(["openvino"] if has_openvino else [])):
        parity = _compare(opened, network, sources, backend)
        click.echo(f"{backend}\n{_table(parity)}")
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
@click.option("--workspace", type=click.IntRange(1), help="Most scratch memory of a layer, MiB.")
@click.option("--version-compatible", is_flag=True, help="Later versions run it too; tensorrt only.")
@click.option("--out", type=_folder, help="Folder to write; the user's cache by default, where runs look.")
def engine(
    model: str,
    backend: str,
    targets: tuple[str, ...],
    workspace: int | None,
    version_compatible: bool,
    out: Path | None,
) -> None:
    """Compile the graphs of MODEL, a bundle or the name of a shipped one, into a TensorRT engine."""
    from darcnn.runtime.load import find_bundle

    def show(phase: str, done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r\x1b[K{phase} {done}/{total}", err=True, nl=False)

    options = BuildOptions(backend, targets, workspace, version_compatible)
    folder = build_engine(find_bundle(model), options, out=out, progress=show)
    size = sum(path.stat().st_size for path in folder.iterdir())
    click.echo(f"{folder}: {size / 1e6:.1f} MB")


@cli.command()
@click.argument("bundle", type=_file)
def info(bundle: Path) -> None:
    """Say what BUNDLE is: manifest, sizes, hashes, and the figures of its training."""
    click.echo("\n".join(_describe(open_bundle(bundle))))


def _require_export() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"needs {', '.join(missing)}", where="darcnn-export", fix="run pip install 'darcnn[export]'"
        )


def _sources(recipe: Recipe, data: Path | None) -> list[TileSource]:
    """Return the images to verify on: those in the folder `data`, else the recipe's own."""
    from darcnn.export.parity import TileSource
    from darcnn.runtime.readers.open import is_readable

    if data is None:
        found = [
            TileSource(path, group.diameter_px)
            for group in recipe.target.sets
            for path in sorted(Path(recipe.data).glob(group.images))
        ]
    else:
        found = [TileSource(path) for path in sorted(data.rglob("*")) if is_readable(path)]
    if not found:
        raise UsageError(
            f"no image in {recipe.data if data is None else data}",
            where="--data",
            fix="give a folder of images like those of the training",
        )
    return found


def _make_manifest(network: Darcnn, recipe: Recipe, name: str, tile_px: int, batch: int) -> Manifest:
    from darcnn.export.pack import make_manifest
    from darcnn.export.static import ExportOptions
    from darcnn.training.engine import halo_for

    target, limit = recipe.target, recipe.export.max_diameters
    options = ExportOptions(
        channels=target.channels,
        tile_px=tile_px,
        batch=batch,
        halo_px=halo_for(target.nominal_diameter_px, max(network.preset.strides_px)),
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
        slab=target.slab,
        max_diameter_px=None if limit is None else limit * target.nominal_diameter_px,
    )


def _compare(
    bundle: Bundle, network: Darcnn, sources: list[TileSource], backend: str = "onnxruntime"
) -> Parity:
    from darcnn.export.parity import read_tiles, verify_bundle

    tiles = read_tiles(sources, bundle)
    click.echo(f"comparing on {len(tiles)} tiles", err=True)
    parity = verify_bundle(bundle, network, tiles, backend=backend)
    if parity.n_objects == 0:
        click.echo("no object on any tile: only the features were compared", err=True)
    return parity


def _table(parity: Parity) -> str:
    """Return the comparison as a table, one line a tile, and the verdict."""
    lines = [f"{'tile':32} {'torch':>6} {'bundle':>6} {'matched':>8} {'box px':>8} {'score':>8} {'mask':>8}"]
    for one in parity.tiles:
        counts = f"{one.n_torch:6d} {one.n_onnx:6d} {one.n_matched:8d}"
        lines.append(f"{one.tile[-32:]:32} {counts} {one.box_px:8.4f} {one.score:8.5f} {one.mask:8.5f}")
    verdict = "they agree" if parity.agrees else f"they disagree: {', '.join(parity.complaints)}"
    return "\n".join([*lines, verdict])


def _describe(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    sizes, limits, rule = manifest.input, manifest.limits, manifest.input.intensity
    window = "" if rule.kind == "full_range" else f" {rule.low:g} to {rule.high:g}"
    training: dict[str, Any] = json.loads(bundle.read("training.json"))
    lines = [
        f"{manifest.name}: {manifest.preset}, format {manifest.format}",
        f"file       {bundle.path.stat().st_size / 1e6:.1f} MB, sha256 {bundle.sha256}",
        f"input      {sizes.batch} x {sizes.tile_px} x {sizes.tile_px} x {sizes.channels}, "
        f"halo {sizes.halo_px} px",
        f"intensity  {rule.kind}{window}",
        f"scale      objects of {sizes.nominal_diameter_px:g} px, "
        + ("no pixel size" if sizes.mpp is None else f"{sizes.mpp:g} um per pixel"),
        f"limits     {limits.proposals} proposals, {limits.detections} objects a tile, "
        f"score {limits.min_score:g} (graph {limits.score_threshold:g}), NMS {limits.nms_threshold:g}",
        f"training   stage {training.get('stage')}, step {training.get('step')}",
        f"data       {training.get('data_licence')}",
    ]
    lines += [f"figure     {key} {value}" for key, value in dict(training.get("figures") or {}).items()]
    return lines + [
        f"member     {name:14} {len(bundle.read(name)):>10} bytes  {digest}"
        for name, digest in manifest.files.items()
    ]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise InputError("cannot be read as text", where=path, fix="give a text file in UTF-8") from err
