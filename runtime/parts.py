"""What a run has done so far: one part file for each row of tiles, and a journal of what they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from darcnn.runtime.errors import OutputError
from darcnn.runtime.measure import object_schema
from darcnn.runtime.seams import drop_twins
from darcnn.runtime.sinks.atomic import atomic_file
from darcnn.runtime.sinks.parquet import open_table

__all__ = ["TILE", "FinalRow", "Parts", "empty_part", "with_tile"]

_JOURNAL = "journal.json"
# columns of the parts that the result does not have
TILE, _SEAM, _SATURATED = "tile", "near_seam", "from_saturated_tile"
_MARKED = b"darcnn.marked"  # in the metadata of a part: its tiles that are told of in the end


def with_tile(
    table: pa.Table, tile: int, near_seam: NDArray[np.bool_], *, is_saturated: bool = False
) -> pa.Table:
    """Return the measured objects of a tile as a part.

    Args:
        table: the N objects.
        tile: its index.
        near_seam: (N,) which of them lie near a seam.
        is_saturated: whether the tile holds as many objects as the model can report.
    """
    return (
        table.append_column(TILE, pa.array(np.full(table.num_rows, tile, np.int64)))
        .append_column(_SEAM, pa.array(near_seam))
        .append_column(_SATURATED, pa.array(np.full(table.num_rows, is_saturated)))
    )


def empty_part(channel_names: Sequence[str]) -> pa.Table:
    """Return the part of a tile without objects."""
    return with_tile(object_schema(channel_names).empty_table(), 0, np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True)
class FinalRow:
    """The N objects of a row of tiles that are reported."""

    table: pa.Table  # numbered
    n_saturated: int  # tiles that hold as many objects as the model can report


@dataclass(frozen=True, slots=True)
class Parts:
    """The part files in `folder`; a file that exists is complete."""

    folder: Path

    def begin(self, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what an earlier try of the same run noted, None if there was none.

        Args:
            asked: all that the objects depend on: model, options, slide.
        Raises:
            OutputError: an earlier try asked for something else.
        """
        path = self.folder / _JOURNAL
        try:
            journal: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            for stray in self.folder.glob("row-*.parquet"):  # of what, nobody knows
                stray.unlink()
            return None
        except ValueError:
            journal = {}
        wanted = json.loads(json.dumps(asked))
        if journal.get("asked") == wanted:
            found: dict[str, Any] = journal["found"]
            return found
        earlier = journal.get("asked", {})
        differing = sorted(key for key in wanted if earlier.get(key) != wanted[key])
        raise OutputError(
            f"holds a run that was begun with another {' and '.join(differing)}",
            where=self.folder.parent,
            fix="pass --restart to begin anew, or the same options to go on",
        )

    def note(self, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Write the journal: what was asked for, and what was found out before the first tile."""
        with atomic_file(self.folder / _JOURNAL) as file:
            file.write(json.dumps({"asked": asked, "found": found}, indent=1).encode())

    def has(self, row: int) -> bool:
        """Tell whether a row of tiles is done; a part that a failing disk has cut off is none."""
        try:
            with open_table(self._path(row)):
                return True
        except (OSError, OutputError):
            return False

    def write(self, row: int, table: pa.Table, marked: Sequence[int] = ()) -> None:
        """Write the objects of a row of tiles, in the order of the lattice, each from `with_tile`.

        `marked` are those of its tiles that are told of in the end, since their pixels are damaged, say.
        """
        if marked:
            table = table.replace_schema_metadata({_MARKED: json.dumps(list(marked))})
        with atomic_file(self._path(row)) as file:
            pq.write_table(table, file)

    def read(
        self, n_rows: int, keep: Callable[[pa.Table], NDArray[np.bool_]] | None = None
    ) -> Iterator[FinalRow]:
        """Yield the objects of each row of tiles: seams resolved, ids 1, 2, ...

        Objects that `keep` leaves out have no id. It is asked after the seams are resolved, so that what it
        says of one object changes no other.

        Three rows are in memory at once: an object on a seam has its twin in its own row or in one beside.
        """
        first = 1
        before: pa.Table | None = None
        current = self.load(0) if n_rows else None
        for row in range(n_rows):
            assert current is not None
            after = self.load(row + 1) if row + 1 < n_rows else None
            n_saturated = len(np.unique(current[TILE].filter(current[_SATURATED])))
            table = current.filter(pa.array(_stays(before, current, after)))
            if keep is not None:
                table = table.filter(pa.array(keep(table)))
            ids = pa.array(np.arange(first, first + table.num_rows), pa.int64())
            numbered = table.set_column(table.schema.get_field_index("id"), table.schema.field("id"), ids)
            yield FinalRow(numbered.drop_columns([TILE, _SEAM, _SATURATED]), n_saturated)
            first += table.num_rows
            before, current = current, after

    def load(self, row: int) -> pa.Table:
        """Return the table that `write` wrote."""
        with open_table(self._path(row)) as file:
            return file.read().replace_schema_metadata(None)

    def marked(self, n_rows: int) -> tuple[int, ...]:
        """Return what `write` was told to mark, of all rows."""
        tiles: list[int] = []
        for row in range(n_rows):
            with open_table(self._path(row)) as file:
                tiles += json.loads((file.schema_arrow.metadata or {}).get(_MARKED, "[]"))
        return tuple(tiles)

    def _path(self, row: int) -> Path:
        return self.folder / f"row-{row:05d}.parquet"


def _stays(before: pa.Table | None, current: pa.Table, after: pa.Table | None) -> NDArray[np.bool_]:
    """Return which objects of `current` stay, with the rows of tiles above and below it at hand."""
    neighbours = [table for table in (before, current, after) if table is not None]
    near = [table.filter(table[_SEAM]) for table in neighbours]
    own = int(before is not None)
    start = sum(table.num_rows for table in near[:own])
    joint = pa.concat_tables(near)
    kept = drop_twins(
        shapely.from_wkb(joint["geometry"].to_numpy()), joint["score"].to_numpy(), joint[TILE].to_numpy()
    )
    stays = np.ones(current.num_rows, np.bool_)
    stays[np.flatnonzero(current[_SEAM].to_numpy())] = kept[start : start + near[own].num_rows]
    return stays
