"""Sources of pixels: slides, TIFFs, pictures, volumes and arrays behind one protocol."""

from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.open import count_planes, open_source
from darcnn.runtime.readers.protocol import Pixels, Planes, Reader, SlideInfo

__all__ = ["ArrayReader", "Pixels", "Planes", "Reader", "SlideInfo", "count_planes", "open_source"]
