"""What a stage leaves behind while it trains: scalars for TensorBoard, the same as CSV, contact sheets."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from darcnn.training.model.network import Darcnn
from darcnn.training.parallel import is_first
from darcnn.training.writing import disk_errors, new_file

__all__ = ["HISTORY_FILE", "History", "Sheet", "read_history", "sheets_of"]

HISTORY_FILE = "history.csv"
_SHEET_FOLDER = "sheets"
_FLUSH_EVERY = 20

Sheet = Callable[[Darcnn], Image.Image]


class History:
    """Writes into the folder of a stage; only the first of several processes does.

    A resumed stage goes on after step `first` - 1: what an earlier try noted of later steps is dropped.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, stage: str, first: int) -> None:
        self._folder, self._stage = folder, stage
        self._rows: list[dict[str, float]] = []
        if not is_first():
            return
        with disk_errors(folder):
            _forget(folder, first)
            self._scalars = SummaryWriter(str(folder / "scalars"), purge_step=first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values of one step."""
        if not is_first():
            return
        with disk_errors(self._folder):
            for name, value in values.items():
                self._scalars.add_scalar(f"{self._stage}/{name}", value, step)
        self._rows.append({"step": step, **values})
        if len(self._rows) >= _FLUSH_EVERY:
            self.flush()

    def show(self, step: int, sheet: Sheet, network: Darcnn) -> None:
        """Keep the picture that `sheet` makes of the network after `step` steps."""
        if not is_first():
            return
        was_training = network.training
        picture = sheet(network.eval())
        network.train(was_training)
        with disk_errors(self._folder):
            self._scalars.add_image(f"{self._stage}/findings", np.asarray(picture), step, dataformats="HWC")
        with new_file(self._folder / _SHEET_FOLDER / f"step_{step:06d}.png") as temporary:
            picture.save(temporary, format="PNG")

    def flush(self) -> None:
        """Hand to the system what was noted, so that it is there whatever becomes of this process."""
        if not is_first():
            return
        path = self._folder / HISTORY_FILE
        with disk_errors(self._folder):
            self._scalars.flush()
            if not self._rows:
                return
            is_new = not path.exists()
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(self._rows[0]), extrasaction="ignore")
                if is_new:
                    writer.writeheader()
                writer.writerows(self._rows)
        self._rows = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if is_first():
            self.flush()
            self._scalars.close()


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return what the stage in `folder` noted, one mapping a step; empty if it noted nothing."""
    path = folder / HISTORY_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]


def sheets_of(folder: Path) -> list[tuple[int, Path]]:
    """Return the pictures of the stage in `folder`, each with the steps that the network had learned."""
    return [(int(path.stem.split("_")[1]), path) for path in sorted((folder / _SHEET_FOLDER).glob("*.png"))]


def _forget(folder: Path, first: int) -> None:
    """Drop rows and pictures of an earlier try that come after step `first` - 1."""
    for step, picture in sheets_of(folder):
        if step > first:
            picture.unlink()
    path = folder / HISTORY_FILE
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = file.readlines() or [""]
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) < first]
    if not kept:
        path.unlink()
        return
    with new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        file.writelines([header, *kept])
