"""What `darcnn-export` prints of a bundle and of a comparison."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.slab import Slab

if TYPE_CHECKING:
    from darcnn.export.parity import Parity

__all__ = ["describe_bundle", "parity_table"]


def parity_table(parity: Parity) -> str:
    """Return the comparison as a table, one line a tile, and the verdict."""
    lines = [f"{'tile':32} {'torch':>6} {'bundle':>6} {'matched':>8} {'box px':>8} {'score':>8} {'mask':>8}"]
    for one in parity.tiles:
        counts = f"{one.n_torch:6d} {one.n_onnx:6d} {one.n_matched:8d}"
        lines.append(f"{one.tile[-32:]:32} {counts} {one.box_px:8.4f} {one.score:8.5f} {one.mask:8.5f}")
    verdict = "they agree" if parity.agrees else f"they disagree: {', '.join(parity.complaints)}"
    return "\n".join([*lines, verdict])


def _describe_slab(slab: Slab | None) -> list[str]:
    if slab is None:
        return []
    return [f"slab       {slab.depth:g} diameters averaged, smoothed by {slab.smoothing:g}"]


def describe_bundle(bundle: Bundle) -> list[str]:
    """Return what `bundle` is, line by line: manifest, sizes, hashes, figures of its training."""
    manifest = bundle.manifest
    sizes, limits, rule = manifest.input, manifest.limits, manifest.input.intensity
    window = "" if rule.kind == "full_range" else f" {rule.low:g} to {rule.high:g}"
    training: dict[str, Any] = json.loads(bundle.read("training.json"))
    lines = [
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
    ]
    lines += [f"figure     {key} {value}" for key, value in dict(training.get("figures") or {}).items()]
    return lines + [
        f"member     {name:14} {len(bundle.read(name)):>10} bytes  {digest}"
        for name, digest in manifest.files.items()
    ]
