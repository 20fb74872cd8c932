"""Draws what the rules of `darcnn.runtime.volumes.link` do to sections of neighbouring planes.

    python benchmarks/linking_picture.py docs/tomograms-linking.png

Each panel is a volume seen from the side: planes from top to bottom, sections as bars, one colour an object,
grey what is left out. The objects are those that `link_sections` returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np

from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.sections import Section

_HEIGHT = 3  # pixels of a section along y, which is not seen
_COLOURS = ("tab:green", "tab:orange", "tab:blue", "tab:red")


def _section(plane: int, x: int, width: int) -> Section:
    return Section(plane, x, 0, np.ones((_HEIGHT, width), np.bool_), 0.9, False)


def cases() -> dict[str, tuple[list[list[Section]], dict[str, Any]]]:
    """Return the sections of each panel by plane, and how they are linked."""
    round_ = [4, 8, 10, 10, 8, 4]
    one_to_one = [[_section(z, 2 + z, 9), _section(z, 13 + z, 9)] for z in range(6)]
    missed = [[_section(z, 12 - w // 2, w)] if z != 3 else [] for z, w in enumerate([*round_, 3])]
    merged = [[_section(z, 2, 9), _section(z, 13, 9)] if z != 3 else [_section(z, 2, 20)] for z in range(7)]
    waist = [[_section(z, 12 - w // 2, w)] for z, w in enumerate([4, 8, 9, 8, 6, 3, 6, 8, 9, 8, 4])]
    noise = [[_section(z, 4, 9)] + ([_section(z, 18, 5)] if z in (3, 4) else []) for z in range(7)]
    leaps = [[_section(z, x, 5), _section(z, 24 - z, 5)] for z, x in enumerate((0, 7, 13, 12, 5, 0))]
    return {
        "one to one,\nthe best overlap first": (one_to_one, {}),
        "missed on one plane": (missed, {}),
        "one section for\none plane only": (merged, {}),
        "a waist": (waist, {}),
        "fewer planes than\na slab joins (3)": (noise, {"min_planes": 3}),
        "time points of a series:\nthe nearest of the rest": (leaps, {"is_series": True}),
    }


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def main(path: Path) -> None:
    """Write the picture to PATH."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = cases()
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2), sharey=True)
    for axis, (title, (planes, rules)) in zip(axes, panels.items(), strict=True):
        for section in (one for plane in planes for one in plane):
            axis.barh(section.plane, section.mask.shape[1], left=section.x, color="lightgrey", height=0.9)
        for number, chain in enumerate(link_sections(planes, **rules)):
            for section in chain:
                width = section.mask.shape[1]
                axis.barh(section.plane, width, left=section.x, color=_COLOURS[number], height=0.7)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 30)
        axis.set_xlabel("x")
    axes[0].invert_yaxis()
    axes[0].set_ylabel("plane")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    from one_line import run

    run(main)
