"""Files that appear whole or not at all, and what the disk refuses, said in one line."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from darcnn.runtime.errors import OutputError

__all__ = ["disk_errors", "new_file", "write_csv"]


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn what the system or safetensors raise while the block writes into an OutputError at `where`."""
    try:
        yield
    except (OSError, SafetensorError) as err:
        raise OutputError(
            getattr(err, "strerror", None) or str(err),
            where=where,
            fix="make room, give permission or choose another --out",
        ) from err


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the name under which to write; the file is called `path` only if the block ends well.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that only their owner reads
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise


def write_csv(figures: Mapping[str, Mapping[str, float]], path: Path, *, of: str) -> None:
    """Write one line a name, headed `of` ("image"), with its figures; whole numbers as they are.

    Raises:
        OutputError: the file cannot be written.
    """
    names = list(next(iter(figures.values()), {}))
    with new_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([of, *names])
        for one, row in figures.items():
            values = (row[name] for name in names)
            writer.writerow([one, *(v if isinstance(v, int) else f"{v:.4f}" for v in values)])
