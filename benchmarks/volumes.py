"""How long does a run on a volume take beside the bare engine, and how much memory?

    python benchmarks/volumes.py particles-cryoet --folder ../shared/data/tomograms/val --shape 32,512,512

Makes a volume of that shape (z, y, x) from the volumes of FOLDER, mirrored side by side, on the disk; runs it
with all outputs; and after every eight planes times one, its tiles ready in memory, in the engine alone: what
makes the machine slower for a while slows down both. Prints a table and writes JSON. Memory is that of the
process beyond what it held once the model had seen a tile (Linux only).
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import mrcfile
import numpy as np

import darcnn.runtime
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.find import Block, FoundBlock, View, find_block, plan_view
from darcnn.runtime.volumes.open import open_volume
from darcnn.runtime.volumes.options import VolumeOptions
from darcnn.runtime.volumes.pipeline import run_volume

_POLL_SECONDS = 0.02


def make_volume(path: Path, sources: list[Path], shape: tuple[int, int, int]) -> None:
    """Write a volume of `shape` in the type of the `sources`, which lie mirrored side by side in it."""
    blocks = [mrcfile.read(source) for source in sources]
    with mrcfile.new_mmap(path, shape=shape, mrc_mode=0, overwrite=True) as file:
        file.voxel_size = 10.0
        for z in range(shape[0]):
            block = blocks[(z // len(blocks[0])) % len(blocks)]
            plane = block[z % len(block)]
            pair = np.block([[plane, plane[:, ::-1]], [plane[::-1], plane[::-1, ::-1]]])
            times = (-(-shape[1] // pair.shape[0]), -(-shape[2] // pair.shape[1]))
            file.data[z] = np.tile(pair, times)[: shape[1], : shape[2]]


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Measure how far the resident memory rises in the block: a list that ends up with MiB."""
    start, peak, ends = _resident(), [0.0], threading.Event()

    def watch() -> None:
        while not ends.wait(_POLL_SECONDS):
            peak[0] = max(peak[0], _resident() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ends.set()
        thread.join()


def _resident() -> float:
    """Return MiB in memory that belong to the process alone."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE") / 2**20


class TimedBlocks:
    """Finds blocks as a run does (`BlockRunner`), and times one plane of each in the bare engine."""

    def __init__(self) -> None:
        self.found: list[float] = []  # seconds a plane, of each block
        self.bare: list[float] = []  # the same of the engine alone
        self.n_planes: list[int] = []
        self.aside = 0.0  # seconds that timing the bare engine took

    def __call__(
        self, segmenter: Segmenter, blocks: Sequence[Block], advance: Callable[[int, int], None]
    ) -> Iterator[FoundBlock]:
        """Yield each of `blocks` once, found."""
        for block in blocks:
            start = time.perf_counter()
            found, n = find_block(segmenter, block, advance), block.stop - block.start
            end = time.perf_counter()
            self.bare.append(bare_seconds(segmenter, block.view, block.start + n // 2))
            self.found.append((end - start) / n)
            self.n_planes.append(n)
            self.aside += time.perf_counter() - end
            yield found


def bare_seconds(segmenter: Segmenter, view: View, index: int) -> float:
    """Return seconds of the engine, its masks and outlines, on the tiles of a plane that lie in memory."""
    batch = segmenter.engine.spec.batch
    with ArrayReader(view.stack.plane(index)) as reader:
        sampler = segmenter.sampler(reader, view.plan, view.window)
        pixels = [sampler.read(tile) for tile in view.plan.tiles]
        start = time.perf_counter()
        for at in range(0, len(pixels), batch):
            tiles = view.plan.tiles[at : at + batch]
            segmenter.segment_batch(view.plan, view.stack.shape, tiles, pixels[at : at + batch])
        return time.perf_counter() - start


@click.command()
@click.argument("model")
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--shape", default="32,512,512", show_default=True, help="Of the volume: z,y,x.")
@click.option("--pixels", is_flag=True, help="Take the voxels as they are: faster, not as trained.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(model: str, folder: Path, shape: str, pixels: bool, out: Path | None) -> None:
    """Time a run of MODEL on a volume made of those in FOLDER."""
    z, y, x = (int(n) for n in shape.split(","))
    with TemporaryDirectory() as name, darcnn.runtime.load(model) as segmenter:
        path = Path(name) / "volume.mrc"
        make_volume(path, sorted((folder / "volumes").glob("*.mrc")), (z, y, x))
        with open_volume(path, Path(name)) as volume:
            view = plan_view(segmenter, volume, "z", pixels=pixels)
            bare_seconds(segmenter, view, z // 2)  # the model has seen tiles
        blocks = TimedBlocks()
        with peak_memory() as peak:
            options = VolumeOptions(axis="z", pixels=pixels)
            summary = run_volume(segmenter, path, Path(name), options=options, find_blocks=blocks)
        times = json.loads((summary.folder / "run.json").read_text())["seconds"]
        times["find"] -= blocks.aside
        bare = float(np.dot(blocks.bare, blocks.n_planes))
        record = {
            "model": model,
            "shape": [z, y, x],
            "network_megapixels_a_plane": view.plan.width * view.plan.height / 1e6,
            "engine": segmenter.engine.spec.name,
            "machine": platform.processor() or platform.machine(),
            "date": time.strftime("%Y-%m-%d"),
            "objects": summary.n_objects,
            "bare_seconds": bare,
            "find_seconds": times["find"],
            "find_over_bare": times["find"] / bare,
            "quartiles_of_blocks": np.percentile(np.divide(blocks.found, blocks.bare), [25, 50, 75]).tolist(),
            "other_seconds": sum(seconds for stage, seconds in times.items() if stage != "find"),
            "other_over_find": sum(v for stage, v in times.items() if stage != "find") / times["find"],
            "peak_mib": peak[0],
        }
    for key, value in record.items():
        click.echo(f"{key:<28}{value}")
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    from one_line import run

    run(main)
