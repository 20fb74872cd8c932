"""What a user may choose for a run over a slide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from darcnn.runtime.errors import UsageError

if TYPE_CHECKING:
    from darcnn.runtime.volumes.options import VolumeOptions

__all__ = ["EXTRA_FORMATS", "RunOptions", "asked_options", "check_formats"]

EXTRA_FORMATS = ("csv", "labels-tiff")  # written when asked for
# What the objects do not depend on, or what is told apart by something else.
_NOT_ASKED = ("overwrite", "restart", "row_filter", "also")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a user may choose for a run."""

    mpp: float | None = None  # micrometres per level-0 pixel, in place of what the file says
    pixels: bool = False  # take the pixels as they are, whatever their size
    diameter_px: float | Literal["auto"] | None = None  # of a typical object, level-0 pixels; auto: estimated
    channel: int | str | None = None  # number or name
    # raw values that become black and white; None: the model's rule
    window: tuple[float, float] | None = None
    z: int | None = None  # the plane that the reader was opened at; recorded
    t: int | None = None  # the time point, likewise
    tissue: bool = True  # leave out glass and empty background
    roi: str | None = None  # where to look: X0,Y0,X1,Y1 in level-0 pixels, or a GeoJSON file
    row_filter: str | None = None  # a condition on the measurements of the objects that are reported
    also: tuple[str, ...] = ()  # of EXTRA_FORMATS; may change without finding the objects again
    overwrite: bool = False  # replace a complete result
    restart: bool = False  # begin anew where an earlier try stopped


def asked_options(chosen: RunOptions | VolumeOptions, *, channel: int | None = None) -> dict[str, Any]:
    """Return the options that the objects depend on, by name: what results are told apart by.

    `channel` is the number of the channel, where the file has been asked: "1" may be the name of another.

    >>> "window" in asked_options(RunOptions()), asked_options(RunOptions(window=(0.0, 9.0)))["window"]
    (False, (0.0, 9.0))
    """
    asked = {key: value for key, value in asdict(chosen).items() if key not in _NOT_ASKED}
    for name in (
        "window",
        "series",
        "project",
    ):  # results from before there were these stay what was asked for
        if not asked.get(name):
            asked.pop(name, None)
    said = asked["channel"]
    if isinstance(said, str) and said.isascii() and said.isdecimal():
        asked["channel"] = int(said) if channel is None else channel
    return asked


def check_formats(also: Sequence[str], known: Sequence[str]) -> None:
    """Refuse formats that are none of those `known`.

    Raises:
        UsageError: one of them is not.
    """
    unknown = sorted(set(also) - set(known))
    if unknown:
        raise UsageError(f"no format {unknown[0]}", where="--also", fix=f"choose from {', '.join(known)}")
