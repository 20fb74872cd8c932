"""Blosc chunks of Zarr arrays, checked before they are unpacked.

A chunk of Blosc says in its header how long it is, and Blosc believes it: of a chunk that was cut short it
reads memory that is not its own, which gives wrong pixels or ends the process.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import Codec
from zarr.codecs import BloscCodec, ShardingCodec

__all__ = ["with_checked_blosc"]

_HEADER_BYTES = 16
_LENGTH_AT = 12  # of the whole chunk, 4 bytes, little-endian


def with_checked_blosc(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return the same array; reading a chunk of Blosc that is not as long as it says raises a ValueError."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 2:
        compressor = metadata.compressor
        if getattr(compressor, "codec_id", None) != "blosc":
            return array
        checked = replace(metadata, compressor=_checked_of_zarr_2(compressor))
    else:
        checked = replace(metadata, codecs=_checked_of_zarr_3(metadata.codecs))
    return zarr.Array(zarr.AsyncArray(checked, array.store_path))


class _CheckedBlosc(BloscCodec):
    """Zarr 3's codec."""

    async def _decode_single(self, chunk_bytes: Any, chunk_spec: Any) -> Any:
        _check(chunk_bytes.as_numpy_array())
        return await super()._decode_single(chunk_bytes, chunk_spec)


def _checked_of_zarr_3(codecs: Iterable[Codec]) -> tuple[Codec, ...]:
    checked: list[Codec] = []
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            codec = replace(codec, codecs=_checked_of_zarr_3(codec.codecs))
        elif isinstance(codec, BloscCodec):
            names = ("typesize", "cname", "clevel", "shuffle", "blocksize")
            codec = _CheckedBlosc(**{name: getattr(codec, name) for name in names})
        checked.append(codec)
    return tuple(checked)


def _checked_of_zarr_2(compressor: Any) -> Any:
    """Return the codec of numcodecs, which comes with zarr, as one that checks."""

    class Checked(type(compressor)):  # type: ignore[misc]  # its class is known when the file is open only
        def decode(self, buf: Any, out: Any = None) -> Any:
            _check(np.frombuffer(buf, np.uint8))
            return super().decode(buf, out)

    settings = compressor.get_config()
    return Checked(**{name: value for name, value in settings.items() if name != "id"})


def _check(chunk: NDArray[Any]) -> None:
    n_bytes = chunk.nbytes
    header = chunk[:_HEADER_BYTES].tobytes()
    stated = int.from_bytes(header[_LENGTH_AT:_HEADER_BYTES], "little")
    if len(header) < _HEADER_BYTES or stated != n_bytes:
        raise ValueError(f"a chunk of {n_bytes} bytes should have {stated}")
