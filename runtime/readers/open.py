"""One door to all files with pixels: picks the reader by the ending, by content where that is not enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from darcnn.runtime.errors import InputError
from darcnn.runtime.readers.base import suffix_of
from darcnn.runtime.readers.czi import CziReader
from darcnn.runtime.readers.image_places import SEVERAL_IMAGES, split_image
from darcnn.runtime.readers.ims import ImsReader
from darcnn.runtime.readers.lif import LifReader
from darcnn.runtime.readers.microscope import MicroscopeReader
from darcnn.runtime.readers.mrc import MrcReader
from darcnn.runtime.readers.nd2 import Nd2Reader
from darcnn.runtime.readers.nifti import NiftiReader
from darcnn.runtime.readers.ome_zarr import OmeZarrReader, is_ome_zarr, is_url
from darcnn.runtime.readers.ome_zarr_images import list_zarr_images
from darcnn.runtime.readers.picture import PictureReader, is_picture
from darcnn.runtime.readers.protocol import Location, Planes, Reader
from darcnn.runtime.readers.slide import SlideReader, detect_vendor, is_slide
from darcnn.runtime.readers.tiff import TiffReader, is_deep, is_tiff

__all__ = [
    "MRC",
    "NIFTI",
    "PACKED",
    "PICTURES",
    "SUFFIXES",
    "count_planes",
    "is_packed_volume",
    "is_readable",
    "list_images",
    "open_source",
    "read_planes",
]

PACKED = (".gz", ".bz2")

_OF_SEVERAL = (TiffReader, MicroscopeReader)  # readers of files with several images, and with several planes
_HEAD_BYTES = 16  # enough for the magic bytes of every format


class _Format(Protocol):
    """What the class of a reader offers before there is a reader."""

    def __call__(self, path: Any, *, z: int | None, t: int | None, mpp: float | None) -> Reader: ...

    def count_images(self, path: Any) -> int: ...

    def count_planes(self, path: Any) -> Planes: ...


def open_source(
    path: str | Path, *, z: int | None = None, t: int | None = None, mpp: float | None = None
) -> Reader:
    """Open a slide, TIFF, picture, volume or OME-Zarr image for reading; a context manager.

    Args:
        path: the file; of a slide of several files, the one that opens it (.mrxs, .vms, one .dcm). Of an
            OME-Zarr image the folder, or a URL. One of several images in a file is FILE/NUMBER, from 0.
        z: which plane of a stack, from 0; may be left out where there is one only.
        t: which time point of a series, likewise.
        mpp: micrometres per pixel of level 0, in place of what the file says.
    Raises:
        InputError: no such file, a folder, empty, no permission, an unknown or damaged format,
            `z` or `t` is needed or out of range, or the format needs a package that is not installed.
            The message names the file and the fix.
        UsageError: `mpp` is no pixel size.
    """
    source = path if is_url(path) else Path(path)
    return _format_of(source)(source, z=z, t=t, mpp=mpp)


def count_planes(path: str | Path) -> Planes:
    """Return how many planes along z and t a file holds: what `open_source` may be asked for.

    Raises:
        InputError: as `open_source`.
    """
    source = path if is_url(path) else Path(path)
    return _format_of(source).count_planes(source)


def read_planes(path: Path, places: Iterable[tuple[int | None, int | None]]) -> Iterator[Reader]:
    """Yield a reader of each plane (z, t) of `places`, open until the next is asked for.

    Raises:
        InputError: as `open_source`.
    """
    of = _format_of(path)
    if isinstance(of, type) and issubclass(of, _OF_SEVERAL):  # the file is opened once
        yield from of.read_planes(path, places)
        return
    for z, t in places:
        with of(path, z=z, t=t, mpp=None) as reader:
            yield reader


def list_images(path: Location) -> list[Location]:
    """Return the places of the images in a file, folder or URL: its own, where it holds one.

    Of several in TIFF, ND2, LIF and CZI (IMS holds one) these are FILE/0, FILE/1 and so on; of OME-Zarr see
    `list_zarr_images`. What cannot be read stands for itself: opening it says why.
    """
    if isinstance(path, str) or is_ome_zarr(path):
        return list_zarr_images(path)
    if suffix_of(path) not in SEVERAL_IMAGES:
        return [path]
    try:
        of = _format_of(path)
        count = of.count_images(path)
    except InputError:
        return [path]
    return [path / str(number) for number in range(count)] if count > 1 else [path]


def is_readable(path: Path) -> bool:
    """Tell by its ending, or of a folder by what is in it, whether `open_source` opens it; nothing is read.

    >>> is_readable(Path("a.NII.gz")), is_readable(Path("a.csv"))
    (True, False)
    """
    return suffix_of(path) in _BY_SUFFIX or is_ome_zarr(path)


def is_packed_volume(path: Path) -> bool:
    """Tell by its ending whether a file is MRC packed with gzip or bzip2, which is read as a volume only.

    >>> is_packed_volume(Path("a.mrc.gz")), is_packed_volume(Path("a.tif.gz"))
    (True, False)
    """
    return path.suffix.lower() in PACKED and Path(path.stem).suffix.lower() in MRC


def _format_of(path: Location) -> _Format:
    if isinstance(path, str) or is_ome_zarr(path):
        return OmeZarrReader
    file, number = split_image(path)
    head = _read_head(file)
    is_scene = number is not None and suffix_of(file) == ".czi"  # OpenSlide knows no scenes
    of = CziReader if is_scene else _BY_SUFFIX.get(suffix_of(file), _by_content)(file, head)
    if number is not None and not (isinstance(of, type) and issubclass(of, _OF_SEVERAL)):
        raise InputError("holds one image", where=file, fix=f"name {file}")
    return of


def _read_head(path: Path) -> bytes:
    if path.is_dir():
        raise InputError("is a folder", where=path, fix="name the slide file inside it")
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except FileNotFoundError as err:
        raise InputError("no such file", where=path, fix="check the path") from err
    except PermissionError as err:
        raise InputError("may not be read", where=path, fix="ask for permission to read the file") from err
    except OSError as err:
        raise InputError(f"cannot be read ({err.strerror})", where=path, fix="check the disk") from err
    if not head:
        raise InputError("is empty (0 bytes)", where=path, fix="copy the file again")
    return head


def _always(reader: _Format) -> Callable[[Path, bytes], _Format]:
    """Return what picks a reader whatever the file holds."""
    return lambda path, head: reader


def _czi(path: Path, head: bytes) -> _Format:
    """OpenSlide reads brightfield, and all scenes of it as one slide."""
    return SlideReader if is_slide(path) else CziReader


def _tiff(path: Path, head: bytes) -> _Format:
    """Scanners and microscopes share the ending: OpenSlide reads what a scanner's vendor marked."""
    vendor = detect_vendor(path)
    if vendor not in (None, "generic-tiff") and not (vendor == "aperio" and is_deep(path)):
        return SlideReader
    if is_tiff(head):
        return TiffReader
    raise InputError(
        f"is neither a TIFF nor a slide, whatever its ending {path.suffix} says",
        where=path,
        fix="copy the file again or rename it after its real format",
    )


def _by_content(path: Path, head: bytes) -> _Format:
    if is_tiff(head):
        return _tiff(path, head)
    if detect_vendor(path) is not None:
        return SlideReader
    if is_picture(head):
        return PictureReader
    known = " ".join(SUFFIXES)
    raise InputError(
        "has an unknown format", where=path, fix=f"export it as OME-TIFF, or pass one of {known}"
    )


_slide, _picture = _always(SlideReader), _always(PictureReader)
_mrc, _nifti = _always(MrcReader), _always(NiftiReader)

_BY_SUFFIX: dict[str, Callable[[Path, bytes], _Format]] = {
    ".tif": _tiff,
    ".tiff": _tiff,
    ".btf": _tiff,  # BigTIFF
    ".tf8": _tiff,
    ".tf2": _tiff,
    ".qptiff": _tiff,
    ".lsm": _tiff,  # Zeiss, before CZI
    ".stk": _tiff,  # MetaMorph
    ".svs": _tiff,  # Aperio; other programs write plain TIFF under this name
    ".ndpi": _tiff,  # Hamamatsu
    ".scn": _tiff,  # Leica
    ".bif": _tiff,  # Ventana
    ".mrxs": _slide,  # 3DHISTECH; the file itself is a JPEG
    ".vms": _slide,  # Hamamatsu
    ".vmu": _slide,
    ".svslide": _slide,  # Sakura
    ".dcm": _slide,  # DICOM
    ".czi": _czi,  # Zeiss
    ".ims": _always(ImsReader),  # Imaris
    ".lif": _always(LifReader),  # Leica
    ".nd2": _always(Nd2Reader),  # Nikon
    ".png": _picture,
    ".jpg": _picture,
    ".jpeg": _picture,
    ".bmp": _picture,
    ".mrc": _mrc,
    ".rec": _mrc,  # tomograms of IMOD
    ".map": _mrc,  # CCP4
    ".st": _mrc,  # stacks of SerialEM
    ".nii": _nifti,
    ".nii.gz": _nifti,
}

PICTURES = tuple(suffix for suffix, of in _BY_SUFFIX.items() if of is _picture)
MRC = tuple(suffix for suffix, of in _BY_SUFFIX.items() if of is _mrc)
NIFTI = tuple(suffix for suffix, of in _BY_SUFFIX.items() if of is _nifti)
SUFFIXES = tuple(_BY_SUFFIX)  # what a command may look for in a folder
