"""The picture of a series: its first, middle and last time point, and the ways that objects have gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from darcnn.runtime.intensity import Window
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.sinks.parquet import open_table
from darcnn.runtime.volumes.labels import Numbered
from darcnn.runtime.volumes.overview import (
    GAP_PX,
    LINE_PX,
    colours_of,
    legend,
    plane_with_outlines,
    shrunk,
)
from darcnn.runtime.volumes.stack import Stack

__all__ = ["write_series_overview"]

_PANEL_PX = 640
_PATH_PX = 2  # width of the line of a path


def write_series_overview(
    path: Path,
    stack: Stack,
    window: Window,
    numbered: Numbered,
    *,
    tracks: Path,
    parents: Mapping[int, int | None],
    model_name: str,
) -> None:
    """Write the first, the middle and the last time point with outlines and paths, as PNG.

    Each object has a colour of its own; its path is that of its centroid up to the time point shown, from
    where its mother was last.

    Args:
        path: PNG to write.
        stack: of the series, along time.
        window: raw values that become black and white.
        numbered: the objects.
        tracks: the table of `measure_tracks`.
        parents: which object divided into each, None where none did.
        model_name: for the legend.
    Raises:
        InputError: the series cannot be read.
        OSError: the file cannot be written; nothing is left behind.
    """
    n_times, height, width = stack.volume.info.shape
    factor = max(1, _PANEL_PX // max(height, width))
    colours = colours_of(numbered)
    with open_table(tracks) as file:
        table = file.read(columns=["id", "t", "x", "y"])
    rows = np.stack([table[name].to_numpy().astype(np.float64) for name in table.column_names], axis=1)
    shown = tuple(dict.fromkeys((0, n_times // 2, n_times - 1)))
    panels = []
    for t in shown:
        panel = shrunk(plane_with_outlines(stack, t, window, numbered, factor, colours), _PANEL_PX)
        _draw_paths(panel, rows[rows[:, 1] <= t], parents, panel.width / width, colours)
        panels.append(panel)
    across = sum(panel.width + GAP_PX for panel in panels) - GAP_PX
    page = Image.new("RGB", (max(across, 480), panels[0].height + LINE_PX), "white")
    for number, panel in enumerate(panels):
        page.paste(panel, (number * (panel.width + GAP_PX), 0))
    times = ", ".join(map(str, shown))
    legend(page, model_name, numbered, f"{width} x {height} pixels, time points {times} of {n_times}")
    with atomic_file(path) as file:
        page.save(file, format="PNG")


def _draw_paths(
    panel: Image.Image,
    rows: NDArray[np.float64],
    parents: Mapping[int, int | None],
    factor: float,
    colours: NDArray[np.uint8],
) -> None:
    """Draw the path of each object; `rows` (N, 4) are id, t, x and y in pixels of the series."""
    draw = ImageDraw.Draw(panel)
    ordered = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # object by object, in time
    ways = {
        int(way[0, 0]): way[:, 2:] * factor
        for way in np.split(ordered, 1 + np.flatnonzero(np.diff(ordered[:, 0])))
        if len(way)
    }
    for number, way in ways.items():
        mother = ways.get(parents[number] or 0)
        points = [tuple(point) for point in (way if mother is None else np.r_[mother[-1:], way]).tolist()]
        if len(points) > 1:
            draw.line(points, fill=tuple(colours[number].tolist()), width=_PATH_PX)
