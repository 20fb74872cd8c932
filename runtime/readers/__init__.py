"""Sources of pixels: slides, TIFFs, pictures and arrays behind one protocol."""

from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.readers.open import open_source
from darcnn.runtime.readers.protocol import Pixels, Reader, SlideInfo

__all__ = ["ArrayReader", "Pixels", "Reader", "SlideInfo", "open_source"]
