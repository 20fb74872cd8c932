"""What more than one command reads from its command line."""

from __future__ import annotations

import math
from typing import Literal

import click

__all__ = ["BACKENDS", "N_VIEWS", "read_diameter", "read_window", "views_option"]

BACKENDS = (
    "auto",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
)  # what may run the graphs of a bundle


N_VIEWS = (1, 2, 4)  # sets of views that there are; eight are no better: docs/results.md

views_option = click.option(
    "--views",
    type=click.Choice([str(n) for n in N_VIEWS]),
    default="1",
    show_default=True,
    callback=lambda context, parameter, text: int(text),
    help="See each tile from so many sides, turned and mirrored, and report what at least half of them find: "
    "better, for as many times the work.",
)


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
