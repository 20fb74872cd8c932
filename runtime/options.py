"""What more than one command reads from its command line."""

from __future__ import annotations

import math
from typing import Literal

import click

__all__ = ["BACKENDS", "read_diameter"]

BACKENDS = (
    "auto",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
)  # what may run the graphs of a bundle


def read_diameter(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> float | Literal["auto"] | None:
    """Return what --diameter says: a size above 0, auto, or None where it is not given."""
    if text is None or text == "auto":
        return None if text is None else "auto"
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise click.BadParameter(f"{text!r} is neither a number above 0 nor auto")
    return value
