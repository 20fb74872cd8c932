"""A page on a finished run: curves, scores, counts and pictures, in one file without links to others."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from darcnn.training.checkpoint import read_info
from darcnn.training.config import Recipe, recipe_to_table
from darcnn.training.history import read_history, sheets_of
from darcnn.training.trust import read_trust, round_folders
from darcnn.training.writing import new_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

_NOT_LOSSES = {"step", "total", "learning_rate", "regions"}
_SMOOTHING = 0.9  # of the drawn curves; the points themselves stay in history.csv

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:15px/1.5 sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}}
img{{max-width:100%}} table{{border-collapse:collapse}} td,th{{padding:.2em .8em;border-bottom:1px solid #ddd;
text-align:right}} td:first-child,th:first-child{{text-align:left}}
pre{{background:#f4f4f4;padding:1em;overflow:auto}}
</style><h1>{title}</h1>{body}</html>
"""


def write_report(out: Path, recipe: Recipe) -> Path:
    """Write report.html on the stages in `out` and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    folders = list(_stage_folders(out))
    parts = [_summary(folders)]
    for folder in folders:
        shown = list(_stage(folder))
        if shown:  # a stage that took no step has nothing to show
            parts.extend((f"<h2>{folder.name}</h2>", *shown))
    parts.append(f"<h2>Recipe</h2><pre>{html.escape(json.dumps(recipe_to_table(recipe), indent=1))}</pre>")
    path = out / "report.html"
    with new_file(path) as temporary:
        page = _PAGE.format(title=html.escape(recipe.name), body="\n".join(parts))
        temporary.write_text(page, encoding="utf-8")
    return path


def _stage_folders(out: Path) -> Iterator[Path]:
    """Yield the folders of stages that left a checkpoint, in the order in which they ran."""
    for folder in (out / "source", out / "adapt", *round_folders(out)):
        if (folder / "checkpoint.json").is_file():
            yield folder


def _summary(folders: Sequence[Path]) -> str:
    rows = []
    for folder in folders:
        info, history, labels = read_info(folder), read_history(folder), read_label_counts(folder)
        last = f"{history[-1]['total']:.3f}" if history else ""
        trust = read_trust(folder)
        regions = [row["regions"] for row in history if "regions" in row]
        rows.append(
            f"<tr><td>{folder.name}</td><td>{info.step}</td><td>{last}</td>"
            f"<td>{f'{sum(regions) / len(regions):.1f}' if regions else ''}</td>"
            f"<td>{labels.get('objects', '')}</td><td>{labels.get('images', '')}</td>"
            f"<td>{f'{trust.trust:.3f}' if trust else ''}</td></tr>"
        )
    return (
        "<table><tr><th>stage</th><th>steps</th><th>last loss</th><th>regions an image (L_target)</th>"
        f"<th>pseudo-labels</th><th>on images</th>"
        f"<th>trust without labels</th></tr>{''.join(rows)}</table>"
    )


def read_label_counts(folder: Path) -> dict[str, int]:
    """Return how many pseudo-labels the round in `folder` learned from, and on how many images."""
    path = folder / "pseudo_labels" / "complete.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {"objects": content["objects"], "images": len(list(path.parent.glob("*.png")))}


def _stage(folder: Path) -> Iterator[str]:
    history = read_history(folder)
    if history:
        yield _picture(_draw_curves(history), f"losses of {folder.name}")
    scores = folder / "pseudo_labels" / "complete.json"
    if scores.is_file():
        yield _picture(
            _draw_scores(json.loads(scores.read_text(encoding="utf-8"))["scores"]),
            "scores of the pseudo-labels",
        )
    for step, picture in sheets_of(folder)[-1:]:
        yield f"<p>What it finds on unlabelled images after {step} steps:</p>"
        yield _img(picture.read_bytes(), f"outlines found after {folder.name}")


def _draw_curves(history: Sequence[dict[str, float]]) -> Figure:
    from matplotlib.figure import Figure

    names = ["total", *sorted(set(history[0]) - _NOT_LOSSES)]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in names:
        steps = [row["step"] for row in history if name in row]
        values = _smooth([row[name] for row in history if name in row])
        (left if name == "total" else right).plot(steps, values, label=name, linewidth=1.2)
    for axes, title in ((left, "sum of losses"), (right, "weighted losses")):
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    right.set_yscale("symlog", linthresh=1e-3)
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return figure


def _draw_scores(counts: Sequence[int]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    width = 1.0 / len(counts)
    axes.bar([(i + 0.5) * width for i in range(len(counts))], counts, width=0.9 * width)
    axes.set(title="scores of the pseudo-labels", xlabel="score", ylabel="objects", xlim=(0, 1))
    return figure


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the exponential average of `values`, unbiased from the first on."""
    average = weight = 0.0
    smooth = []
    for value in values:
        average = _SMOOTHING * average + (1.0 - _SMOOTHING) * value
        weight = _SMOOTHING * weight + (1.0 - _SMOOTHING)
        smooth.append(average / weight)
    return smooth


def _picture(figure: Figure, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return _img(buffer.getvalue(), words)


def _img(png: bytes, words: str) -> str:
    """Return a picture inside the page; `words` are for those who cannot see it."""
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
