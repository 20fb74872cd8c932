"""The arms of the paper's Tables 3 and 4, each trained and scored; they share what they have in common."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from darcnn.runtime.errors import OutputError, UsageError
from darcnn.training import parallel
from darcnn.training.checkpoint import load_network
from darcnn.training.config import Ablation, Recipe
from darcnn.training.engine import make_segmenter
from darcnn.training.evaluate import evaluate_folder, labelled_images
from darcnn.training.run import Run
from darcnn.training.stages import check_batches, run_adapt, run_refine, run_source
from darcnn.training.writing import new_file

__all__ = ["ARMS", "Arm", "run_ablation"]

_FIGURES = ("aji", "pixel_f1", "object_f1", "max_iou")
_SEEDED = ("source", "stage_1", "stage_2")  # arms that are run with every seed

Rows = Mapping[str, Sequence[Mapping[str, float]]]  # by arm: the figures of each seed


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of the table: what is switched off, and the paper's AJI, pixel F1 and object F1."""

    name: str
    title: str
    stage: str  # whose checkpoint is scored
    paper: Mapping[str, tuple[float, float, float]]  # by target: DARCNN, Tables 3 and 4

    def recipe(self, full: Recipe) -> Recipe:
        """Return the full recipe with this arm's switches."""
        changed = _SWITCHES.get(self.name)
        return full if changed is None else changed(full)


def _only(alpha: float = 0.0, gamma: float = 0.0) -> Callable[[Recipe], Recipe]:
    """Return a switch that keeps a share of the weights of DARCNN, equation (1), none of beta."""

    def change(recipe: Recipe) -> Recipe:
        stage = recipe.adapt_stage
        kept = replace(stage, alpha=alpha * stage.alpha, beta=0.0, gamma=gamma * stage.gamma)
        return replace(recipe, adapt_stage=kept)

    return change


def _synthesized(recipe: Recipe) -> Recipe:
    source = recipe.source
    return recipe if source is None else replace(recipe, source=replace(source, synthetic_fraction=0.5))


def _plain(recipe: Recipe) -> Recipe:
    return replace(recipe, refine_stage=replace(recipe.refine_stage, augment=False))


_SWITCHES = {
    "longer": _only(),
    "synthesized": _synthesized,
    "similarity": _only(alpha=1.0),
    "consistency": _only(gamma=1.0),
    "plain_labels": _plain,
}

ARMS = (
    Arm(
        "source",
        "source only",
        "source",
        {"bbbc": (0.0315, 0.3144, 0.0818), "tnbc": (0.0060, 0.2769, 0.0181)},
    ),
    Arm("synthesized", "source with synthesized images", "source", {"tnbc": (0.3332, 0.5782, 0.6061)}),
    Arm("longer", "source only, trained on for as long as stage 1", "adapt", {}),
    Arm(
        "similarity",
        "domain similarity only",
        "adapt",
        {"bbbc": (0.1414, 0.4905, 0.4295), "tnbc": (0.3687, 0.6023, 0.6099)},
    ),
    Arm(
        "consistency",
        "background consistency only",
        "adapt",
        {"bbbc": (0.3250, 0.7128, 0.5720), "tnbc": (0.3808, 0.6120, 0.5470)},
    ),
    Arm(
        "stage_1",
        "full stage 1",
        "adapt",
        {"bbbc": (0.3371, 0.6409, 0.5904), "tnbc": (0.4071, 0.6353, 0.5986)},
    ),
    Arm(
        "plain_labels",
        "pseudo-labels without augmentation",
        "refine",
        {"bbbc": (0.4349, 0.6914, 0.7151), "tnbc": (0.4463, 0.6781, 0.6339)},
    ),
    Arm(
        "stage_2",
        "full stage 2",
        "refine",
        {"bbbc": (0.4725, 0.6586, 0.6733), "tnbc": (0.4906, 0.6998, 0.6396)},
    ),
)


def run_ablation(run: Run) -> None:
    """Train and score every arm of DARCNN (CVPR 2021), Tables 3 and 4, and write the table into `run.out`.

    Arms share checkpoints: all adaptations start from the one source stage, both refinements from the
    one full stage 1. An arm whose figures are there is not run again. The arm with synthesized images is
    left out where the target is not in colour. Source only, full stage 1 and full stage 2 are run with the
    further seeds of the recipe too; their figures are then means, with the standard deviation beside.

    Raises:
        UsageError: the recipe has no [ablation].
        InputError: its images or their labels are missing.
        OutputError: `run.out` holds an ablation and the run does not resume, or cannot be written.
    """
    options = run.recipe.ablation
    if options is None:
        raise UsageError(
            "the recipe has no [ablation]", where=run.recipe.name, fix='add [ablation] with folder = "..."'
        )
    folder = run.data / options.folder
    labelled_images(folder)  # raises what is wrong with them now rather than after the training
    check_batches(run.recipe)
    if not run.resume and any(run.out.glob("*/*/checkpoint.json")):
        raise OutputError("holds checkpoints already", where=run.out, fix="pass --resume or another --out")
    arms = [arm for arm in ARMS if arm.name != "synthesized" or run.recipe.target.channels == 3]
    rows: dict[str, list[Mapping[str, float]]] = {}
    for seed in dict.fromkeys((run.recipe.seed, *options.seeds)):
        is_first_seed = seed == run.recipe.seed
        own = run if is_first_seed else _with_seed(run, seed)
        for arm in arms:
            if is_first_seed or arm.name in _SEEDED:
                rows.setdefault(arm.name, []).append(_figures_of(arm, own, folder, options))
                if parallel.is_first():
                    _write_tables(run.out, [a for a in arms if a.name in rows], rows, options.paper)


def _with_seed(run: Run, seed: int) -> Run:
    return replace(run, recipe=replace(run.recipe, seed=seed), out=run.out / f"seed-{seed}")


def _figures_of(arm: Arm, run: Run, folder: Path, options: Ablation) -> dict[str, float]:
    """Return the mean figures of an arm, from its file if it is done."""
    path = run.out / arm.name / "figures.json"
    # what else is to be run does not change this arm
    scored = replace(options, seeds=(), paper="none")
    key = repr(asdict(replace(arm.recipe(run.recipe), data="", data_licence="", ablation=scored)))
    if run.resume and path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["recipe"] == key:
            figures: dict[str, float] = stored["figures"]
            return figures
    checkpoint = _train(arm, run)
    network, info = load_network(checkpoint)
    recipe = info.recipe
    segmenter = make_segmenter(
        network.to(run.device),
        recipe.target,
        min_score=recipe.export.min_score,
        tile_px=recipe.export.tile_px,
        source_branch=info.is_source_only,
        max_diameters=recipe.export.max_diameters,
    )
    with segmenter:

        def segment(reader: Any) -> Any:
            return segmenter(reader, diameter_px=options.diameter_px, pixels=options.diameter_px is None)

        scores = evaluate_folder(folder, segment).mean
    figures = {name: float(getattr(scores, name)) for name in _FIGURES}
    if parallel.is_first():
        with new_file(path) as temporary:
            temporary.write_text(json.dumps({"recipe": key, "figures": figures}, indent=1), encoding="utf-8")
    return figures


def _train(arm: Arm, run: Run) -> Path:
    """Train what an arm needs and is not there yet; return the folder of its checkpoint."""
    own = replace(run, recipe=arm.recipe(run.recipe), out=run.out / arm.name, resume=True)
    shared = replace(run, resume=True)
    if arm.name == "synthesized":
        run_source(own)
        return own.out / "source"
    run_source(replace(shared, out=run.out / "source"))
    source = run.out / "source" / "source"
    if arm.stage == "source":
        return source
    if arm.stage == "adapt":
        run_adapt(own, source)
        return own.out / "adapt"
    first = replace(shared, out=run.out / "stage_1")
    run_adapt(first, source)
    run_refine(own, first.out / "adapt")
    return own.out / "refine"


def _write_tables(out: Path, arms: Sequence[Arm], rows: Rows, paper: str) -> None:
    """Write the arms done so far as CSV, as a Markdown table beside the paper's figures, and as a plot."""
    lines = [
        "| arm | AJI | pixel F1 | object F1 | max IoU | seeds | paper: AJI, pixel F1, object F1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        ours = " | ".join(_in_words(rows[arm.name], name) for name in _FIGURES)
        theirs = ", ".join(f"{value:.4f}" for value in arm.paper.get(paper, ())) or "-"
        lines.append(f"| {arm.title} | {ours} | {len(rows[arm.name])} | {theirs} |")
    with new_file(out / "ablation.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (
        new_file(out / "ablation.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["arm", "run", *_FIGURES, "paper_aji", "paper_pixel_f1", "paper_object_f1"])
        for arm in arms:
            theirs_of = arm.paper.get(paper, ("", "", ""))
            for number, figures in enumerate(rows[arm.name]):
                writer.writerow([arm.name, number + 1, *(f"{figures[f]:.4f}" for f in _FIGURES), *theirs_of])
    with new_file(out / "ablation.png") as temporary:
        _plot(temporary, arms, rows, paper)


def _in_words(runs: Sequence[Mapping[str, float]], figure: str) -> str:
    """Return the mean of a figure, and its standard deviation where there are several seeds."""
    values = [one[figure] for one in runs]
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _plot(path: Path, arms: Sequence[Arm], rows: Rows, paper: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 * len(arms) + 1.4), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(arms)))
    runs = [[one["aji"] for one in rows[arm.name]] for arm in arms]
    axes.barh([p - 0.2 for p in places], [mean(values) for values in runs], height=0.38, label="here")
    for place, values in zip(places, runs, strict=True):
        axes.plot(values, [place - 0.2] * len(values), "k|" if len(values) > 1 else "", markersize=8)
    known = [(p, a.paper[paper][0]) for p, a in zip(places, arms, strict=True) if paper in a.paper]
    if known:
        axes.barh(
            [p + 0.2 for p, _ in known], [v for _, v in known], height=0.38, color="#bbb", label="paper"
        )
    axes.set_yticks(places, [arm.title for arm in arms])
    axes.invert_yaxis()
    axes.set(xlabel="AJI, mean over images", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=100)
