"""Damaged files of every kind are read, or refused in one line: no other error, no hang, no memory for lies.

Files are made small, damaged at random from a fixed seed, opened and read. `-m slow` does the same with more.
"""

from __future__ import annotations

import bz2
import faulthandler
import gzip
import hashlib
import io
import json
import math
import random
import re
import shutil
import struct
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from PIL import Image

from darcnn.runtime.bundle import MEMBER_CAPS
from darcnn.runtime.cli import main
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.engines.protocol import Detections
from darcnn.runtime.errors import BundleError, DarcnnError, InputError
from darcnn.runtime.geometry import Region
from darcnn.runtime.load import load
from darcnn.runtime.readers.open import count_planes, open_source
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.open import is_volume, open_volume
from tests.runtime.microscope_tiffs import write_lsm, write_stk

N_QUICK, N_SLOW = 12, 40  # damaged files of each kind
LIMIT_S = 10  # of processors, a file
HANGS_S = 300  # after which the whole run is ended with a traceback
LIMIT_BYTES = 400 * 2**20  # more memory than that no file of a few kilobytes may take
SEEN_PX = 64  # side of the regions that are read

# -- sound files --------------------------------------------------------------------------------------


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return (np.random.default_rng(0).random(shape) * 250).astype(dtype)


def waves(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    grey = (np.sin(x / 7) * np.cos(y / 5) * 100 + 120).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, 2)


def make_svs(path: Path) -> None:
    words = "Aperio Image Library v11.2.1 \r\n200x160 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.4990"
    options: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(waves(160, 200), description=words, tile=(64, 64), **options)
        tiff.write(waves(40, 50), description="Aperio thumbnail", **options)
        tiff.write(waves(80, 100), description=words, tile=(64, 64), **options)


def make_pyramid(path: Path) -> None:
    values = noise(120, 160, 3)
    with tifffile.TiffWriter(path) as tiff:
        for step in (1, 2):
            options: dict[str, Any] = {"tile": (32, 32), "compression": "zlib", "subfiletype": step - 1}
            tiff.write(values[::step, ::step], photometric="rgb", metadata=None, **options)


def make_jpeg_tiff(path: Path) -> None:
    options: dict[str, Any] = {"photometric": "ycbcr", "subsampling": (2, 2), "compression": "jpeg"}
    tifffile.imwrite(path, waves(120, 160), tile=(64, 64), metadata=None, **options)


def make_strips(path: Path) -> None:
    values = noise(61, 83, dtype=np.uint16)
    tifffile.imwrite(path, values, compression="lzw", rowsperstrip=7, predictor=True)


def make_plain_tiff(path: Path) -> None:
    values = noise(61, 83, dtype=np.float32)
    tifffile.imwrite(path, values, byteorder=">", bigtiff=True, resolution=(20000, 20000), resolutionunit=3)


def make_palette(path: Path) -> None:
    colours = (np.arange(768).reshape(3, 256) * 80).astype(np.uint16)
    tifffile.imwrite(path, noise(40, 50), photometric="palette", colormap=colours)


def make_ome(path: Path) -> None:
    stack = noise(2, 3, 60, 80, dtype=np.uint16)
    sizes = {f"PhysicalSize{axis}": size for axis, size in (("X", 0.5), ("Y", 0.5), ("Z", 1.0))}
    metadata = {"axes": "CZYX", "Channel": {"Name": ["a", "b"]}, **sizes}
    options: dict[str, Any] = {"tile": (32, 32), "compression": "zstd"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(stack, subifds=1, metadata=metadata, **options)
        tiff.write(stack[..., ::2, ::2], subfiletype=1, metadata=None, **options)


def make_imagej(path: Path) -> None:
    metadata = {"axes": "ZYX", "spacing": 0.5, "unit": "um"}
    options: dict[str, Any] = {"metadata": metadata, "resolution": (2, 2)}
    tifffile.imwrite(path, noise(4, 30, 40, dtype=np.uint16), imagej=True, **options)


def make_lsm(path: Path) -> None:
    values = noise(3, 1, 30, 40)
    write_lsm(path, values, "ZCYX", voxel_m=(2e-7, 2e-7, 1e-6), names="a", times_s=(0.0, 1.0))


def make_stk(path: Path) -> None:
    write_stk(path, noise(3, 30, 40), size=0.25, unit="um", distances=(1.0,) * 3, times_ms=(0, 1, 2))


def make_picture(values: np.ndarray, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(values).save(path, **options)


def make_exif_jpeg(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "hello"  # orientation, description
    Image.fromarray(waves(61, 83)).save(path, progressive=True, exif=exif)


def make_mrc(path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile", reason="the extra `volumes` is not installed")
    inner = path if path.suffix == ".mrc" else path.with_suffix("")
    with mrcfile.new(inner, noise(5, 31, 43, dtype=np.int16)) as file:
        file.voxel_size = (13.0, 13.0, 13.0)
    if inner != path:
        path.write_bytes(PACKERS[path.suffix][0](inner.read_bytes()))
        inner.unlink()


def make_nifti(path: Path) -> None:
    nibabel = pytest.importorskip("nibabel", reason="the extra `volumes` is not installed")
    image = nibabel.Nifti1Image(noise(43, 31, 5, dtype=np.uint16), np.diag([0.5, 0.25, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, path)


def make_zarr_3(path: Path) -> None:
    stack = noise(2, 3, 60, 80, dtype=np.uint16)
    group = zarr.create_group(path, zarr_format=3)
    for step in (1, 2):
        level = stack[..., ::step, ::step]
        group.create_array(str(step - 1), data=level, chunks=(1, 1, 32, 32), shards=(1, 1, 64, 64))
    axes = [{"name": "c", "type": "channel"}]
    axes += [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
    scales = [[{"type": "scale", "scale": [1, 2, 0.25 * step, 0.25 * step]}] for step in (1, 2)]
    levels = [{"path": str(i), "coordinateTransformations": scale} for i, scale in enumerate(scales)]
    channels = [{"label": "a", "color": "FF0000"}, {"label": "b"}]
    image = {"axes": axes, "datasets": levels}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [image], "omero": {"channels": channels}}


def make_zarr_2(path: Path) -> None:
    group = zarr.create_group(path, zarr_format=2)  # its chunks are packed with Blosc
    group.create_array("0", data=noise(60, 80, dtype=np.uint16), chunks=(32, 32))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"]
    scale = [{"type": "scale", "scale": [0.25, 0.5]}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]


def _element(group: int, number: int, kind: str, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        value = struct.pack("<H" if kind == "US" else "<I", value)
    content = value.encode() if isinstance(value, str) else value
    content += (b"\0" if kind in ("UI", "OB") else b" ") * (len(content) % 2)
    head = struct.pack("<HH2s", group, number, kind.encode())
    length = struct.pack("<HI", 0, len(content)) if kind in ("OB", "SQ") else struct.pack("<H", len(content))
    return head + length + content


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def make_dicom(path: Path) -> None:
    """Write a slide of 2 x 2 JPEG tiles with the few elements that OpenSlide asks for."""
    pixels, frames = waves(128, 128), []
    for y, x in ((0, 0), (0, 64), (64, 0), (64, 64)):
        file = io.BytesIO()
        Image.fromarray(pixels[y : y + 64, x : x + 64]).save(file, "JPEG")
        frames.append(file.getvalue() + b"\0" * (file.tell() % 2))
    whole_slide = "1.2.840.10008.5.1.4.1.1.77.1.6"
    meta = _element(2, 1, "OB", b"\0\1") + _element(2, 2, "UI", whole_slide) + _element(2, 3, "UI", "1.2.3.9")
    meta += _element(2, 0x10, "UI", "1.2.840.10008.1.2.4.50")
    spacing = _element(0x18, 0x50, "DS", "0.001") + _element(0x28, 0x30, "DS", "0.0005\\0.0005")
    body = [
        *(_element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"), _element(8, 0x16, "UI", whole_slide)),
        *(_element(8, 0x18, "UI", "1.2.3.9"), _element(8, 0x60, "CS", "SM")),
        *(_element(0x20, number, "UI", f"1.2.3.{number}") for number in (0xD, 0xE, 0x52)),
        _element(0x20, 0x9311, "CS", "TILED_FULL"),
        *(_element(0x28, 2, "US", 3), _element(0x28, 4, "CS", "YBR_FULL_422"), _element(0x28, 6, "US", 0)),
        *(_element(0x28, 8, "IS", "4"), _element(0x28, 0x10, "US", 64), _element(0x28, 0x11, "US", 64)),
        *(_element(0x28, 0x100 + i, "US", value) for i, value in enumerate((8, 8, 7, 0))),
        *(_element(0x48, number, "UL", 128) for number in (6, 7)),
        _element(0x5200, 0x9229, "SQ", _item(_element(0x28, 0x9110, "SQ", _item(spacing)))),
    ]
    starts = np.cumsum([0, *(8 + len(frame) for frame in frames[:-1])]).astype("<u4")
    items = [_item(starts.tobytes()), *map(_item, frames), struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)]
    encapsulated = struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OB", 0, 0xFFFFFFFF) + b"".join(items)
    head = b"\0" * 128 + b"DICM" + _element(2, 0, "UL", len(meta)) + meta
    path.write_bytes(head + b"".join(body) + encapsulated)


KINDS: dict[str, Callable[[Path], None]] = {
    "slide.svs": make_svs,
    "pyramid.tif": make_pyramid,
    "jpeg.tif": make_jpeg_tiff,
    "strips.tif": make_strips,
    "plain.tif": make_plain_tiff,
    "palette.tif": make_palette,
    "stack.ome.tif": make_ome,
    "imagej.tif": make_imagej,
    "a.lsm": make_lsm,
    "a.stk": make_stk,
    "colour.png": make_picture(noise(61, 83, 3)),
    "grey.png": make_picture(noise(61, 83, dtype=np.uint16)),
    "colour.jpg": make_picture(waves(61, 83)),
    "turned.jpg": make_exif_jpeg,
    "colour.bmp": make_picture(noise(31, 43, 3)),
    "volume.mrc": make_mrc,
    "packed.mrc.gz": make_mrc,
    "packed.mrc.bz2": make_mrc,
    "volume.nii": make_nifti,
    "packed.nii.gz": make_nifti,
    "three.ome.zarr": make_zarr_3,
    "two.ome.zarr": make_zarr_2,
    "slide.dcm": make_dicom,
}
PACKERS = {".gz": (gzip.compress, gzip.decompress), ".bz2": (bz2.compress, bz2.decompress)}

# -- damage -------------------------------------------------------------------------------------------

NUMBER = re.compile(rb"-?\d+(?:\.\d+)?")
WRITTEN = b'0 -1 1 99999999999999999999 1e308 NaN null "x" [] {} 65535 2147483648'.split(b" ")
WIDTHS = (1, 2, 2, 4, 4, 8)  # bytes of an integer


def some_place(size: int, chance: random.Random) -> int:
    """Return a place in a file; headers lie at its beginning, directories at its end."""
    near = chance.randrange(min(size, 1024))
    return chance.choice((near, near, near, size - 1 - near, chance.randrange(size)))


def flip(content: bytearray, at: int, chance: random.Random) -> None:
    content[at] ^= 1 << chance.randrange(8)


def overwrite(content: bytearray, at: int, chance: random.Random) -> None:
    content[at : at + chance.randint(1, 8)] = chance.randbytes(chance.randint(1, 8))


def truncate(content: bytearray, at: int, chance: random.Random) -> None:
    del content[max(8, chance.randrange(len(content))) :]


def delete(content: bytearray, at: int, chance: random.Random) -> None:
    del content[at : at + chance.choice((1, 2, 4, 16, 100, 1000))]


def repeat(content: bytearray, at: int, chance: random.Random) -> None:
    content[at:at] = content[at : at + chance.choice((1, 4, 64))]


def swap(content: bytearray, at: int, chance: random.Random) -> None:
    other, size = some_place(len(content), chance), chance.choice((2, 4, 8, 64))
    one, two = bytes(content[at : at + size]), bytes(content[other : other + size])
    if len(one) == len(two):
        content[at : at + size], content[other : other + size] = two, one


def set_integer(content: bytearray, at: int, chance: random.Random) -> None:
    width = chance.choice(WIDTHS)
    at -= at % min(width, 2)
    most = 2 ** (8 * width - 1) - 1
    value = chance.choice((0, 1, -1, -2, most, -most - 1, most // 2, min(1000, most), 2 ** (4 * width) - 1))
    content[at : at + width] = value.to_bytes(width, chance.choice(("little", "big")), signed=True)


def set_number(content: bytearray, at: int, chance: random.Random) -> None:
    """Change one of the numbers that are written as text: in XML, JSON, descriptions."""
    found = list(NUMBER.finditer(content))
    if found:
        number = chance.choice(found)
        content[number.start() : number.end()] = chance.choice(WRITTEN)


DAMAGES = (flip, overwrite, truncate, delete, repeat, swap, set_integer, set_integer, set_number)


def damage(content: bytes, chance: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        if len(damaged) >= 16:
            chance.choice(DAMAGES)(damaged, some_place(len(damaged), chance), chance)
    return bytes(damaged)


def damage_file(name: str, content: bytes, chance: random.Random) -> bytes:
    """Damage a file, of packed ones now and then what is packed, and mostly with the right checksums."""
    is_deep = chance.random() < 0.7
    if is_deep and (packer := PACKERS.get(Path(name).suffix)):
        return packer[0](damage(packer[1](content), chance))
    damaged = damage(content, chance)
    return with_checksums(damaged) if is_deep and name.endswith(".png") else damaged


def with_checksums(png: bytes) -> bytes:
    parts, at = [png[:8]], 8
    while at + 12 <= len(png) and at + 12 + (size := int.from_bytes(png[at : at + 4], "big")) <= len(png):
        body = png[at + 4 : at + 8 + size]
        parts += [png[at : at + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        at += 12 + size
    return b"".join([*parts, png[at:]])


# -- what is done with a file -------------------------------------------------------------------------


def look(path: Path, scratch: Path) -> None:
    """Do what a run does with a file: open it, read its corners at each level, planes of a volume."""
    if path.suffix not in (".bz2",) and not path.name.endswith(".mrc.gz"):
        planes = count_planes(path)
        z, t = (n // 2 if n > 1 else None for n in (planes.n_z, planes.n_t))
        with open_source(path, z=z, t=t) as reader:
            info = reader.info
            assert info.mpp is None or all(0 < size <= 1000 for size in info.mpp)
            for level in info.levels:
                for region in corners(level.width_px, level.height_px):
                    pixels = reader.read(region, level=level.index)
                    assert pixels.shape == (region.height, region.width, len(info.channel_names))
                    assert pixels.dtype == info.dtype
    if is_volume(path):
        with open_volume(path, scratch, channel=0 if ".ome" in path.name else None) as volume:
            for axis, n in zip("zyx", volume.info.shape, strict=True):
                plane = volume.read(axis, n // 2)
                assert (plane.shape, plane.dtype) == (volume.info.plane_shape(axis), volume.info.dtype)


def corners(width: int, height: int) -> list[Region]:
    w, h = min(SEEN_PX, width), min(SEEN_PX, height)
    return [Region(x, y, x + w, y + h) for x in {0, width - w} for y in {0, height - h}]


@contextmanager
def guarded() -> Iterator[None]:
    """Fail where it takes long or much memory; make errors of warnings."""
    before, start = peak_bytes(), time.process_time()
    faulthandler.dump_traceback_later(HANGS_S, exit=True, file=sys.__stderr__)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.process_time() - start < LIMIT_S
    assert peak_bytes() - before < LIMIT_BYTES


def peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check(name: str, folder: Path, numbers: range) -> int:
    """Damage the file of one kind in as many ways; return how many were refused."""
    path, scratch = folder / name, folder / "scratch"
    scratch.mkdir()
    KINDS[name](path)
    look(path, scratch)
    members = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    tables = [file for file in members if file.suffix == ".json" or file.name.startswith(".z")]
    sound = {member: member.read_bytes() for member in members}
    n_refused = 0
    for number in numbers:
        chance = random.Random(f"{name} {number}")
        member = chance.choice(tables if tables and chance.random() < 0.6 else members)
        member.write_bytes(damage_file(name, sound[member], chance))
        try:
            with guarded():
                look(path, scratch)
        except DarcnnError as error:
            n_refused += 1
            line = str(error)
            assert "\n" not in line
            assert len(line) < 1000
            assert str(folder) in line  # says which file
        except Exception as error:
            error.add_note(f"{name}, damage number {number}")
            raise
        assert not list(scratch.iterdir()), f"{name}, damage number {number}: left in the scratch folder"
        member.write_bytes(sound[member])
    return n_refused


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path, range(N_QUICK)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    assert check(name, tmp_path, range(N_QUICK, N_QUICK + N_SLOW)) > N_SLOW // 20


# -- bundles ------------------------------------------------------------------------------------------

NUMBERS = (0, -1, 2, 100, 2**31, 10**400, 1e308, math.nan, math.inf, -0.5)
VALUES = (*NUMBERS, None, "x", "", "\n", [], {}, True, [[1]])


def rezip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def places(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield where each value of a JSON table lies."""
    if path:
        yield path
    for key in table if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else ():
        yield from places(table[key], (*path, key))


def change_manifest(content: bytes, chance: random.Random) -> bytes:
    """Change one value of a manifest, or take it away."""
    table = json.loads(content)
    *path, last = chance.choice([place for place in places(table) if place[0] not in ("files", "format")])
    parent = table
    for key in path:
        parent = parent[key]
    if chance.random() < 0.1:
        del parent[last]
    else:
        parent[last] = chance.choice(VALUES)
    return json.dumps(table).encode()


def damage_bundle(sound: bytes, chance: random.Random) -> bytes:
    """Damage the zip, a value of the manifest, or a graph of which the manifest has the right hash."""
    which = chance.choice(("zip", "manifest", "manifest", "graph"))
    if which == "zip":
        return damage(sound, chance)
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        members = {name: archive.read(name) for name in MEMBER_CAPS}
    if which == "manifest":
        members["manifest.json"] = change_manifest(members["manifest.json"], chance)
    else:
        graph = chance.choice(("detect.onnx", "mask.onnx"))
        members[graph] = damage(members[graph], chance)
        table = json.loads(members["manifest.json"])
        table["files"][graph] = hashlib.sha256(members[graph]).hexdigest()
        members["manifest.json"] = json.dumps(table).encode()
    return rezip(members)


def check_bundles(path: Path, numbers: range) -> int:
    """Damage a bundle in as many ways, run what opens; return how many were refused."""
    sound, image, n_refused = path.read_bytes(), noise(20, 23, 3), 0
    for number in numbers:
        path.write_bytes(damage_bundle(sound, random.Random(f"bundle {number}")))
        try:
            with guarded(), load(path, device="cpu") as segmenter:
                segmenter(image)
        except BundleError as error:
            n_refused += 1
            line = str(error)
            assert "\n" not in line
            assert line.startswith(f"{path}: ")
        except Exception as error:
            error.add_note(f"bundle, damage number {number}")
            raise
    return n_refused


def test_damaged_bundles_run_or_are_refused_in_one_line(tiny_bundle: Path) -> None:
    assert check_bundles(tiny_bundle, range(60)) > 30


@pytest.mark.slow
def test_many_damaged_bundles_run_or_are_refused_in_one_line(tiny_bundle: Path) -> None:
    assert check_bundles(tiny_bundle, range(60, 1000)) > 400


# -- the command --------------------------------------------------------------------------------------


class BlindEngine(OracleEngine):
    """Finds nothing, whatever is on the tiles."""

    def detect(self, tiles: np.ndarray) -> Detections:
        return super().detect(np.zeros_like(tiles))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an engine that is fast, with large tiles, in the place of the models that the command loads."""

    def load_blind(model: Any, **options: Any) -> Segmenter:
        engine = BlindEngine(tile_px=256)
        return Segmenter(engine, make_oracle_manifest(engine, halo_px=16))

    # not by its dotted name, which is that of the function too
    monkeypatch.setattr(sys.modules[load.__module__], "load", load_blind)


def run_command(*arguments: Any) -> Any:
    with guarded():
        result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu", "--pixels", "--quiet"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    assert (result.exit_code == 0) == ("Error: " not in result.stderr)
    return result


@pytest.mark.usefixtures("blind")
def test_the_command_tells_of_damaged_images_by_its_exit_code(tmp_path: Path) -> None:
    folder, codes = tmp_path / "images", set()
    for number in range(8):
        folder.mkdir()
        make_picture(noise(20, 23, 3))(folder / "sound.png")
        chance = random.Random(f"command {number}")
        names = chance.sample(["grey.png", "turned.jpg", "strips.tif", "slide.svs", "volume.mrc"], 2)
        for name in names:
            KINDS[name](folder / name)
            (folder / name).write_bytes(damage_file(name, (folder / name).read_bytes(), chance))
        result = run_command(folder, "--model", "blind", "--out", tmp_path / "out", "--overwrite")
        n_failed = sum(line.startswith("Error: ") for line in result.stderr.splitlines())
        assert result.exit_code == (1 if n_failed else 0)
        codes.add(result.exit_code)
        shutil.rmtree(folder)
    assert codes == {0, 1}


def test_the_command_tells_of_damaged_bundles_by_its_exit_code(tiny_bundle: Path, tmp_path: Path) -> None:
    make_picture(noise(20, 23, 3))(tmp_path / "sound.png")
    sound, codes = tiny_bundle.read_bytes(), []
    for number in range(20):
        tiny_bundle.write_bytes(damage_bundle(sound, random.Random(f"command {number}")))
        options = ["--model", tiny_bundle, "--out", tmp_path / "out", "--overwrite"]
        codes.append(run_command(tmp_path / "sound.png", *options).exit_code)
    assert set(codes) == {0, 2}


# -- headers that claim more than a file can hold, and what ended the process -------------------------


def refused(path: Path, words: str, **planes: int) -> None:
    with guarded(), pytest.raises(InputError, match=words), open_source(path, **planes) as reader:
        reader.read(Region(0, 0, 1, 1), level=0)


@pytest.mark.parametrize("name", ["colour.png", "colour.bmp", "colour.jpg"])
def test_a_picture_larger_than_its_file_can_hold_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path)
    content = bytearray(path.read_bytes())
    at = {"colour.png": 16, "colour.bmp": 18, "colour.jpg": content.find(b"\xff\xc0") + 5}[name]
    size = {"colour.png": ">ii", "colour.bmp": "<ii", "colour.jpg": ">HH"}[name]
    struct.pack_into(size, content, at, 60000, 60000)
    path.write_bytes(with_checksums(content) if name == "colour.png" else content)
    refused(path, "60000 x 60000 px in")


def test_a_packed_volume_larger_than_its_file_can_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.nii.gz"
    make_nifti(path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<hhh", content, 42, 32767, 32767, 5)
    path.write_bytes(gzip.compress(content))
    refused(path, "is truncated", z=2)


def test_a_slide_with_tiles_of_many_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "slide.svs"
    make_svs(path)
    content = path.read_bytes()
    for tag in (322, 323):  # width and height of the tiles
        entry = struct.pack("<HHII", tag, 4, 1, 64)
        assert content.count(entry) == 2
        content = content.replace(entry, struct.pack("<HHII", tag, 4, 1, 65520))
    path.write_bytes(content)
    refused(path, "has tiles of 65520 x 65520 px")


@pytest.mark.parametrize("offset", [0, 2**31])
def test_a_dicom_slide_with_a_damaged_table_of_frames_is_refused(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "slide.dcm"
    make_dicom(path)
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.find(b"\xff\xff\xff\xff\xfe\xff\x00\xe0") + 16, offset)
    path.write_bytes(content)
    refused(path, "has a damaged table of frames")
    sound = tmp_path / "other.dcm"
    make_dicom(sound)
    refused(sound, r"slide\.dcm: has a damaged table of frames")


@pytest.mark.parametrize("shards", [None, (32, 32)])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_blosc_chunk_of_another_length_than_it_says_is_refused(
    tmp_path: Path, zarr_format: Any, shards: tuple[int, int] | None
) -> None:
    if zarr_format == 2 and shards:
        pytest.skip("Zarr 2 has no shards")
    path = tmp_path / "a.ome.zarr"
    group = zarr.create_group(path, zarr_format=zarr_format)
    values = noise(32, 32, dtype=np.uint16)
    blosc = "auto" if zarr_format == 2 else zarr.codecs.BloscCodec()
    group.create_array("0", data=values, chunks=(16, 16), shards=shards, compressors=blosc)
    image = {"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "0"}]}
    group.attrs["multiscales"] = [image]
    with open_source(path) as reader:
        np.testing.assert_array_equal(reader.read(Region(0, 0, 32, 32), level=0)[:, :, 0], values)
    chunk = next(file for file in sorted((path / "0").rglob("*")) if file.is_file() and "z" not in file.name)
    content = bytearray(chunk.read_bytes())
    struct.pack_into("<I", content, 12, 2**30)  # of the first chunk in the file
    chunk.write_bytes(content)
    refused(path, "should have 1073741824")


@pytest.mark.parametrize("shape", [[2, 10**20, 60, 80], [2, 3, 10**6, 10**6], [2, 10**6, 60, 80]])
def test_a_zarr_volume_that_claims_what_is_not_there_is_refused(tmp_path: Path, shape: list[int]) -> None:
    path = tmp_path / "a.ome.zarr"
    make_zarr_3(path)
    table = json.loads((path / "0" / "zarr.json").read_text())
    (path / "0" / "zarr.json").write_text(json.dumps({**table, "shape": shape}))
    with guarded(), pytest.raises(DarcnnError, match=r"GB when unpacked|files for|planes of"):
        open_volume(path, tmp_path, channel=0)
    assert list(tmp_path.iterdir()) == [path]


def test_more_channels_than_there_can_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    make_zarr_3(path)
    table = json.loads((path / "0" / "zarr.json").read_text())
    (path / "0" / "zarr.json").write_text(json.dumps({**table, "shape": [10**9, 3, 60, 80]}))
    refused(path, "holds 1000000000 channels", z=1)
