"""Do the figures that need no labels rank models and scales as AJI does?

    python benchmarks/unlabelled.py MODEL... --folder DIR --diameter 19 --every 4

Every n-th image of a labelled folder is segmented by each MODEL (a checkpoint, bundle or name) at several
scales. Spearman's correlation of trust (`darcnn.training.unlabelled`) with AJI: over the means of all
models and scales, and within each image over the scales. The labels only tell whether the ranking was right.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import click
import numpy as np
from scipy.stats import spearmanr

from darcnn.runtime.metrics import score_labels
from darcnn.runtime.readers import open_source
from darcnn.training.evaluate import labelled_images, read_label_image
from darcnn.training.open_model import open_model
from darcnn.training.unlabelled import judge_image

_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0)  # on the diameter


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--diameter", type=float, help="Typical object, pixels of the images; else that of the labels.")
@click.option("--every", type=int, default=1, show_default=True, help="Take every n-th image.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(models: tuple[str, ...], folder: Path, diameter: float | None, every: int, out: Path | None) -> None:
    """Rank MODELS and scales with and without the labels of FOLDER."""
    pairs = labelled_images(folder)[::every]
    figures = np.zeros((len(models), len(pairs), len(_FACTORS), 4))  # AJI, trust, agreement, separation
    for m, model in enumerate(models):
        with open_model(model) as segmenter:
            for i, (image, label) in enumerate(pairs):
                truth = read_label_image(label)
                base = diameter or _typical_diameter(truth)
                for f, factor in enumerate(_FACTORS):
                    with open_source(image) as reader:
                        found = segmenter(reader, diameter_px=base * factor)
                        trust = judge_image(segmenter, reader, diameter_px=base * factor)
                    aji = score_labels(truth, found.labels()).aji
                    figures[m, i, f] = aji, trust.trust, trust.agreement, trust.separation
        for f, factor in enumerate(_FACTORS):
            aji, trust_mean, agreement, separation = figures[m, :, f].mean(axis=0)
            click.echo(
                f"{model}  diameter x {factor}: AJI {aji:.3f}  trust {trust_mean:.3f} "
                f"(agreement {agreement:.3f}, separation {separation:.3f})"
            )
    means = figures.mean(axis=1).reshape(-1, 4)
    record: dict[str, object] = {
        "models": models,
        "images": len(pairs),
        "factors": _FACTORS,
        "means": figures.mean(axis=1).tolist(),
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for column, name in enumerate(("trust", "agreement", "separation"), start=1):
        overall = spearmanr(means[:, 0], means[:, column]).statistic
        within = [
            spearmanr(figures[m, i, :, 0], figures[m, i, :, column]).statistic
            for m in range(len(models))
            for i in range(len(pairs))
        ]
        record[name] = {"models_and_scales": overall, "scales_within_image": float(np.nanmean(within))}
        click.echo(
            f"{name:10}  Spearman over models and scales {overall:.3f}, "
            f"over the scales of an image {np.nanmean(within):.3f}"
        )
    chosen = np.take_along_axis(figures[..., 0], figures[..., 1].argmax(axis=2)[..., None], 2).mean()
    own, best = figures[:, :, _FACTORS.index(1.0), 0].mean(), figures[..., 0].max(axis=2).mean()
    click.echo(
        f"AJI at the scale that trust chooses {chosen:.3f}, at the labels' own {own:.3f}, best {best:.3f}"
    )
    if out is not None:
        out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _typical_diameter(truth: np.ndarray) -> float:
    areas = np.bincount(truth.ravel())[1:]
    return float(2.0 * np.sqrt(np.median(areas[areas > 0]) / np.pi))


if __name__ == "__main__":
    from one_line import run

    run(main)
