"""How fast does a model segment a slide, and where does the time go?

    python benchmarks/throughput.py nuclei-he examples/CMU-1-Small-Region.svs --repeats 3

Runs the tiles of a slide through reading, `detect` and the rest, after a burn-in of two tiles, and
prints the spread over the repeats. The figures hold for this machine and load only.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import click
import numpy as np

import darcnn.runtime


@click.command()
@click.argument("model")
@click.argument("slide", type=click.Path(path_type=Path, exists=True))
@click.option("--device", default="auto", show_default=True)
@click.option("--tiles", type=int, default=40, show_default=True, help="Tiles from the middle of the slide.")
@click.option("--repeats", type=int, default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(model: str, slide: Path, device: str, tiles: int, repeats: int, out: Path | None) -> None:
    """Time MODEL on SLIDE."""
    with darcnn.runtime.load(model, device=device) as segmenter, darcnn.runtime.open_source(slide) as reader:
        plan = segmenter.plan(reader.info)
        window = segmenter.measure(reader, plan)
        first = max(0, (len(plan.tiles) - tiles) // 2)
        chosen = plan.tiles[first : first + tiles]
        sampler = segmenter.sampler(reader, plan, window)
        list(segmenter.stream(reader, plan, tiles=chosen[:2], window=window))  # burn-in
        read_s, segment_s, objects = [], [], 0
        shape = (reader.info.height_px0, reader.info.width_px0)
        batch = segmenter.engine.spec.batch
        for _ in range(repeats):
            start = time.perf_counter()
            pixels = [sampler.read(tile) for tile in chosen]
            middle = time.perf_counter()
            found = [
                instances
                for at in range(0, len(chosen), batch)
                for instances in segmenter.segment_batch(
                    plan, shape, chosen[at : at + batch], pixels[at : at + batch]
                )
            ]
            read_s.append(middle - start)
            segment_s.append(time.perf_counter() - middle)
            objects = sum(len(instances) for instances in found)
        megapixels = sum(tile.core.width * tile.core.height for tile in chosen) / 1e6
        record = {
            "model": model,
            "engine": segmenter.engine.spec.name,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "date": time.strftime("%Y-%m-%d"),
            "tiles": len(chosen),
            "objects": objects,
            "network_megapixels": megapixels,
            "read_seconds": _spread(read_s),
            "segment_seconds": _spread(segment_s),
            "megapixels_per_second": megapixels / float(np.median(np.add(read_s, segment_s))),
        }
    for key, value in record.items():
        click.echo(f"{key:<24}{value}")
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _spread(seconds: list[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(seconds), "median": float(np.median(seconds)), "max": max(seconds)}


if __name__ == "__main__":
    main()
