"""run.json: what a result was made of, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from darcnn.runtime.errors import InputError, OutputError, without_secrets
from darcnn.runtime.geometry import Region
from darcnn.runtime.manifest import Manifest, manifest_to_json
from darcnn.runtime.readers.image_places import split_image
from darcnn.runtime.readers.protocol import Reader, SlideInfo
from darcnn.runtime.rows import SlideTask
from darcnn.runtime.sampling import spread_evenly
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.tally import Tally

__all__ = [
    "asked_model",
    "check_engine",
    "describe_run",
    "fingerprint",
    "fingerprint_file",
    "fingerprint_pixels",
    "hash_of",
    "installed_version",
    "make_record",
    "measured_px",
    "model_hash",
    "read_record",
    "rounded_seconds",
    "write_record",
]

_RECORD_FORMAT = 1
_LIBRARIES = (
    "contourpy",
    "numpy",
    "onnxruntime",
    "openslide-python",
    "pillow",
    "pyarrow",
    "shapely",
    "tifffile",
    "zarr",
)
_END_BYTES = 1 << 20  # a slide is known by its first and last MiB; reading all of it would take minutes
_DIGITS = 3  # of seconds
_STRIP_PX = 1024  # rows that are hashed at once
_SAMPLED_FILES = 16  # of a folder, that are looked into
_END_OF_CHUNK = 1 << 16  # bytes at either end
_OF_FOLDER = "metadata, names and sizes of all files, ends of 16"


def describe_run(segmenter: Segmenter, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what every run.json begins with: versions, model and options.

    `asked` is all that the objects depend on; its "options" are what the user chose.
    """
    return {
        "format": _RECORD_FORMAT,
        "versions": _versions(),
        "model": {
            "name": segmenter.manifest.name,
            "manifest_sha256": asked["model"],
            "files": dict(segmenter.manifest.files),
            "min_score": segmenter.min_score,
        },
        "engine": segmenter.engine.spec.name,
        "options": dict(asked["options"]),
    }


def asked_model(segmenter: Segmenter) -> dict[str, Any]:
    """Return what the objects depend on besides the slide and the options."""
    return {"model": model_hash(segmenter.manifest), "min_score": segmenter.min_score}


def check_engine(noted: dict[str, Any] | None, segmenter: Segmenter, folder: Path) -> dict[str, Any] | None:
    """Return what an earlier try noted (`Parts.begin`), if the engine that found its parts is to go on.

    No result is of two engines: they do not find the same to the bit.

    Args:
        noted: its "engine" among it; None: there was no earlier try.
        segmenter: that is to go on.
        folder: of the results.
    Raises:
        OutputError: the engines differ in kind, version, precision or device.
    """
    own = segmenter.engine.spec.name
    if noted is not None and (begun := noted.get("engine", own)) != own:  # earlier versions noted none
        raise OutputError(
            f"holds a run that was begun on {begun}, and this is {own}",
            where=folder,
            fix="pass --restart to begin anew, or the earlier --backend and --device to go on",
        )
    return noted


def measured_px(record: Mapping[str, Any]) -> float | None:
    """Return the diameter that the model measured for a run, pixels of its input; None where it was given."""
    is_measured = record["options"].get("diameter_px") in (None, "auto")
    return record["network"].get("diameter_px") if is_measured else None


def rounded_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds by stage as run.json holds them."""
    return {stage: round(value, _DIGITS) for stage, value in seconds.items()}


def make_record(
    segmenter: Segmenter,
    info: SlideInfo,
    task: SlideTask,
    *,
    asked: Mapping[str, Any],
    diameter_px: float | None,
    ground: Mapping[str, Any],
    tally: Tally,
) -> dict[str, Any]:
    """Return what a slide's run.json holds: `describe_run`, slide, ground, plan, counts, damage, times,
    warnings."""
    plan, mpp = task.plan, task.mpp
    return {
        **describe_run(segmenter, asked),
        "input": {
            "name": info.name,
            "image_name": info.image_name,
            "file": None if info.path is None else asked["slide"],
            "width_px": info.width_px0,
            "height_px": info.height_px0,
            "channels": list(info.channel_names),
            "dtype": str(info.dtype),
            "mpp": plan.mpp,
            "mpp_xy": None if mpp is None else list(mpp),
            "mpp_source": plan.mpp_source,
            "origin_px": list(info.origin_px0),  # objects.geojson.gz counts from here, as QuPath does
        },
        "ground": dict(ground),
        "network": {
            "level": plan.level.index,
            "scale": plan.scale,
            "diameter_px": diameter_px,  # of a typical object, given or estimated; level-0 pixels
            "width_px": plan.width,
            "height_px": plan.height,
            "channel": plan.channel,
        },
        "counts": tally.counts(),
        "unreadable": [
            {"tile": tile, "x0": core.x0, "y0": core.y0, "x1": core.x1, "y1": core.y1}
            for tile, core in tally.unreadable.items()
        ],
        "seconds": rounded_seconds(tally.seconds),
        "warnings": (*info.doubts, *tally.warnings(has_pixel_size=mpp is not None)),
    }


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write run.json.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    with atomic_file(path) as file:
        # the name of a file may hold bytes that are no UTF-8: they are written as \udc.. and read back
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        file.write(text.encode(errors="backslashreplace"))


def read_record(path: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the record of a complete run that asked for the same, None if there is none at `path`."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if content.get("asked_sha256") == hash_of(asked) else None


def hash_of(asked: Mapping[str, Any]) -> str:
    """Return what tells one question to a slide from another."""
    return _sha256(json.dumps(asked, sort_keys=True).encode())


def model_hash(manifest: Manifest) -> str:
    """Return what tells one model from another: the manifest holds the sha256 of every graph."""
    return _sha256(json.dumps(manifest_to_json(manifest), sort_keys=True).encode())


def fingerprint(info: SlideInfo) -> dict[str, Any]:
    """Return what tells a slide that lies in a file from others, wherever it lies: `fingerprint_file`.

    Of a folder (OME-Zarr) it is made of the metadata, of all names and sizes of files, and of the ends of
    some; behind a URL of the metadata alone.

    Raises:
        InputError: the file cannot be read.
    """
    assert info.path is not None
    if info.digest is None:
        return fingerprint_file(Path(info.path))
    if isinstance(info.path, str):
        return {"name": without_secrets(info.path), "size": None, "sha256": info.digest, "of": "metadata"}
    digest = _sha256((info.digest + _digest_folder(info.path)).encode())
    return {"name": info.path.absolute().name, "size": None, "sha256": digest, "of": _OF_FOLDER}


def fingerprint_file(path: Path) -> dict[str, Any]:
    """Return name, size and sha256 of a file: of all of it up to 2 MiB, else of both ends and the size.

    A slide that is a folder is known by its name only; one of several images in a file by its number as well.

    Raises:
        InputError: the file cannot be read.
    """
    if path.is_dir():
        return {"name": path.name, "size": None, "sha256": None, "of": "nothing"}
    inside, number = split_image(path)
    if number is not None:
        return {**fingerprint_file(inside), "image": number}
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size <= 2 * _END_BYTES:
                return {"name": path.name, "size": size, "sha256": _sha256(file.read()), "of": "all"}
            head = file.read(_END_BYTES)
            file.seek(size - _END_BYTES)
            content = head + file.read(_END_BYTES) + str(size).encode()
    except OSError as err:
        raise InputError(f"cannot be read ({err.strerror})", where=path, fix="check the disk") from err
    return {"name": path.name, "size": size, "sha256": _sha256(content), "of": "first and last MiB and size"}


def _digest_folder(folder: Path) -> str:
    """Return the sha256 of the names and sizes of all files in a folder, and of the ends of some.

    Raises:
        InputError: it cannot be read.
    """
    try:
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        names = sorted(files)
        digest = hashlib.sha256(json.dumps([(name, files[name].stat().st_size) for name in names]).encode())
        for name in spread_evenly(names, _SAMPLED_FILES):
            with files[name].open("rb") as file:
                digest.update(file.read(_END_OF_CHUNK))
                file.seek(max(0, files[name].stat().st_size - _END_OF_CHUNK))
                digest.update(file.read(_END_OF_CHUNK))
    except OSError as err:
        raise InputError(f"cannot be read ({err.strerror})", where=folder, fix="check the disk") from err
    return digest.hexdigest()


def fingerprint_pixels(reader: Reader) -> dict[str, Any]:
    """Return the sha256 of all pixels of an image that lies in memory, read in strips."""
    info, digest = reader.info, hashlib.sha256(str(reader.info.dtype).encode())
    for y0 in range(0, info.height_px0, _STRIP_PX):
        strip = Region(0, y0, info.width_px0, min(y0 + _STRIP_PX, info.height_px0))
        digest.update(np.ascontiguousarray(reader.read(strip, level=0)).tobytes())
    return {"name": info.name, "size": None, "sha256": digest.hexdigest(), "of": "pixels"}


def installed_version() -> str:
    """Return darcnn's own version; "unknown" when it runs from files that were never installed."""
    return _version("darcnn") or "unknown"


def _versions() -> dict[str, str]:
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {
        "darcnn": installed_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: version for name, version in libraries.items() if version is not None},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
