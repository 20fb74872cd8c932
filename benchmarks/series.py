"""Are cells that move joined in time? Discs that walk at random, seen at each time point.

    python benchmarks/series.py
    python benchmarks/series.py --jump 30

Discs of 16 to 22 px walk on 600 x 600 px, no two nearer than 18 px; a step is normal along x and y, and their
size is seen with an error of 3 %. Each time point
is a plane of sections: of every disc, or of 95 % of them and five where there is none. Joined as those
of a series, and as planes of a volume, by overlap alone. `found` is the share of the steps of all discs that
a track holds, `wrong` the share of the steps of all tracks that do not lead from a disc to itself. No disc
divides: all `divisions` that are told are false.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.volumes.follow import follow_sections
from darcnn.runtime.volumes.link import link_sections
from darcnn.runtime.volumes.matching import Chain
from darcnn.runtime.volumes.sections import Section, trimmed

_SIDE_PX, _RADIUS_PX, _APART_PX = 600, 10, 18
_RADII_PX, _ERROR = (8.0, 11.0), 0.03
_FRAMES = 20
_SEEN, _FALSE = 0.95, 5  # share of the discs that is seen, and what is seen besides, at each time point
_TRIES = 50  # of a disc to find a place for its next step

Planes = list[list[Section]]


@click.command()
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--jump", type=float, default=0.0, help="The whole field moves by this once, half way; pixels.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here as well.")
def main(seed: int, jump: float, json_path: Path | None) -> None:
    """Join discs that walk at random, ever denser and faster."""
    rows = []
    click.echo(
        "discs  step (diameters)  seen  by overlap: found  wrong   as a series: found  wrong  divisions"
    )
    for n_discs in (30, 100, 200):
        for step in (0.2, 0.4, 0.6, 0.8):
            for seen, n_false in ((1.0, 0), (_SEEN, _FALSE)):
                rng = np.random.default_rng(seed)
                planes, owner = _walk(rng, n_discs, step, seen=seen, n_false=n_false, jump_px=jump)
                tracks = list(follow_sections(planes))
                by_overlap = _judge(link_sections(planes), owner, n_discs)
                as_series = _judge([track.sections for track in tracks], owner, n_discs)
                divisions = len({track.parent for track in tracks if track.parent is not None})
                row = {"discs": n_discs, "step": step, "seen": seen, "false": n_false}
                rows.append({**row, "by_overlap": by_overlap, "as_series": as_series, "divisions": divisions})
                figures = [n_discs, step, seen, *by_overlap, *as_series, divisions]
                line = "{:5}  {:16}  {:4.2f}  {:17.2f}  {:5.3f}  {:19.2f}  {:5.3f}  {:9}"
                click.echo(line.format(*figures))
    if json_path is not None:
        json_path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _walk(
    rng: np.random.Generator, n_discs: int, step: float, *, seen: float, n_false: int, jump_px: float
) -> tuple[Planes, dict[tuple[int, int, int], int]]:
    """Return the sections of each time point, and which disc each is of, by time point, x and y."""
    places = np.full((n_discs, 2), -_SIDE_PX, np.float64)  # none is there yet
    radii = rng.uniform(*_RADII_PX, n_discs)
    planes: Planes = []
    owner = {}
    for t in range(_FRAMES):
        for disc in rng.permutation(n_discs):
            for _ in range(_TRIES):
                place = rng.uniform(0, _SIDE_PX, 2) if t == 0 else _step(rng, places[disc], step)
                if _is_free(place, np.delete(places, disc, axis=0)):
                    places[disc] = place
                    break
        is_seen = rng.random(n_discs) < seen
        false = rng.uniform(_RADIUS_PX, _SIDE_PX - _RADIUS_PX, (n_false, 2))
        aside = jump_px / 2**0.5 if t >= _FRAMES // 2 else 0.0
        middles = np.concatenate([places, false]) + aside
        seen_radii = np.concatenate([radii, rng.uniform(*_RADII_PX, n_false)])
        seen_radii *= rng.normal(1, _ERROR, len(seen_radii))
        found = [_disc(t, *middle, radius) for middle, radius in zip(middles, seen_radii, strict=True)]
        planes.append([*(one for one, is_ in zip(found, is_seen, strict=False) if is_), *found[n_discs:]])
        owner |= {(t, one.x, one.y): disc for disc, one in enumerate(found[:n_discs])}
    return planes, owner


def _disc(t: int, x: float, y: float, radius: float) -> Section:
    x0, y0, side = int(x - radius), int(y - radius), 2 * int(np.ceil(radius)) + 2
    rows, columns = np.mgrid[y0 : y0 + side, x0 : x0 + side] + 0.5
    return trimmed(Section(t, x0, y0, np.hypot(rows - y, columns - x) <= radius, 0.9, False))


def _step(rng: np.random.Generator, place: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    return place + rng.normal(0, step * 2 * _RADIUS_PX, 2)


def _is_free(place: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    is_inside = (place >= _RADIUS_PX).all() and (place < _SIDE_PX - _RADIUS_PX).all()
    return bool(is_inside and (np.linalg.norm(others - place, axis=1) > _APART_PX).all())


def _judge(
    chains: Iterable[Chain], owner: dict[tuple[int, int, int], int], n_discs: int
) -> tuple[float, float]:
    """Return the shares of steps found and wrong."""
    right = n_steps = 0
    for chain in chains:
        discs = [owner.get((one.plane, one.x, one.y), -1) for one in chain]
        right += sum(one == other >= 0 for one, other in pairwise(discs))
        n_steps += len(chain) - 1
    return right / (n_discs * (_FRAMES - 1)), (n_steps - right) / max(1, n_steps)


if __name__ == "__main__":
    from one_line import run

    run(main)
