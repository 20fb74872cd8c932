"""What more than one command reads from its command line."""

from __future__ import annotations

import math
from typing import Literal

import click

__all__ = ["BACKENDS", "read_diameter", "read_window"]

BACKENDS = (
    "auto",
    "onnxruntime",
    "openvino",
    "openvino-bf16",
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


def read_window(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[float, float] | None:
    """Return what --window says: the raw values that become black and white, None where it is not given."""
    if text is None:
        return None
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise click.BadParameter(f"{text!r} is no window: give LOW,HIGH such as 0,4095")
    return low, high
