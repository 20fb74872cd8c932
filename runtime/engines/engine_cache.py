"""Compiled engines on the disk: where they lie, what they were made of and for, and whether they fit."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs

from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.graphs import OUTPUTS
from darcnn.runtime.errors import DeviceError, OutputError
from darcnn.runtime.sinks.atomic import STALE_SECONDS, atomic_folder, remove_drafts, translated

__all__ = [
    "CompiledEngine",
    "EngineFacts",
    "check_place",
    "engine_folder",
    "find_engines",
    "needs_target",
    "read_engine",
    "read_facts",
    "store_engine",
    "timing_cache_path",
    "write_engine",
]

_FORMAT = 2  # 1: float32 was computed in TensorFloat-32
_FACTS_FILE = "engine.json"
_FILES = frozenset({_FACTS_FILE, *(f"{graph}.plan" for graph in OUTPUTS)})
_KEY_DIGITS = 20  # of the sha256 that names a folder
_STEM_CHARACTERS = 60  # of the model's name in it, which is for people to read
_OLDEST_WITHOUT_TARGET = 80  # TensorRT-RTX compiles for compute capability 8.0 and later, unless it is told
_REBUILD = "build it again with `darcnn-export engine`"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine was made of and for; an engine serves only where all of it fits."""

    bundle_name: str
    bundle_sha256: str
    backend: str  # "tensorrt" or "tensorrt-rtx"
    version: str  # of the backend
    # "sm86", sorted; none: sm80 and later with tensorrt-rtx, else the GPU in `device`
    targets: tuple[str, ...]
    device: str | None  # TensorRT: name, compute capability and driver of the GPU that it was built on
    batch: int
    tile_px: int
    is_version_compatible: bool = False
    precision: str = "fp32"  # of the layers, that of the graphs: "fp32", "fp16" or "int8"

    @property
    def key(self) -> str:
        """The name of its folder in the cache."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]
        return f"{_stem(self.bundle_name)}.{self.backend}.{digest}"


_KINDS = {
    **dict.fromkeys(("bundle_name", "bundle_sha256", "backend", "version", "precision"), str),
    **dict.fromkeys(("batch", "tile_px"), int),
    "targets": tuple,
    "device": str | None,
    "is_version_compatible": bool,
}


@dataclass(frozen=True, slots=True)
class CompiledEngine:
    """A verified engine, its plans in memory."""

    folder: Path
    facts: EngineFacts
    plans: Mapping[str, bytes]  # graph -> plan


def engine_folder(facts: EngineFacts, root: Path | None = None) -> Path:
    """Return where an engine with these facts lies: in the user's cache, or under `root`."""
    return (_cache_root() if root is None else root) / facts.key


def store_engine(facts: EngineFacts, plans: Mapping[str, bytes], root: Path | None = None) -> Path:
    """Write an engine into the user's cache, or under `root`, in place of one like it; return its folder.

    What processes that were killed left half-written there is removed.

    Raises:
        OutputError: it cannot be written.
    """
    folder = engine_folder(facts, root)
    remove_drafts(folder.parent, min_age_s=STALE_SECONDS)
    write_engine(folder, facts, plans, overwrite=True)
    return folder


def write_engine(
    folder: Path, facts: EngineFacts, plans: Mapping[str, bytes], *, overwrite: bool = False
) -> None:
    """Write an engine; `folder` has it only once complete, and an earlier one until then.

    Raises:
        OutputError: it cannot be written, or `check_place` refuses the folder.
    """
    folder = folder.resolve()  # what a link names is replaced, not the link
    check_place(folder, overwrite=overwrite)
    content = {
        "format": _FORMAT,
        "facts": asdict(facts),
        "plans": {graph: hashlib.sha256(plan).hexdigest() for graph, plan in plans.items()},
    }
    with translated(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_folder(folder, replaces=True) as draft:
                for graph, plan in plans.items():
                    (draft / f"{graph}.plan").write_bytes(plan)
                (draft / _FACTS_FILE).write_text(
                    json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
                )
        except OSError as err:
            # another process wrote it meanwhile: two builds of one engine are as good as each other
            if err.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not _holds(folder, facts):
                raise


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Raise an OutputError where an engine may not be written to `folder`.

    It must be absent or empty, or, with `overwrite`, hold an engine and nothing else.
    """
    if os.path.ismount(folder):
        raise OutputError(
            "is a disk of its own, where an engine cannot be put in whole",
            where=folder,
            fix="name a folder in it with --out",
        )
    with translated(folder):
        names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if others := sorted(names - _FILES):
        raise OutputError(
            f"holds files that are no engine, such as {others[0]}", where=folder, fix="name another --out"
        )
    if names and not overwrite:
        raise OutputError(
            "holds an engine already", where=folder, fix="name another --out or pass --overwrite"
        )


def read_facts(folder: Path) -> EngineFacts:
    """Return what the engine in `folder` says of itself.

    Raises:
        DeviceError: there is none, or it is damaged.
    """
    return _read_content(folder)[0]


def read_engine(
    folder: Path,
    bundle: Bundle,
    *,
    version: str | None = None,
    capability: str | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> CompiledEngine:
    """Return the engine in `folder` if it fits.

    Args:
        folder: as `write_engine` left it.
        bundle: the model that it must have been made of.
        version: of the backend that is to run it; None is not compared.
        capability: of the GPU that is to run it, "sm86"; None is not compared.
        device: what `gpu_name` says of that GPU; None is not compared.
        precision: of the layers, "fp16" say; None is not compared.
    Raises:
        DeviceError: there is none, it is damaged, or it does not fit; the message says why.
    """
    facts, digests = _read_content(folder)
    plans = {}
    for graph, digest in digests.items():
        try:
            plans[graph] = (folder / f"{graph}.plan").read_bytes()
        except OSError as err:
            raise DeviceError(f"no readable engine ({err})", where=folder, fix=_REBUILD) from err
        if hashlib.sha256(plans[graph]).hexdigest() != digest:
            raise DeviceError(f"{graph}.plan is damaged", where=folder, fix=_REBUILD)
    problems = [*_misfits(facts, bundle, version, precision), *_misfits_gpu(facts, capability, device)]
    if problems:
        raise DeviceError(f"does not fit: {problems[0]}", where=folder, fix=_REBUILD)
    return CompiledEngine(folder, facts, plans)


def find_engines(bundle: Bundle, backend: str, root: Path | None = None) -> Iterator[Path]:
    """Yield the folders of the cache that may hold engines of `bundle`, newest first."""
    base = _cache_root() if root is None else root
    pattern = f"{glob.escape(_stem(bundle.manifest.name))}.{backend}.*"
    found: list[tuple[float, Path]] = []
    for folder in base.glob(pattern):
        with suppress(OSError):  # it is just being replaced
            found.append(((folder / _FACTS_FILE).stat().st_mtime, folder))
    yield from (folder for _, folder in sorted(found, reverse=True))


def needs_target(capability: str) -> bool:
    """Tell whether TensorRT-RTX compiles for a GPU only where it is named.

    >>> [needs_target(one) for one in ("sm75", "sm80", "sm120")]
    [True, False, False]
    """
    return int(capability.removeprefix("sm")) < _OLDEST_WITHOUT_TARGET


def timing_cache_path(backend: str, version: str, device: str, root: Path | None = None) -> Path:
    """Return where TensorRT's timings for one version and one GPU are kept; the file may not exist."""
    key = hashlib.sha256(f"{backend} {version} {device}".encode()).hexdigest()[:_KEY_DIGITS]
    return (_cache_root() if root is None else root) / f"timing.{key}.bin"


def _read_content(folder: Path) -> tuple[EngineFacts, Mapping[str, str]]:
    """Return the facts, and the sha256 of each graph's plan."""
    try:
        content = json.loads((folder / _FACTS_FILE).read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise DeviceError("was written by another darcnn", where=folder, fix=_REBUILD)
        table, digests = content["facts"], content["plans"]
        facts = EngineFacts(**{**table, "targets": tuple(str(one) for one in table["targets"])})
        for name, kind in _KINDS.items():
            if not isinstance(getattr(facts, name), kind):
                raise ValueError(f"{name} in {_FACTS_FILE} is of the wrong kind")
        if not isinstance(digests, dict) or set(digests) != set(OUTPUTS):
            raise ValueError(f"{_FACTS_FILE} does not name the plans {' and '.join(OUTPUTS)}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as err:
        raise DeviceError(f"no readable engine ({err})", where=folder, fix=_REBUILD) from err
    return facts, digests


def _holds(folder: Path, facts: EngineFacts) -> bool:
    try:
        return read_facts(folder) == facts
    except DeviceError:
        return False


def _misfits(facts: EngineFacts, bundle: Bundle, version: str | None, precision: str | None) -> Iterator[str]:
    sizes = bundle.manifest.input
    if facts.bundle_sha256 != bundle.sha256:
        yield f"it was made of another {facts.bundle_name} than {bundle.path}"
    if version not in (None, facts.version) and not (
        facts.is_version_compatible and _serves_later(facts.version, str(version))
    ):
        yield f"it was built by {facts.backend} {facts.version}, this is {version}"
    if precision not in (None, facts.precision):
        yield f"it computes in {facts.precision}, not in {precision}"
    if (facts.batch, facts.tile_px) != (sizes.batch, sizes.tile_px):
        yield f"it takes {facts.batch} x {facts.tile_px} px, the model {sizes.batch} x {sizes.tile_px}"


def _serves_later(built: str, running: str) -> bool:
    """Tell whether a version-compatible engine of one version is run by another: a later one of its major.

    >>> [_serves_later("11.4.1", running) for running in ("11.10.0", "11.0.0", "12.0.0")]
    [True, False, False]
    """
    one, other = ([int(part) for part in re.findall(r"\d+", version)] for version in (built, running))
    return one[:1] == other[:1] and one <= other


def _misfits_gpu(facts: EngineFacts, capability: str | None, device: str | None) -> Iterator[str]:
    if capability is not None and facts.targets and capability not in facts.targets:
        yield f"it was built for {', '.join(facts.targets)}, this GPU is {capability}"
    if facts.backend == "tensorrt-rtx":
        if capability is not None and not facts.targets and needs_target(capability):
            yield f"it was built without --target, for sm80 and later, this GPU is {capability}"
    elif device is not None and _without_driver(facts.device or "none") != _without_driver(device):
        yield f"it was built on {facts.device}, this GPU is {device}"


def _without_driver(device: str) -> str:
    """Return what `gpu_name` says without the driver, which may be another when an engine is run."""
    return device.partition(" driver ")[0]


def _stem(bundle_name: str) -> str:
    """Return a model's name as part of a file's; what it was made of is told by the hash, not by this.

    >>> _stem("../../nuclei")
    '_.._nuclei'
    """
    return re.sub(r"[^\w.-]+", "_", bundle_name, flags=re.ASCII).lstrip(".")[:_STEM_CHARACTERS] or "model"


def _cache_root() -> Path:
    return platformdirs.user_cache_path("darcnn") / "engines"
