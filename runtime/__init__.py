"""Finds and outlines the objects of images and slides: `load(name)` gives a segmenter, call it on pixels."""

import os
from importlib.metadata import PackageNotFoundError, version

# ONNX Runtime reports to its maker from the moment that it is imported (docs/runtime.md), which is below.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from darcnn.runtime.errors import (
    BundleError,
    DarcnnError,
    DeviceError,
    InputError,
    OutputError,
    ShapeError,
    UsageError,
)
from darcnn.runtime.instances import Instances
from darcnn.runtime.load import load, shipped_models
from darcnn.runtime.readers import open_source
from darcnn.runtime.segmenter import Segmenter

__all__ = [
    "BundleError",
    "DarcnnError",
    "DeviceError",
    "InputError",
    "Instances",
    "OutputError",
    "Segmenter",
    "ShapeError",
    "UsageError",
    "__version__",
    "load",
    "open_source",
    "shipped_models",
]

try:
    __version__ = version("darcnn")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
