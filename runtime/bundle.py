"""A model in one file: a zip of two graphs and what they say of themselves, verified before use."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from darcnn.runtime.errors import BundleError
from darcnn.runtime.manifest import (
    FORMAT,
    MAX_TILE_PX,
    Manifest,
    Precision,
    check_name,
    manifest_from_json,
    manifest_to_json,
)
from darcnn.runtime.onnx_fields import keeps_weights_elsewhere
from darcnn.runtime.sinks.atomic import atomic_file, translated

__all__ = ["MEMBER_CAPS", "Bundle", "open_bundle", "read_training", "write_bundle"]

_MIB = 2**20

# Each member of a bundle in the order written, and its largest size in bytes. A network of this kind
# has some ten million weights, with ResNet-50 some seventy, of two bytes each; a file beyond its cap is not
# one of ours, and is not read into memory.
MEMBER_CAPS: Mapping[str, int] = {
    "manifest.json": _MIB,
    "detect.onnx": 192 * _MIB,
    "mask.onnx": 64 * _MIB,
    "training.json": _MIB,
    "LICENSE": _MIB,
}
_FILE_CAP = sum(MEMBER_CAPS.values()) + _MIB  # the zip's own tables are far below 1 MiB

_MAX_DEPTH = 32  # of a record of training, which nests five deep: who prints or writes one recurses
_AGAIN = "copy or download it again"
_ZIP_MAGIC = b"PK\x03\x04"

# What zipfile raises on damaged files: BadZipFile and struct.error for broken tables, RuntimeError for
# entries that say they are encrypted or need a newer zip, ValueError for impossible offsets and names.
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, RuntimeError, ValueError, EOFError, OverflowError)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle, held in memory: what happens to the file afterwards does not matter."""

    path: Path
    sha256: str  # hex, of the whole file
    manifest: Manifest
    _members: Mapping[str, bytes] = field(repr=False)

    def read(self, member: str) -> bytes:
        """Return the content of `member`, one of `MEMBER_CAPS`, as it was verified.

        Raises:
            KeyError: a bundle has no such member.
        """
        return self._members[member]

    @property
    def precision(self) -> Precision:
        """What the layers of the graphs compute in: "fp32", or "fp16" or "int8" where derived from such."""
        return self.manifest.precision

    @property
    def argument(self) -> str:
        """What names it on a command line, quoted for a shell: its path, or the name it is shipped under."""
        shipped = resources.files("darcnn.runtime").joinpath("models", self.path.name)
        return shlex.quote(self.path.stem if str(shipped) == str(self.path) else str(self.path))

    def with_graphs(self, graphs: Mapping[str, bytes], *, precision: Precision) -> Bundle:
        """Return this bundle with `graphs`, members derived from its own; path and hash stay the file's."""
        manifest = replace(self.manifest, precision=precision)
        return replace(self, manifest=manifest, _members={**self._members, **graphs})


def open_bundle(path: str | Path) -> Bundle:
    """Return the bundle in the file at `path`, every member checked against the manifest.

    Raises:
        BundleError: no such file, not a bundle, damaged, or made by a newer darcnn. The message names
            the file and the fix.
    """
    path = Path(path)
    content = _read_file(path)
    members = _read_members(path, content)
    manifest = _parse_manifest(path, members["manifest.json"])
    _check_hashes(path, manifest, members)
    for name in ("detect.onnx", "mask.onnx"):
        _check_graph(path, name, members[name])
    return Bundle(path, hashlib.sha256(content).hexdigest(), manifest, members)


def read_training(bundle: Bundle) -> dict[str, Any]:
    """Return what training.json of `bundle` says.

    Raises:
        BundleError: it is no table in JSON, or nests deeper than any.
    """
    try:
        table = json.loads(bundle.read("training.json"))
    except (ValueError, RecursionError) as err:
        raise BundleError(
            "training.json is not JSON", where=bundle.path, fix="export the model again"
        ) from err
    if not isinstance(table, dict):
        raise BundleError("training.json is not a table", where=bundle.path, fix="export the model again")
    if _nests_deeper(table, _MAX_DEPTH):
        raise BundleError("training.json nests too deep", where=bundle.path, fix="export the model again")
    return table


def _nests_deeper(value: object, depth: int) -> bool:
    """Tell whether something lies in more than `depth` tables and lists of `value`.

    >>> _nests_deeper({"a": [1]}, 2), _nests_deeper({"a": [[1]]}, 2)
    (False, True)
    """
    parts = [value]
    for _ in range(depth + 1):
        tables = [part for part in parts if isinstance(part, dict | list)]
        parts = [part for one in tables for part in (one.values() if isinstance(one, dict) else one)]
    return bool(parts)


def write_bundle(path: str | Path, manifest: Manifest, members: Mapping[str, bytes]) -> None:
    """Write a bundle; the same input gives the same bytes, and `path` appears only once complete.

    Args:
        path: the file to write, replaced if it exists.
        manifest: what manifest.json is to say; its `files` are filled in here.
        members: the content of every other member.
    Raises:
        BundleError: readers accept no such name, or no member as large.
        OutputError: the file cannot be written.
        ValueError: `members` are not the ones a bundle has.
    """
    path = Path(path)
    if wrong := set(members) ^ (set(MEMBER_CAPS) - {"manifest.json"}):
        raise ValueError(f"a bundle does not have, or lacks, {sorted(wrong)}")
    try:
        check_name(manifest.name)
    except ValueError as err:
        raise BundleError(
            f"cannot be written ({err})", where=path, fix="give the model another name"
        ) from err
    hashes = {name: hashlib.sha256(members[name]).hexdigest() for name in MEMBER_CAPS if name in members}
    table = manifest_to_json(replace(manifest, files=hashes))
    text = json.dumps(table, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    complete = {**members, "manifest.json": text.encode()}
    for name, cap in MEMBER_CAPS.items():
        _check_size(path, name, len(complete[name]), cap)
    with translated(path), atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name in MEMBER_CAPS:
            archive.writestr(_make_entry(name), complete[name])


def _make_entry(name: str) -> zipfile.ZipInfo:
    """Return a zip entry that depends on neither the clock nor the system."""
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))  # the first moment a zip can name
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3  # Unix, wherever it is written
    entry.external_attr = 0o644 << 16
    return entry


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise BundleError("is a folder", where=path, fix="name the .darcnn file inside it")
        size = path.stat().st_size
        if not path.is_file():
            raise BundleError("is not an ordinary file", where=path, fix="name a .darcnn file")
        if size > _FILE_CAP:
            raise BundleError(
                f"has {size / _MIB:.0f} MiB, more than any bundle", where=path, fix="name a .darcnn file"
            )
        content = path.read_bytes()
    except FileNotFoundError as err:
        raise BundleError("no such file", where=path, fix="check the path") from err
    except OSError as err:
        reason = err.strerror or type(err).__name__
        raise BundleError(
            f"cannot be read ({reason})", where=path, fix="check the permissions and the disk"
        ) from err
    if not content:
        raise BundleError("is empty", where=path, fix=_AGAIN)
    return content


def _read_members(path: Path, content: bytes) -> dict[str, bytes]:
    """Return all members, names, sizes and checksums of the zip checked, hashes not yet."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except _ZIP_ERRORS as err:
        if content.startswith(_ZIP_MAGIC):
            raise BundleError("is cut short or damaged", where=path, fix=_AGAIN) from err
        raise BundleError("is not a bundle", where=path, fix="name a .darcnn file") from err
    with archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for entry in entries:
            if entry.filename == "manifest.json":  # first: a newer format may have other members
                _check_format(path, _parse_json(path, _read_member(path, archive, entry)))
        for name in names:
            if name not in MEMBER_CAPS:
                raise BundleError(f"holds {name!r}, which no bundle has", where=path, fix=_AGAIN)
            if names.count(name) > 1:
                raise BundleError(f"holds {name} more than once", where=path, fix=_AGAIN)
        for name in MEMBER_CAPS:
            if name not in names:
                raise BundleError(f"lacks {name}", where=path, fix=_AGAIN)
        return {entry.filename: _read_member(path, archive, entry) for entry in entries}


def _read_member(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    name = entry.filename
    if entry.compress_type != zipfile.ZIP_STORED:
        raise BundleError(
            f"{name} is compressed", where=path, fix="use the bundle as darcnn-export wrote it, not repacked"
        )
    _check_size(path, name, entry.file_size, MEMBER_CAPS[name])
    try:
        content = archive.read(entry)
    except _ZIP_ERRORS as err:
        raise BundleError(f"{name} is damaged", where=path, fix=_AGAIN) from err
    if len(content) != entry.file_size:
        raise BundleError(f"{name} is cut short", where=path, fix=_AGAIN)
    return content


def _check_size(path: Path, name: str, size: int, cap: int) -> None:
    if size > cap:
        raise BundleError(
            f"{name} has {size / _MIB:.1f} MiB, more than the {cap // _MIB} MiB that a bundle may hold",
            where=path,
            fix="export a smaller model" if name.endswith(".onnx") else "give it a shorter text",
        )


def _parse_json(path: Path, content: bytes) -> Mapping[str, Any]:
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as err:
        raise BundleError("manifest.json is not JSON", where=path, fix=_AGAIN) from err
    if not isinstance(table, dict):
        raise BundleError("manifest.json is not a table", where=path, fix=_AGAIN)
    return table


def _check_format(path: Path, table: Mapping[str, Any]) -> None:
    version = table.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError("manifest.json names no format", where=path, fix=_AGAIN)
    if version > FORMAT:
        raise BundleError(
            f"made by a newer darcnn (format {version}, this one reads up to {FORMAT})",
            where=path,
            fix="upgrade with `pip install --upgrade darcnn`",
        )


def _parse_manifest(path: Path, content: bytes) -> Manifest:
    try:
        manifest = manifest_from_json(_parse_json(path, content))
    except ValueError as err:
        raise BundleError(
            f"manifest.json is wrong ({err})", where=path, fix="export the model again"
        ) from err
    tile_px = manifest.input.tile_px
    if not 0 < tile_px <= MAX_TILE_PX:
        raise BundleError(
            f"manifest.json states tiles of {tile_px} px, a bundle may have up to {MAX_TILE_PX}",
            where=path,
            fix="export the model again",
        )
    return manifest


def _check_graph(path: Path, name: str, content: bytes) -> None:
    try:
        is_elsewhere = keeps_weights_elsewhere(content)
    except ValueError as err:
        raise BundleError(f"{name} is no graph ({err})", where=path, fix="export the model again") from err
    if is_elsewhere:  # what lies elsewhere no hash vouches for
        raise BundleError(f"{name} keeps weights in another file", where=path, fix="export the model again")


def _check_hashes(path: Path, manifest: Manifest, members: Mapping[str, bytes]) -> None:
    expected = set(MEMBER_CAPS) - {"manifest.json"}
    if not isinstance(manifest.files, Mapping) or set(manifest.files) != expected:
        raise BundleError(
            "manifest.json does not list the other members", where=path, fix="export the model again"
        )
    for name in sorted(expected):
        if hashlib.sha256(members[name]).hexdigest() != manifest.files[name]:
            raise BundleError(f"{name} is not what manifest.json says (sha256)", where=path, fix=_AGAIN)
