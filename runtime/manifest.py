"""What a bundle says of itself: the manifest, as frozen dataclasses and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.slab import Slab

__all__ = [
    "FORMAT",
    "MAX_TILE_PX",
    "Anchors",
    "Limits",
    "Manifest",
    "ModelInput",
    "manifest_from_json",
    "manifest_to_json",
]

FORMAT = 1  # the newest bundle format this version reads
MAX_TILE_PX = 8192  # 256 times the memory of the usual 512; more is a mistake or an attack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What the graph eats."""

    tile_px: int  # a tile is tile_px x tile_px network pixels
    halo_px: int  # a tile's core is tile_px - 2 * halo_px
    stride_px: int  # the coarsest stride of the network
    batch: int  # tiles per `detect`
    channels: int  # 1 to 4
    intensity: IntensityRule
    nominal_diameter_px: float  # typical object, network pixels
    mpp: float | None  # micrometres per network pixel; None where the model knows no scale
    finds_diameter: bool = False  # without a given size, the model measures the objects of an image first
    slab: Slab | None = None  # of volumes: how much of it one plane stands for; None: a plane is a plane


@dataclass(frozen=True, slots=True)
class Anchors:
    """The anchor boxes: one size per level, finest first."""

    sizes_px: tuple[float, ...]
    ratios: tuple[float, ...]
    strides_px: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps and thresholds inside the graphs."""

    proposals_per_level: int
    proposals: int
    detections: int
    mask_batch: int
    mask_px: int
    score_threshold: float  # below it `detect` reports nothing
    nms_threshold: float
    min_score: float  # what a run keeps unless told otherwise
    max_diameter_px: float | None = None  # network pixels; a larger finding is none of the model's objects


@dataclass(frozen=True, slots=True)
class Manifest:
    """`manifest.json` of a bundle. `files` maps each other member to its sha256 (hex)."""

    format: int
    name: str
    preset: str
    input: ModelInput
    anchors: Anchors
    limits: Limits
    graphs: Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]  # graph -> tensor -> (dtype, shape)
    files: Mapping[str, str]
    precision: str = "fp32"  # of the layers; "int8": the encoders in Q/DQ


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as what `json.dumps` takes."""
    return asdict(manifest)


def manifest_from_json(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest that `content`, a parsed manifest.json, holds.

    Raises:
        ValueError: a field is missing, unknown or of the wrong kind; the message names it.
    """
    graphs = content.get("graphs", {})
    if not isinstance(graphs, Mapping):
        raise ValueError("graphs is not a table")
    parsed = {
        graph: {name: (str(kind), tuple(int(n) for n in shape)) for name, (kind, shape) in tensors.items()}
        for graph, tensors in graphs.items()
    }
    return _parse(Manifest, {**content, "graphs": parsed}, "manifest")


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _parse(kind: type[T], content: Any, where: str) -> T:
    """Build the dataclass `kind` from a JSON table, checking names and kinds."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is not a table")
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every kind is a dataclass
    if unknown := sorted(set(content) - set(names)):
        raise ValueError(f"{where} has an unknown field {unknown[0]}")
    values: dict[str, Any] = {}
    optional = {field.name for field in fields(kind) if field.default is not MISSING}  # type: ignore[arg-type]
    for name in names:
        if name not in content and name in optional:
            continue
        if name not in content:
            raise ValueError(f"{where} lacks {name}")
        value, hint = content[name], hints[name]
        table = next((kind for kind in (hint, *get_args(hint)) if _is_table(kind)), None)
        if table is not None and not (value is None and type(None) in get_args(hint)):
            value = _parse(table, value, f"{where}.{name}")
        elif isinstance(value, list):
            value = tuple(value)
        elif hint in (bool, int, float, str) and not isinstance(
            value, (int, float) if hint is float else hint
        ):
            raise ValueError(f"{where}.{name} is not of type {hint.__name__}")
        values[name] = value
    return kind(**values)
