"""How long do frames of a camera take, and what happens when they come too fast?

    python benchmarks/live.py nuclei-fluorescence tests/data/target/u2os_2abc40c118.png --plot live.png
    python benchmarks/live.py nuclei-fluorescence IMAGE --soak 10000 --soak-px 128

The image, mirrored to the size of the frame, plays the camera. First each frame size alone: one frame after
another, by turns with the bare engine on the same tiles. Then a camera with a clock at rising rates, from
half of what the engine can do to twice as much, and a flood of 100 frames a second. A soak pushes so many
frames and watches memory, threads and files. Figures hold for this machine and load.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from darcnn.runtime.intensity import Window
from darcnn.runtime.live import Calibration, LiveSegmenter
from darcnn.runtime.load import load
from darcnn.runtime.options import BACKENDS
from darcnn.runtime.readers.array import ArrayReader
from darcnn.runtime.segmenter import Segmenter

_BURN_IN = 2
_LOADS = (0.5, 0.8, 1.0, 1.5, 2.0)  # of what the engine can do
_BASE_PX = (
    512  # frames of this side are measured as often as asked, larger ones less, as they have more pixels
)
_MIN_FRAMES = 3
_FLOOD_PER_S = 100.0  # far more than the engine can do: does it keep the producer?
_FLOOD_PER_FRAME = 25  # frames of a flood for each that is asked for


_CAMERA = Window(0, 4095)  # of 12 bits, as the frames are


@dataclass(frozen=True, slots=True)
class Camera:
    """What is played, and to what."""

    model: str
    device: str
    backend: str
    image: NDArray[np.uint16]
    queue: int
    policy: str

    def frame(self, side: int) -> NDArray[np.uint16]:
        """Return a frame of `side` x `side` px: the image, mirrored as often as it takes."""
        pad = [(0, max(0, side - n)) for n in self.image.shape]
        return np.ascontiguousarray(np.pad(self.image, pad, mode="symmetric")[:side, :side])

    def load(self) -> Segmenter:
        """Return the model, ready to run."""
        return load(self.model, device=self.device, backend=self.backend)

    def open(self, frame: NDArray[np.uint16], **options: Any) -> LiveSegmenter:
        """Return a live segmenter calibrated on `frame`, pixels taken as they are."""
        segmenter, window = self.load(), _CAMERA
        if segmenter.manifest.input.intensity.needs_statistics:
            with ArrayReader(frame) as reader:
                window = segmenter.measure(reader, segmenter.plan(reader.info, pixels=True))
        size = segmenter.manifest.input.nominal_diameter_px
        return LiveSegmenter(segmenter, calibration=Calibration(window=window, diameter_px=size), **options)


@click.command()
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--size", "sizes", multiple=True, type=click.IntRange(1), default=(512, 1024, 2048), show_default=True
)
@click.option("--frames", type=click.IntRange(1), default=20, show_default=True, help="Of 512 px, each time.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--queue", type=click.IntRange(1), default=4, show_default=True)
@click.option("--policy", default="drop_oldest", show_default=True)
@click.option("--soak", type=click.IntRange(0), default=0, help="Push so many frames instead.")
@click.option("--soak-px", type=click.IntRange(1), default=128, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw latency and drops over the rate here.")
def main(
    model: str,
    image: Path,
    sizes: tuple[int, ...],
    frames: int,
    backend: str,
    device: str,
    queue: int,
    policy: str,
    soak: int,
    soak_px: int,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Time MODEL on frames made of IMAGE."""
    pixels = np.asarray(Image.open(image).convert("L")).astype(np.uint16) * 16
    camera = Camera(model, device, backend, pixels, queue, policy)
    record: dict[str, Any] = {
        "model": model,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if soak:
        record["soak"] = soaked = run_soak(camera, soak, soak_px)
        _say(soaked)
    else:
        record["alone"] = alone = []
        record["rates"] = rates = []
        for side in sizes:
            alone.append(run_alone(camera, side, _share(frames, side)))
            _say(alone[-1])
            for share in _LOADS:
                fps = share / (alone[-1]["p50_ms"] / 1e3)
                rates.append(run_rate(camera, side, fps, _share(frames, side)))
                _say(rates[-1])
        record["flood"] = [
            run_rate(replace(camera, policy=dropping), sizes[0], _FLOOD_PER_S, _FLOOD_PER_FRAME * frames)
            for dropping in ("drop_oldest", "drop_newest")
        ]
        for row in record["flood"]:
            _say(row)
        if plot is not None:
            draw(rates, alone, plot)
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _share(frames: int, side: int) -> int:
    return min(frames, max(_MIN_FRAMES, round(frames * _BASE_PX**2 / side**2)))


def run_alone(camera: Camera, side: int, n: int) -> dict[str, Any]:
    """Time single frames, by turns with the bare engine on the same tiles."""
    frame = camera.frame(side)
    live_ms: list[float] = []
    bare_ms: list[float] = []
    with camera.load() as bare, camera.open(frame) as live:
        assert live.calibration is not None
        first_ms = live.push(frame).result().times_ms.total
        with ArrayReader(frame) as reader:
            plan = bare.plan(reader.info, diameter_px=live.calibration.diameter_px)
            window = live.calibration.window
            assert window is not None
            sampler = bare.sampler(reader, plan, window)
            tiles = [sampler.read(tile) for tile in plan.tiles]
        for turn in range(_BURN_IN + n):
            start = time.perf_counter()
            _run_bare(bare, tiles)
            spent = 1e3 * (time.perf_counter() - start)
            result = live.push(frame).result()
            if turn >= _BURN_IN:
                bare_ms.append(spent)
                live_ms.append(result.times_ms.total)
        stages = live.stats().stages
    p50, p99 = (float(p) for p in np.percentile(live_ms, (50, 99)))
    return {
        "px": side,
        "frames": n,
        "tiles": len(tiles),
        "first_ms": first_ms,
        "p50_ms": p50,
        "p99_ms": p99,
        "p99_over_p50": p99 / p50,
        "bare_p50_ms": float(np.median(bare_ms)),
        "bare_p99_ms": float(np.percentile(bare_ms, 99)),
        "p50_over_bare": float(np.median(np.array(live_ms) / np.array(bare_ms))),
        **{f"{name}_p50_ms": times.p50_ms for name, times in stages.items() if name != "total"},
    }


def _run_bare(segmenter: Segmenter, tiles: list[NDArray[np.uint8]]) -> None:
    """Run both graphs on the tiles, and nothing else."""
    engine = segmenter.engine
    spec = engine.spec
    for start in range(0, len(tiles), spec.batch):
        group = tiles[start : start + spec.batch]
        batch = np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
        batch[: len(group)] = group
        found = engine.detect(batch)
        index, slot = np.nonzero(found.scores >= segmenter.min_score)
        engine.masks(found, found.boxes[index, slot], index)


def run_rate(camera: Camera, side: int, fps: float, n: int) -> dict[str, Any]:
    """Push `n` frames by the clock, `fps` a second."""
    frame = camera.frame(side)
    with camera.open(frame, queue=camera.queue, policy=camera.policy) as live:
        live.push(frame).result()
        start, memory = time.perf_counter(), []
        for number in range(n):
            time.sleep(max(0.0, start + number / fps - time.perf_counter()))
            live.push(frame)
            memory.append(resident_mb())
        live.drain()
        spent = time.perf_counter() - start
        stats = live.stats()
        live.end()
        total = [result.times_ms.total for result in live if result.status == "done"][1:]
    return {
        "px": side,
        "policy": camera.policy,
        "frames": n,
        "frames_per_s": fps,
        "done_per_s": (stats.done - 1) / spent,
        "p50_ms": float(np.percentile(total, 50)),
        "p99_ms": float(np.percentile(total, 99)),
        "push_p99_ms": stats.stages["push"].p99_ms,
        "dropped": stats.dropped,
        "max_waiting": stats.max_waiting,
        "memory_mb": memory[-1],
        "memory_grown_mb": memory[-1] - memory[0],
    }


def run_soak(camera: Camera, n: int, side: int) -> dict[str, Any]:
    """Push `n` frames as fast as they are taken; the first tenth is burn-in."""
    frame = camera.frame(side)
    seen: list[tuple[int, float, int, int | None]] = []
    with camera.open(frame, queue=camera.queue) as live:
        start = time.perf_counter()
        for number in range(n):
            live.push(frame)
            if number % max(1, n // 100) == 0 and number >= n // 10:
                gc.collect()
                seen.append((number, resident_mb(), threading.active_count(), n_files()))
                if len(seen) % 10 == 0:
                    click.echo(f"{number:>8} frames  {seen[-1][1]:.1f} MB", err=True)
        live.drain()
        seen.append((n, resident_mb(), threading.active_count(), n_files()))
        spent, stats = time.perf_counter() - start, live.stats()
    return {
        "frames": n,
        "px": side,
        "minutes": spent / 60,
        "done": stats.done,
        "p50_ms": stats.stages["total"].p50_ms,
        "memory_mb": [row[1] for row in seen],
        "memory_growth_percent": 100 * (seen[-1][1] / seen[0][1] - 1),
        "threads": [seen[0][2], seen[-1][2]],
        "files": [seen[0][3], seen[-1][3]],
    }


def resident_mb() -> float:
    """Return the memory of this process, MB; not a number where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return float("nan")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def n_files() -> int | None:
    """Return how many files this process has open, None where the system has no /proc."""
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def draw(rates: list[dict[str, Any]], alone: list[dict[str, Any]], path: Path) -> None:
    """Draw latency and throughput over the rate, a line for each frame size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, share = figure.subplots(1, 2)
    for row in alone:
        own = [rate for rate in rates if rate["px"] == row["px"]]
        x = [rate["frames_per_s"] * row["p50_ms"] / 1e3 for rate in own]
        (line,) = latency.plot(x, [rate["p50_ms"] for rate in own], "o-", label=f"{row['px']:.0f} px, p50")
        latency.plot(x, [rate["p99_ms"] for rate in own], "x:", color=line.get_color(), label="p99")
        done = [100 * min(1.0, rate["done_per_s"] / rate["frames_per_s"]) for rate in own]
        share.plot(x, done, "o-", label=f"{row['px']:.0f} px, alone {row['p50_ms']:.0f} ms")
    latency.set(
        yscale="log", ylabel="from push to result, ms", xlabel="frames come, of what the engine can do"
    )
    share.set(
        ylabel="frames done a second, % of the rate",
        xlabel="frames come, of what the engine can do",
        ylim=(0, 105),
    )
    for axes in (latency, share):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _say(row: dict[str, Any]) -> None:
    words = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name != "memory_mb"
    )
    click.echo("  ".join(words))


if __name__ == "__main__":
    from one_line import run

    run(main)
