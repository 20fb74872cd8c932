"""What a bundle says of itself: the manifest, as frozen dataclasses and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.slab import Slab

__all__ = [
    "FORMAT",
    "MAX_TILE_PX",
    "Anchors",
    "Limits",
    "Manifest",
    "ModelInput",
    "Precision",
    "check_name",
    "manifest_from_json",
    "manifest_to_json",
]

FORMAT = 1  # the newest bundle format this version reads
MAX_TILE_PX = 8192  # 256 times the memory of the usual 512; more is a mistake or an attack
_LARGEST = 1e38  # of a number without a range of its own; neither infinite nor NaN is below it
_SIDE, _COUNT = (1, MAX_TILE_PX), (1, 65536)
# The numbers that a model can be run with, as darcnn-export writes them; `tile_px` has a message of its own.
_RANGES: Mapping[str, tuple[float, float]] = {
    "input.halo_px": (0, MAX_TILE_PX / 2),
    "input.stride_px": _SIDE,
    "input.batch": _COUNT,
    "input.channels": (1, 4),
    "input.nominal_diameter_px": (1e-3, MAX_TILE_PX),
    "input.mpp": (1e-6, 1e6),
    "input.slab.depth": (0, 1e3),
    "input.slab.smoothing": (0, 1e3),
    "limits.proposals_per_level": _COUNT,
    "limits.proposals": _COUNT,
    "limits.detections": _COUNT,
    "limits.mask_batch": _COUNT,
    "limits.mask_px": _SIDE,
    "limits.score_threshold": (0, 1),
    "limits.nms_threshold": (0, 1),
    "limits.min_score": (0, 1),
    "limits.max_diameter_px": (1e-6, 1e6),
    "input.found_diameter_px": (1e-6, 1e6),
}

MAX_NAME = 100  # characters; a name becomes part of file names, which systems cut off at 255 bytes

Precision = Literal["fp32", "fp16", "int8"]  # of the layers; "int8": the encoders in Q/DQ

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
    found_diameter_px: float | None = None  # what it takes nominal objects for when it measures; None: that
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
    precision: Precision = "fp32"


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as what `json.dumps` takes."""
    return asdict(manifest)


def manifest_from_json(content: Mapping[str, Any]) -> Manifest:
    """Return the manifest that `content`, a parsed manifest.json, holds.

    Raises:
        ValueError: a field is missing, unknown, of the wrong kind or out of range; the message names it.
    """
    graphs = _table(content.get("graphs", {}), "graphs")
    parsed = {
        graph: {name: _tensor(entry, f"graphs.{graph}.{name}") for name, entry in tensors.items()}
        for graph, tensors in ((graph, _table(graphs[graph], f"graphs.{graph}")) for graph in graphs)
    }
    manifest = _parse(Manifest, {**content, "graphs": parsed}, "")
    check_name(manifest.name)
    sizes, rule = manifest.input, manifest.input.intensity
    if 2 * sizes.halo_px >= sizes.tile_px > 0:
        raise ValueError(f"input.halo_px leaves nothing of a tile: {sizes.halo_px}")
    if rule.kind == "percentile" and not 0 <= rule.low < rule.high <= 100:
        raise ValueError("input.intensity is not from a lower to a higher percentile")
    if rule.kind == "range" and rule.low >= rule.high:
        raise ValueError("input.intensity is not from a lower to a higher value")
    return manifest


def check_name(name: str) -> None:
    """Raise a ValueError unless `name` can be a model's: it becomes part of file names.

    >>> check_name("../nuclei")
    Traceback (most recent call last):
    ValueError: name holds '/'
    """
    if not name or name in (".", ".."):
        raise ValueError(f"name is {name!r}")
    if len(name) > MAX_NAME:
        raise ValueError(f"name has {len(name)} characters, more than {MAX_NAME}")
    for character in name:
        if character in "/\\" or not character.isprintable():  # of a surrogate no system makes a file name
            raise ValueError(f"name holds {character!r}")


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is not a table")
    return value


def _tensor(entry: Any, where: str) -> tuple[str, tuple[int, ...]]:
    """Return what `graphs` says of one tensor: [dtype, [size, ...]]."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ValueError(f"{where} is not a type and a shape")
    return _convert(str, entry[0], where), _convert(tuple[int, ...], entry[1], where)


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def _parse(kind: type[T], content: Any, where: str) -> T:
    """Build the dataclass `kind` from a JSON table, checking names, kinds and ranges."""
    table = _table(content, where)
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # every kind is a dataclass
    if unknown := sorted(set(table) - set(names)):
        raise ValueError(f"{where or 'it'} has an unknown field {unknown[0]}")
    optional = {field.name for field in fields(kind) if field.default is not MISSING}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name in names:
        if name in table:
            path = f"{where}.{name}" if where else name
            values[name] = table[name] if name == "graphs" else _convert(hints[name], table[name], path)
        elif name not in optional:
            raise ValueError(f"{where or 'it'} lacks {name}")
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the field type `hint` has it."""
    if isinstance(hint, UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not NoneType)
        if value is None:
            return None
    if _is_table(hint):
        return _parse(hint, value, where)
    origin = get_origin(hint)
    if origin is Mapping:
        return {name: _convert(get_args(hint)[1], one, where) for name, one in _table(value, where).items()}
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is not a list")
        return tuple(_convert(get_args(hint)[0], one, where) for one in value)
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} is none of {', '.join(get_args(hint))}")
        return value
    if not isinstance(value, (int, float) if hint is float else hint) or (
        isinstance(value, bool) and hint is not bool  # to Python a bool is an int
    ):
        raise ValueError(f"{where} is not of type {hint.__name__}")
    if hint in (int, float):
        low, high = _RANGES.get(where, (-_LARGEST, _LARGEST))
        if not low <= value <= high:
            raise ValueError(f"{where} is {str(value)[:20]}, not between {low:g} and {high:g}")
    return value
