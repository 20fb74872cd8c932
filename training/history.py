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

from darcnn.runtime.errors import OutputError
from darcnn.training.model.network import Darcnn
from darcnn.training.parallel import is_first

__all__ = ["HISTORY_FILE", "SHEET_FOLDER", "History", "Sheet", "read_history"]

HISTORY_FILE = "history.csv"
SHEET_FOLDER = "sheets"
_FLUSH_EVERY = 20

Sheet = Callable[[Darcnn], Image.Image]


class History:
    """Writes into the folder of a stage; only the first of several processes does.

    A resumed stage goes on after step `first` - 1: what an earlier try noted of later steps is dropped.
    """

    def __init__(self, folder: Path, stage: str, first: int) -> None:
        self._folder, self._stage = folder, stage
        self._rows: list[dict[str, float]] = []
        if not is_first():
            return
        path = folder / HISTORY_FILE
        try:
            kept = [row for row in read_history(folder) if row["step"] < first]
            path.unlink(missing_ok=True)
            self._rows = kept
            self._flush()
        except OSError as err:
            raise OutputError(
                err.strerror or str(err), where=path, fix="make room or give permission"
            ) from err
        self._scalars = SummaryWriter(str(folder / "scalars"), purge_step=first)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Note the values of one step."""
        if not is_first():
            return
        for name, value in values.items():
            self._scalars.add_scalar(f"{self._stage}/{name}", value, step)
        self._rows.append({"step": step, **values})
        if len(self._rows) >= _FLUSH_EVERY:
            self._flush()

    def show(self, step: int, sheet: Sheet, network: Darcnn) -> None:
        """Keep the picture that `sheet` makes of the network after `step` steps."""
        if not is_first():
            return
        was_training = network.training
        picture = sheet(network.eval())
        network.train(was_training)
        self._scalars.add_image(f"{self._stage}/findings", np.asarray(picture), step, dataformats="HWC")
        path = self._folder / SHEET_FOLDER / f"step_{step:06d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        except OSError as err:
            raise OutputError(
                err.strerror or str(err), where=path, fix="make room or give permission"
            ) from err

    def _flush(self) -> None:
        if not self._rows:
            return
        path = self._folder / HISTORY_FILE
        is_new = not path.exists()
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fieldnames=list(self._rows[0]), extrasaction="ignore")
                if is_new:
                    writer.writeheader()
                writer.writerows(self._rows)
        except OSError as err:
            raise OutputError(
                err.strerror or str(err), where=path, fix="make room or give permission"
            ) from err
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
            self._flush()
            self._scalars.close()


def read_history(folder: Path) -> list[dict[str, float]]:
    """Return what the stage in `folder` noted, one mapping a step; empty if it noted nothing."""
    path = folder / HISTORY_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return [{name: float(value) for name, value in row.items() if value} for row in rows]
