"""How do time, memory and duplicates compare with SAHI around the same network on the same slide?

    pip install --target /tmp/sahi --no-deps sahi opencv-python-headless fire termcolor
    PYTHONPATH=/tmp/sahi python benchmarks/against_sahi.py --side 4096 --out figures.json

SAHI is no part of darcnn; what else it needs comes with the extra `train`. It runs as it comes: slices of the
model's tile, overlap 0.2, the whole image once more, GREEDYNMM; all in memory, nothing written. darcnn runs
as it comes, all outputs written. Both take the pixels as they are and objects from the model's own score on.
Each run is a process of its own, by turns, so that its peak memory is its own. A duplicate is a pair of
objects whose outlines have an IoU above 0.5; "covered" are pairs of which the smaller lies for more than half
in the other. Where other work takes the cores, `cpu_s` says more than `wall_s`.

Both have the same engine, unless `--backend` gives darcnn another one, or `--pytorch` leaves SAHI the network
as its own models have theirs, in PyTorch.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from PIL import Image

import darcnn.runtime
from darcnn.runtime.bundle import Bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.engines.graphs import make_spec
from darcnn.runtime.engines.protocol import Detections, Engine
from darcnn.runtime.live.stats import TimedEngine
from darcnn.runtime.load import find_bundle
from darcnn.runtime.options import BACKENDS
from darcnn.runtime.outlines import outline_probabilities
from darcnn.runtime.pipeline import RunOptions
from darcnn.runtime.segmenter import Segmenter

_HERE = Path(__file__).parent
_EXAMPLE = _HERE.parent / "examples" / "CMU-1-Small-Region.svs"
_OVERLAP = 0.2  # SAHI's default
_DUPLICATE_IOU = 0.5
_COVERED = 0.5
_SIDES = ("darcnn", "sahi")


class CountedEngine(TimedEngine):
    """An engine that also knows how often it was asked for boxes."""

    calls = 0

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        self.calls += 1
        return super().detect(tiles)


class TorchEngine:
    """The network of a bundle in PyTorch, eagerly; masks are of the tiles that `detect` saw last."""

    def __init__(self, bundle: Bundle) -> None:
        from darcnn.export.graph import freeze_network
        from darcnn.export.pack import options_of
        from darcnn.export.parity import with_limits
        from darcnn.training.model.bundle_weights import load_bundle, preset_of
        from darcnn.training.model.network import Darcnn

        network = Darcnn.from_name(preset_of(bundle).name)
        load_bundle(network, bundle)
        self.network = with_limits(freeze_network(network), options_of(bundle.manifest))
        self.spec = make_spec(bundle, "PyTorch")

    def detect(self, tiles: NDArray[np.uint8]) -> Detections:
        import torch

        network, size = self.network, tiles.shape[1:3]
        with torch.inference_mode():
            c2 = network.trunk(torch.from_numpy(tiles).float().permute(0, 3, 1, 2))
            proposals, _, _ = network.proposer.propose(network.rpn_levels(network.shared_encoder(c2)), size)
            self._pyramid = network.target_encoder(c2)
            found = network.target_heads.detect(self._pyramid, proposals, size)
        boxes = np.zeros((len(tiles), self.spec.detections, 4), np.float32)
        scores = np.zeros(boxes.shape[:2], np.float32)
        for row, (some, sure) in enumerate(zip(*found, strict=True)):
            boxes[row, : len(some)], scores[row, : len(some)] = some.numpy(), sure.numpy()
        return Detections(boxes, scores, np.ones(len(tiles), bool), None)

    def masks(
        self, detections: Detections, boxes: NDArray[np.float32], tile_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            parts = [torch.from_numpy(boxes[tile_index == row]) for row in range(self.spec.batch)]
            return np.asarray(self.network.target_heads.mask_probabilities(self._pyramid, parts).numpy())

    def close(self) -> None:
        pass


@click.command()
@click.option("--slide", type=click.Path(path_type=Path, exists=True), help="A slide; else one is made.")
@click.option("--side", type=int, default=4096, show_default=True, help="Of the slide that is made, px.")
@click.option("--model", default="nuclei-he", show_default=True)
@click.option("--rounds", type=int, default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="Of darcnn.")
@click.option("--pytorch", is_flag=True, help="SAHI has the network in PyTorch.")
@click.option("--only", type=click.Choice(_SIDES), hidden=True)  # one measurement, in this process
def main(
    slide: Path | None,
    side: int,
    model: str,
    rounds: int,
    out: Path | None,
    backend: str,
    pytorch: bool,
    only: str | None,
) -> None:
    """Run both by turns and compare."""
    if only is not None:
        assert slide is not None
        assert out is not None
        out.write_text(json.dumps(_measure(only, slide, model, backend, pytorch)), encoding="utf-8")
        return
    folder = Path(tempfile.mkdtemp())
    try:
        if slide is None:
            slide = folder / f"synthetic-{side}.tif"
            command = [str(_HERE / "synthetic_slide.py"), str(_EXAMPLE), str(slide), f"--side={side}"]
            subprocess.run([sys.executable, *command], check=True)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in _SIDES}
        for _ in range(rounds):
            for name in _SIDES:
                place = folder / "figures.json"
                options = [f"--slide={slide}", f"--model={model}", f"--only={name}", f"--out={place}"]
                options += [f"--backend={backend if name == 'darcnn' else 'auto'}", *["--pytorch"] * pytorch]
                subprocess.run([sys.executable, __file__, *options], check=True)
                runs[name].append(json.loads(place.read_text(encoding="utf-8")))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    record = {
        "model": model,
        "slide": slide.name,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        **runs,
        "sahi_by_darcnn": {
            key: round(_least(runs["sahi"], key) / max(_least(runs["darcnn"], key), 1e-9), 2)
            for key in ("wall_s", "cpu_s", "engine_s", "peak_gb", "peak_beyond_model_gb")
        },
    }
    for key in runs["darcnn"][0]:
        cells = "".join(f"{' '.join(str(run[key]) for run in runs[name]):24}" for name in _SIDES)
        click.echo(f"{key:24}{cells}{record['sahi_by_darcnn'].get(key, '')}")
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _least(runs: list[dict[str, Any]], key: str) -> float:
    return float(min(run[key] for run in runs))


def _measure(name: str, slide: Path, model: str, backend: str, pytorch: bool) -> dict[str, Any]:
    bundle = find_bundle(model)
    opened: Engine
    if pytorch and name == "sahi":
        opened = TorchEngine(bundle)
    else:
        opened = open_engine(bundle, device="cpu" if backend == "auto" else "auto", backend=backend)
    with contextlib.closing(opened):
        engine = CountedEngine(opened)
        segmenter = Segmenter(engine, bundle.manifest)
        _run_once(segmenter)  # what a first call allocates belongs to the loaded model
        engine.reset()
        before, engine.calls = _peak_gb(), 0
        start, cpu = time.perf_counter(), time.process_time()
        outlines = _run_darcnn(segmenter, slide) if name == "darcnn" else _run_sahi(segmenter, slide)
        wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    duplicates, covered = count_pairs(outlines)
    return {
        "engine": opened.spec.name,
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "engine_s": round(sum(engine.seconds.values()), 1),
        "engine_calls": engine.calls,
        "peak_gb": round(_peak_gb(), 3),
        "peak_beyond_model_gb": round(_peak_gb() - before, 3),
        "objects": len(outlines),
        "duplicates": duplicates,
        "covered": covered,
        "load": round(os.getloadavg()[0], 1),
    }


def _run_once(segmenter: Segmenter) -> None:
    spec = segmenter.engine.spec
    found = segmenter.engine.detect(
        np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
    )
    segmenter.engine.masks(found, found.boxes[0, :1], np.zeros(1, np.int64))


def _run_darcnn(segmenter: Segmenter, slide: Path) -> NDArray[Any]:
    """Return the outlines (N,) of a run with all its outputs."""
    folder = Path(tempfile.mkdtemp())
    try:
        with darcnn.runtime.open_source(slide) as reader:
            summary = segmenter.run(reader, folder, options=RunOptions(pixels=True))
        table = pq.read_table(summary.folder / "objects.parquet", columns=["geometry"])
        return np.atleast_1d(shapely.from_wkb(table["geometry"].to_numpy()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_sahi(segmenter: Segmenter, slide: Path) -> NDArray[Any]:
    """Return the outlines (N,) of what SAHI finds."""
    from sahi.predict import get_sliced_prediction

    tile = segmenter.engine.spec.tile_px
    result = get_sliced_prediction(
        str(slide),
        make_detection_model(segmenter),
        slice_height=tile,
        slice_width=tile,
        overlap_height_ratio=_OVERLAP,
        overlap_width_ratio=_OVERLAP,
        verbose=0,
    )
    found = [
        shapely.union_all([shapely.make_valid(shapely.Polygon(np.reshape(ring, (-1, 2)))) for ring in rings])
        for rings in (one.mask.segmentation for one in result.object_prediction_list if one.mask is not None)
    ]
    return np.array(found, object)


def make_detection_model(segmenter: Segmenter) -> Any:
    """Return the engine of `segmenter` as a DetectionModel of SAHI.

    Outlines are handed over as they are, which spares SAHI to draw and trace masks of whole slices.
    """
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction

    class Model(DetectionModel):  # type: ignore[misc]  # SAHI is not installed where types are checked
        def load_model(self) -> None:
            self.model = segmenter.engine
            self.category_mapping = {"0": "object"}

        def perform_inference(self, image: NDArray[np.uint8]) -> None:
            spec = self.model.spec
            scale = max(1.0, max(image.shape[:2]) / spec.tile_px)  # the whole image is made small
            if scale > 1:
                size = [max(1, round(n / scale)) for n in image.shape[1::-1]]
                image = np.asarray(Image.fromarray(image).resize((size[0], size[1])))
            height, width = image.shape[:2]
            tiles = np.zeros((spec.batch, spec.tile_px, spec.tile_px, spec.channels), np.uint8)
            tiles[0, :height, :width] = image if spec.channels == 3 else image.mean(axis=2)[:, :, None]
            found = self.model.detect(tiles)
            slots = np.flatnonzero((found.scores[0] > 0) & (found.scores[0] >= self.confidence_threshold))
            boxes = found.boxes[0, slots]
            masks = np.zeros((0, spec.mask_px, spec.mask_px), np.float32)
            if len(slots):
                masks = self.model.masks(found, boxes, np.zeros(len(slots), np.int64))
            outlined = outline_probabilities(masks, boxes, (height, width))
            self._original_predictions = [
                (one.ring * scale, float(score))
                for one, score in zip(outlined, found.scores[0, slots], strict=True)
                if one is not None
            ]

        def _create_object_prediction_list_from_original_predictions(
            self, shift_amount_list: Any = None, full_shape_list: Any = None
        ) -> None:
            shift, shape = (
                one[0] if one and isinstance(one[0], (list, tuple)) else one
                for one in (shift_amount_list, full_shape_list)
            )
            self._object_prediction_list_per_image = [
                [
                    ObjectPrediction(
                        segmentation=[ring.ravel().tolist()],
                        category_id=0,
                        category_name="object",
                        score=score,
                        shift_amount=shift,
                        full_shape=shape,
                    )
                    for ring, score in self._original_predictions
                ]
            ]

    return Model(confidence_threshold=segmenter.manifest.limits.min_score, device="cpu")


def count_pairs(outlines: NDArray[Any]) -> tuple[int, int]:
    """Return how many pairs of outlines (N,) are duplicates, and of how many the smaller is covered.

    >>> square = shapely.box(0, 0, 10, 10)
    >>> count_pairs(np.array([square, shapely.box(1, 0, 11, 10), shapely.box(0, 0, 3, 3)]))
    (1, 2)
    """
    if not len(outlines):
        return 0, 0
    one, other = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    one, other = one[one < other], other[one < other]
    shared = shapely.area(shapely.intersection(outlines[one], outlines[other]))
    areas = shapely.area(outlines)
    iou = shared / np.maximum(areas[one] + areas[other] - shared, 1e-9)
    part = shared / np.maximum(np.minimum(areas[one], areas[other]), 1e-9)
    return int((iou > _DUPLICATE_IOU).sum()), int((part > _COVERED).sum())


def _peak_gb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak / 1e6


if __name__ == "__main__":
    from one_line import run

    run(main)
