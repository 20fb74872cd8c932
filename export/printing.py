"""What `darcnn-export` prints and records of a bundle and of a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from typing import Any

from darcnn.export.parity import COLUMNS, LIMITS, MAX_UNMATCHED, Parity
from darcnn.runtime.bundle import Bundle, read_training
from darcnn.runtime.slab import Slab

__all__ = ["describe_bundle", "parity_record", "parity_table", "to_json"]

_VERSIONS = (
    *("darcnn", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx", "torch"),
)


def parity_table(parity: Parity) -> str:
    """Return the comparison as a table, one line a tile, the worst of all of them, and the verdict."""
    heads = "".join(f" {heading:>9}" for heading in COLUMNS.values())
    lines = [f"{'tile':32} {parity.reference:>7} {'bundle':>6} {'matched':>7} {'unmatched':>9}{heads}"]
    for one in parity.tiles:
        share = one.n_unmatched / max(one.n_reference + one.n_bundle, 1)
        counts = f"{one.n_reference:7d} {one.n_bundle:6d} {one.n_matched:7d} {share:9.1%}"
        lines.append(f"{one.tile[-32:]:32} {counts}" + _differences(asdict(one)))
    sums = (
        sum(getattr(one, name) for one in parity.tiles) for name in ("n_reference", "n_bundle", "n_matched")
    )
    counts = "{:7d} {:6d} {:7d}".format(*sums) + f" {parity.unmatched:9.1%}"
    lines.append(f"{'all, and the worst':32} {counts}" + _differences({n: parity.worst(n) for n in COLUMNS}))
    verdict = "they agree" if parity.agrees else f"they disagree: {', '.join(parity.complaints)}"
    return "\n".join([*lines, verdict])


def _differences(row: Mapping[str, float | None]) -> str:
    values = (row[name] for name in COLUMNS)
    return "".join(f" {'-':>9}" if value is None else f" {value:9.5f}" for value in values)


def parity_record(bundle: Bundle, compared: Mapping[str, Parity]) -> dict[str, Any]:
    """Return comparisons, one a backend, as what `to_json` takes: rows, versions, limits, verdict."""
    return {
        "bundle": bundle.manifest.name,
        "sha256": bundle.sha256,
        "precision": bundle.precision,
        "limits": {"unmatched": MAX_UNMATCHED, **LIMITS[bundle.precision]},
        "versions": dict(_versions()),
        "agrees": all(parity.agrees for parity in compared.values()),
        "backends": {
            backend: {
                "reference": parity.reference,
                "agrees": parity.agrees,
                "complaints": parity.complaints,
                "objects": parity.n_objects,
                "unmatched": parity.unmatched,
                "tiles": [asdict(tile) for tile in parity.tiles],
            }
            for backend, parity in compared.items()
        },
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _VERSIONS:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


def to_json(table: Mapping[str, Any]) -> bytes:
    """Return `table` as text, with null for every number that JSON does not have: NaN and the infinities."""
    return (json.dumps(_finite(table), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


def describe_bundle(bundle: Bundle) -> list[str]:
    """Return what `bundle` is, line by line: manifest, sizes, hashes, figures of its training.

    Raises:
        BundleError: the record of its training is no table in JSON.
    """
    manifest = bundle.manifest
    sizes, limits, rule = manifest.input, manifest.limits, manifest.input.intensity
    window = "" if rule.kind == "full_range" else f" {rule.low:g} to {rule.high:g}"
    training = read_training(bundle)
    return [
        f"{manifest.name}: {manifest.preset}, {manifest.precision}, format {manifest.format}",
        f"file       {bundle.path.stat().st_size / 1e6:.1f} MB, sha256 {bundle.sha256}",
        f"input      {sizes.batch} x {sizes.tile_px} x {sizes.tile_px} x {sizes.channels}, "
        f"halo {sizes.halo_px} px",
        f"intensity  {rule.kind}{window}",
        f"scale      objects of {sizes.nominal_diameter_px:g} px, "
        + ("no pixel size" if sizes.mpp is None else f"{sizes.mpp:g} um per pixel")
        + (", measured in each image" if sizes.finds_diameter else ""),
        *_describe_slab(sizes.slab),
        f"limits     {limits.proposals} proposals, {limits.detections} objects a tile, "
        f"score {limits.min_score:g} (graph {limits.score_threshold:g}), NMS {limits.nms_threshold:g}",
        f"training   stage {training.get('stage')}, step {training.get('step')}",
        f"data       {training.get('data_licence')}",
        *_describe_figures("as measured when it was trained", training.get("figures")),
        *_describe_figures("of the float32 bundle that it was made of", training.get("float32_figures")),
        *(
            f"member     {name:14} {len(bundle.read(name)):>10} bytes  {digest}"
            for name, digest in manifest.files.items()
        ),
    ]


def _describe_slab(slab: Slab | None) -> list[str]:
    if slab is None:
        return []
    return [f"slab       {slab.depth:g} diameters averaged, smoothed by {slab.smoothing:g}"]


def _describe_figures(whose: str, figures: object) -> list[str]:
    rows = list(_figure_rows("", figures))
    return [f"figures    {whose}:", *(f"  {row}" for row in rows)] if rows else []


def _figure_rows(name: str, figures: object) -> Iterator[str]:
    """Yield a line for each table of numbers within `figures`, however deep it lies."""
    if not isinstance(figures, Mapping):
        if figures is not None:
            yield f"{name} {_rounded(figures)}".strip()
        return
    plain = {key: value for key, value in figures.items() if not isinstance(value, Mapping)}
    if plain:
        listed = ", ".join(f"{key} {_rounded(value)}" for key, value in plain.items())
        yield f"{name}: {listed}" if name else listed
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _figure_rows(f"{name}, {key}" if name else str(key), value)


def _rounded(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
