"""Compiled engines on the disk: where they lie, what they were made of and for, and whether they fit."""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.errors import DeviceError
from darcnn.runtime.sinks.atomic import atomic_folder, translated

__all__ = [
    "CompiledEngine",
    "EngineFacts",
    "engine_folder",
    "find_engines",
    "read_engine",
    "timing_cache_path",
    "write_engine",
]

_FORMAT = 1
_FACTS_FILE = "engine.json"
_KEY_DIGITS = 20  # of the sha256 that names a folder


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine was made of and for; an engine serves only where all of it fits."""

    bundle_name: str
    bundle_sha256: str
    backend: str  # "tensorrt" or "tensorrt-rtx"
    version: str  # of the backend
    targets: tuple[str, ...]  # "sm86": the GPUs it was compiled for; none: all that TensorRT-RTX knows
    device: str | None  # TensorRT: name, compute capability and driver of the GPU that it was built on
    batch: int
    tile_px: int
    is_version_compatible: bool = False
    precision: str = "fp32"  # of the layers, that of the graphs: "fp32" or "fp16"

    @property
    def key(self) -> str:
        """The name of its folder in the cache."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.bundle_name}.{self.backend}.{hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]}"


@dataclass(frozen=True, slots=True)
class CompiledEngine:
    """A verified engine, its plans in memory."""

    folder: Path
    facts: EngineFacts
    plans: Mapping[str, bytes]  # graph -> plan


def engine_folder(facts: EngineFacts, root: Path | None = None) -> Path:
    """Return where an engine with these facts lies: in the user's cache, or under `root`."""
    return (_cache_root() if root is None else root) / facts.key


def write_engine(folder: Path, facts: EngineFacts, plans: Mapping[str, bytes]) -> None:
    """Write an engine; `folder` appears only once complete, and replaces an earlier one.

    Raises:
        OutputError: it cannot be written.
    """
    content = {
        "format": _FORMAT,
        "facts": asdict(facts),
        "plans": {graph: hashlib.sha256(plan).hexdigest() for graph, plan in plans.items()},
    }
    with translated(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        with atomic_folder(folder) as draft:
            for graph, plan in plans.items():
                (draft / f"{graph}.plan").write_bytes(plan)
            (draft / _FACTS_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_engine(
    folder: Path, bundle: Bundle, *, version: str | None = None, capability: str | None = None
) -> CompiledEngine:
    """Return the engine in `folder` if it fits.

    Args:
        folder: as `write_engine` left it.
        bundle: the model that it must have been made of.
        version: of the backend that is to run it; None is not compared.
        capability: of the GPU that is to run it, "sm86"; None is not compared.
    Raises:
        DeviceError: there is none, it is damaged, or it does not fit; the message says why.
    """
    rebuild = "build it again with `darcnn-export engine`"
    try:
        content = json.loads((folder / _FACTS_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise DeviceError("was written by another darcnn", where=folder, fix=rebuild)
        table = content["facts"]
        facts = EngineFacts(**{**table, "targets": tuple(table["targets"])})
        plans = {graph: (folder / f"{graph}.plan").read_bytes() for graph in content["plans"]}
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DeviceError(f"no readable engine ({err})", where=folder, fix=rebuild) from err
    for graph, digest in content["plans"].items():
        if hashlib.sha256(plans[graph]).hexdigest() != digest:
            raise DeviceError(f"{graph}.plan is damaged", where=folder, fix=rebuild)
    for problem in _misfits(facts, bundle, version, capability):
        raise DeviceError(f"does not fit: {problem}", where=folder, fix=rebuild)
    return CompiledEngine(folder, facts, plans)


def find_engines(bundle: Bundle, backend: str, root: Path | None = None) -> Iterator[Path]:
    """Yield the folders of the cache that may hold engines of `bundle`, newest first."""
    base = _cache_root() if root is None else root
    folders = base.glob(f"{glob.escape(bundle.manifest.name)}.{backend}.*") if base.is_dir() else iter(())
    complete = [folder for folder in folders if (folder / _FACTS_FILE).is_file()]
    yield from sorted(complete, key=lambda folder: -(folder / _FACTS_FILE).stat().st_mtime)


def _misfits(
    facts: EngineFacts, bundle: Bundle, version: str | None, capability: str | None
) -> Iterator[str]:
    sizes = bundle.manifest.input
    if facts.bundle_sha256 != bundle.sha256:
        yield f"it was made of another {facts.bundle_name} than {bundle.path}"
    is_of_major = version is not None and facts.version.split(".")[0] == version.split(".")[0]
    if version not in (None, facts.version) and not (facts.is_version_compatible and is_of_major):
        yield f"it was built by {facts.backend} {facts.version}, this is {version}"
    if capability is not None and facts.targets and capability not in facts.targets:
        yield f"it was built for {', '.join(facts.targets)}, this GPU is {capability}"
    if (facts.batch, facts.tile_px) != (sizes.batch, sizes.tile_px):
        yield f"it takes {facts.batch} x {facts.tile_px} px, the model {sizes.batch} x {sizes.tile_px}"


def _cache_root() -> Path:
    return platformdirs.user_cache_path("darcnn") / "engines"


def timing_cache_path(backend: str, version: str, device: str, root: Path | None = None) -> Path:
    """Return where TensorRT's timings for one version and one GPU are kept; the file may not exist."""
    key = hashlib.sha256(f"{backend} {version} {device}".encode()).hexdigest()[:_KEY_DIGITS]
    return (_cache_root() if root is None else root) / f"timing.{key}.bin"
