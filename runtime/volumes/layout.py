"""Which planes of a file are those of a volume: of a stack, of a series, or the brightest of each stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from darcnn.runtime.errors import InputError, UsageError
from darcnn.runtime.readers.base import choose_plane
from darcnn.runtime.readers.protocol import Location, Planes

__all__ = ["Layout"]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the planes of a volume are in its file."""

    n_planes: int = 1
    along: Literal["z", "t"] = "z"  # the axis of the file that they lie along
    t: int | None = None  # along z: the time point
    n_projected: int = 1  # along t: planes along z of which each is made, the brightest at every pixel
    n_lacking: int = (
        0  # further ones that the file announces and does not hold: it was not written to its end
    )

    @classmethod
    def of(cls, planes: Planes, path: Location, *, t: int | None, projects: bool) -> Layout:
        """Return the layout of a file that holds `planes`.

        Args:
            planes: of the file.
            path: of the file.
            t: which time point of a series of stacks. A series of single planes is a volume along t.
            projects: a series of stacks becomes one of pictures.
        Raises:
            InputError: a choice is needed, or there is no such time point.
            UsageError: there are no stacks to project.
        """
        is_both = planes.n_z > 1 and planes.n_t > 1
        if projects and t is not None:
            raise UsageError("goes without --t", where="--project", fix="pass one of them")
        if projects and not is_both:
            raise UsageError(
                f"there are no stacks at several time points in {path}", where="--project", fix="leave it out"
            )
        if projects:
            return cls(planes.n_t, "t", n_projected=planes.n_z, n_lacking=planes.n_lacking)
        if planes.is_series(t):
            return cls(planes.n_t, "t", n_lacking=planes.n_lacking)
        if is_both and t is None:
            raise InputError(
                f"holds {planes.n_t} time points of {planes.n_z} planes",
                where=path,
                fix=f"pass --t N with N from 0 to {planes.n_t - 1}, or --project: the brightest of each",
            )
        choose_plane("t", t, planes.n_t, where=path)
        return cls(planes.n_z, "z", t, n_lacking=planes.n_lacking if planes.n_t == 1 else 0)

    @property
    def is_series(self) -> bool:
        """Whether the planes are time points."""
        return self.along == "t"

    def places(self) -> Iterator[tuple[int | None, int | None]]:
        """Yield which planes of the file are read, z and t of each (None: there is one), in order.

        >>> list(Layout(2, "z", t=5).places()), list(Layout(2, "t", n_projected=2).places())
        ([(0, 5), (1, 5)], [(0, 0), (1, 0), (0, 1), (1, 1)])
        """
        for index in range(self.n_planes):
            if self.along == "z":
                yield index, self.t
            elif self.n_projected == 1:
                yield None, index
            else:
                yield from ((z, index) for z in range(self.n_projected))

    def project(self, planes: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Yield the planes of the volume, made of those at `places`; NaN counts for nothing."""
        brightest: NDArray[Any] | None = None
        for number, plane in enumerate(planes, start=1):
            brightest = plane if brightest is None else np.fmax(brightest, plane)
            if number % self.n_projected == 0:
                yield brightest
                brightest = None
