"""Many slides: one failure stops no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from darcnn.runtime.errors import (
    EXIT_PARTIAL,
    EXIT_UNUSABLE,
    BundleError,
    DarcnnError,
    DeviceError,
    UsageError,
    without_secrets,
)
from darcnn.runtime.pipeline import RunOptions, RunSummary, run_slide
from darcnn.runtime.progress import Listener
from darcnn.runtime.readers.base import suffix_of
from darcnn.runtime.readers.open import PICTURES, open_source
from darcnn.runtime.readers.picture import read_size
from darcnn.runtime.readers.protocol import Location
from darcnn.runtime.rows import RowRunner, find_rows_here
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.sinks.atomic import output_error
from darcnn.runtime.slide_list import place_results
from darcnn.runtime.summary import SlideOutcome, write_summary
from darcnn.runtime.volumes.find import BlockRunner, find_blocks_here
from darcnn.runtime.volumes.open import is_series, is_volume
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume
from darcnn.runtime.volumes.volume import NM_PER_UM

__all__ = ["HERE", "BatchOutcome", "Finders", "SlideRunner", "run_batch", "run_picture"]

_SMALL_PX0 = 4096 * 4096  # pixels of level 0: the rows of a picture of fewer are not worth spreading
_INSTEAD = {
    "--series": "leave it out",
    "--project": "leave it out",
    "--roi": "leave it out, or take one plane with --z (one time point of a series with --t)",
    "--mpp": "pass --voxel-size, with its unit: 0.5um or 1,0.5,0.5um (z y x)",
    "--axis": "leave it out",
    "--slab": "leave it out",
    "--voxel-size": "pass --mpp",
}

# Slides, each with the folder below the one for all that its own lies in; and what came of them, as they are
# finished: number in the sequence, and its summary or its error.
SlideRunner = Callable[
    [Segmenter, Sequence[tuple[Location, Path]], Path, RunOptions],
    Iterable[tuple[int, RunSummary | DarcnnError]],
]


@dataclass(frozen=True, slots=True)
class Finders:
    """Who finds the objects of slides and of volumes: this process, or others.

    `run_pictures` runs small slides, each as a whole where it is run; None: they are run as the others are.
    """

    find_rows: RowRunner = find_rows_here
    find_blocks: BlockRunner = find_blocks_here
    run_pictures: SlideRunner | None = None


HERE = Finders()


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """How many slides came out well, and how many did not."""

    n_done: int
    n_failed: int
    n_damaged: int = 0  # of those done: some of their tiles could not be read

    @property
    def exit_code(self) -> int:
        """0 for all, 1 for some or where tiles are damaged, 2 for none."""
        if not self.n_failed and not self.n_damaged:
            return 0
        return EXIT_PARTIAL if self.n_done else EXIT_UNUSABLE


def run_batch(
    segmenter: Segmenter,
    slides: Sequence[Location],
    out_dir: Path,
    *,
    options: RunOptions,
    volume_options: VolumeOptions | None = None,
    listener: Listener,
    finders: Finders = HERE,
) -> BatchOutcome:
    """Run all `slides`; those that fail are told to `listener` and the rest goes on.

    A file of several planes is run as a volume, unless `options` choose one of them. Where others find, small
    pictures come first, several at once. `out_dir`/summary.csv has a line for each slide in the order of
    `slides`, also when the batch is interrupted.

    Raises:
        UsageError: two slides would be written to the same folder.
        BundleError, DeviceError: no further slide would fare better.
        KeyboardInterrupt: at Ctrl-C; finished slides stay, the current one its finished rows of tiles.
    """
    places = list(zip(slides, place_results(slides), strict=True))
    outcomes: dict[int, SlideOutcome] = {}
    try:
        for index, result in _run_pictures(
            segmenter, places, out_dir, options, volume_options, listener, finders.run_pictures
        ):
            outcomes[index] = _conclude(*places[index], result, listener)
        for index, (path, below) in enumerate(places):
            if index not in outcomes:
                listener.begin(path, len(outcomes) + 1, len(slides))
                result = _run_one(
                    segmenter, path, out_dir / below, options, volume_options, listener, finders
                )
                outcomes[index] = _conclude(path, below, result, listener)
    finally:
        write_summary(out_dir, [outcomes[index] for index in sorted(outcomes)])
    done = [outcome.summary for outcome in outcomes.values() if outcome.summary is not None]
    n_damaged = sum(summary.n_unreadable > 0 for summary in done)
    return BatchOutcome(len(done), len(slides) - len(done), n_damaged)


def run_picture(
    segmenter: Segmenter, path: Location, out_dir: Path, options: RunOptions, **how: Any
) -> RunSummary:
    """Open a slide and run it; `how` is handed to `run_slide`.

    Raises:
        DarcnnError: it cannot be read, or its results cannot be written.
    """
    try:
        with open_source(path, z=options.z, t=options.t) as reader:
            return run_slide(segmenter, reader, out_dir, options=options, **how)
    except OSError as err:  # what no reader and no sink foresaw
        raise output_error(err, Path(err.filename or without_secrets(path))) from err


def _run_pictures(
    segmenter: Segmenter,
    places: Sequence[tuple[Location, Path]],
    out_dir: Path,
    options: RunOptions,
    volume_options: VolumeOptions | None,
    listener: Listener,
    run: SlideRunner | None,
) -> Iterator[tuple[int, RunSummary | DarcnnError]]:
    """Yield the index of small pictures and what came of them as they are finished, if there are several."""
    if run is None or _find_foreign(options, volume_options, holds_volume=False) is not None:
        return
    small = [n for n, (path, _) in enumerate(places) if _is_small(path, options)]
    if len(small) < 2:
        return
    pictures = [places[index] for index in small]
    listener.tell(f"{len(pictures)} small pictures, several at once")
    for n_done, (number, result) in enumerate(run(segmenter, pictures, out_dir, options), start=1):
        listener.begin(pictures[number][0], n_done, len(places))
        yield small[number], result


def _is_small(path: Location, options: RunOptions) -> bool:
    """Tell whether a file is a picture of a few tiles; what cannot be opened is none: running it says why."""
    try:
        is_picture = isinstance(path, Path) and suffix_of(path) in PICTURES
        if isinstance(path, Path) and is_picture and (size := read_size(path)) is not None:  # not decoded
            return size[0] * size[1] <= _SMALL_PX0
        if options.z is None and is_volume(path, t=options.t):
            return False
        with open_source(path, z=options.z, t=options.t) as reader:
            return reader.info.width_px0 * reader.info.height_px0 <= _SMALL_PX0
    except (DarcnnError, OSError):
        return False


def _run_one(
    segmenter: Segmenter,
    path: Location,
    out_dir: Path,
    options: RunOptions,
    volume_options: VolumeOptions | None,
    listener: Listener,
    finders: Finders,
) -> RunSummary | DarcnnError:
    tell = listener.advance
    try:
        holds_volume = options.z is None and is_volume(path, t=options.t)
        if holds_volume and options.mpp is not None and _is_series(path, options, volume_options):
            side_nm = NM_PER_UM * options.mpp
            volume_options = replace(volume_options or VolumeOptions(), voxel_nm=(side_nm, side_nm, side_nm))
            options = replace(options, mpp=None)
        foreign = _find_foreign(options, volume_options, holds_volume=holds_volume)
        if foreign is not None:
            kind = "volume" if holds_volume else "picture"
            raise UsageError(f"means nothing to {path}, a {kind}", where=foreign, fix=_INSTEAD[foreign])
        if holds_volume:
            return run_volume(
                segmenter,
                path,
                out_dir,
                options=volume_options,
                progress=tell,
                find_blocks=finders.find_blocks,
            )
        return run_picture(segmenter, path, out_dir, options, progress=tell, find_rows=finders.find_rows)
    except (BundleError, DeviceError):
        raise
    except DarcnnError as err:
        return err
    except OSError as err:  # what no reader and no sink foresaw
        return output_error(err, Path(err.filename or without_secrets(path)))


def _is_series(path: Location, options: RunOptions, volume_options: VolumeOptions | None) -> bool:
    is_told = volume_options is not None and (volume_options.series or volume_options.project)
    return is_told or is_series(path, t=options.t)


def _conclude(
    path: Location, below: Path, result: RunSummary | DarcnnError, listener: Listener
) -> SlideOutcome:
    """Tell what came of a slide, and return it."""
    if isinstance(result, RunSummary):
        listener.finish(result)
        return SlideOutcome(path, result, below=below)
    listener.fail(str(result))
    return SlideOutcome(path, error=str(result), below=below)


def _find_foreign(
    options: RunOptions, volume_options: VolumeOptions | None, *, holds_volume: bool
) -> str | None:
    """Return an option that was given and means nothing to this kind of file: no result would show it."""
    given: dict[str, object]
    if holds_volume:
        given = {"--roi": options.roi, "--mpp": options.mpp}
    elif volume_options is None:
        given = {}
    else:
        axis = None if volume_options.axis == "auto" else volume_options.axis
        given = {
            "--axis": axis,
            "--slab": volume_options.n_joined,
            "--voxel-size": volume_options.voxel_nm,
            "--series": volume_options.series or None,
            "--project": volume_options.project or None,
        }
    return next((option for option, value in given.items() if value is not None), None)
