"""A recipe: everything a training run depends on, read from one TOML file into frozen dataclasses."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from darcnn.runtime.errors import UsageError
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.manifest import check_name
from darcnn.runtime.slab import Slab
from darcnn.training.config_checks import problems_of

__all__ = [
    "Ablation",
    "AdaptStage",
    "Export",
    "Recipe",
    "RefineStage",
    "Source",
    "SourceStage",
    "Target",
    "TargetSet",
    "changed_keys",
    "read_recipe",
    "recipe_from_table",
    "recipe_to_table",
    "relevant_part",
]

T = TypeVar("T")

_FULL_RANGE = IntensityRule("full_range")
_COLOURS = 3  # channels
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Source:
    """The labelled images: photographs with COCO annotations, or images with label maps; one of the two.

    Paths are relative to the data folder.
    """

    images: str  # a folder; with label maps, a glob will do as well
    annotations: str | None = None  # COCO instances JSON
    labels: str | None = None  # folder of PNGs named as the images: 0 background, one number an object
    diameter_px: tuple[float, float] = (8.0, 80.0)  # objects are brought to sizes drawn from this range
    scene_fraction: float = 0.5  # batches' share of scenes: many cut-out objects on one background
    grey_fraction: float = 0.5  # share of images that lose their colour
    intensity: IntensityRule = _FULL_RANGE  # of images with label maps
    invert: bool | None = None  # bright for dark: true all images, false none, left out half of them
    synthetic_fraction: float = 0.0  # batches' share of target crops with synthesized nuclei


@dataclass(frozen=True, slots=True)
class TargetSet:
    """One group of unlabelled images: a glob relative to the data folder, and how large their objects are."""

    images: str
    diameter_px: float | None = None  # typical object in these images; None: as the nominal diameter


@dataclass(frozen=True, slots=True)
class Target:
    """The unlabelled images and how the model sees them."""

    sets: tuple[TargetSet, ...]
    channels: int
    intensity: IntensityRule
    nominal_diameter_px: float  # typical object in network pixels
    mpp: float | None = None  # micrometres per network pixel
    # the size of the objects is estimated in each image, in training (where a set gives none) and in a run
    finds_diameter: bool = False
    jitter: float = 1.4  # training crops are scaled at random by up to this factor either way
    slab: Slab | None = None  # of volumes: planes that are averaged, and how much they are smoothed

    def with_intensity_done(self) -> Target:
        """Return the same for images that have been through the intensity rule already."""
        return replace(self, intensity=_FULL_RANGE)


@dataclass(frozen=True, slots=True)
class SourceStage:
    """Mask R-CNN on the labelled photographs: what all encoders of the adaptation start from."""

    steps: int = 0  # 0: the recipe's weights are a Mask R-CNN already and stay as they are
    batch: int = 4  # of all processes together, as every batch here
    accumulate: int = 1  # batches whose gradients make one step
    learning_rate: float = 5e-4
    warm_up: int = 50


@dataclass(frozen=True, slots=True)
class AdaptStage:
    """Stage 1, feature-level adaptation: DARCNN, equation (1)."""

    steps: int = 0  # 0: left out, for want of labelled images to align with, say
    source_batch: int = 2
    target_batch: int = 2
    accumulate: int = 1
    learning_rate: float = 1e-4
    warm_up: int = 10
    alpha: float = 1.0  # weight of L_sim once it has risen; 0 leaves it out
    alpha_first: float = 0.1  # share of alpha at the first step
    alpha_rise_steps: int = 20
    beta: float = 1.0  # weight of L_diff
    gamma: float = 0.1  # weight of L_target
    heads_average: float = 0.99  # how slowly M^t follows M^s; 1 keeps M^t as it was
    encoder_average: float = 1.0  # how slowly E_p^t follows E_p^s; 1, as in the paper: not at all
    # learning rate of E_p^t, a share of the others'. Adam takes the size out of a gradient: what L_diff and
    # L_target alone teach moves as far as what labels teach, however small their weights are
    target_encoder_rate: float = 1.0
    patience: int = 200


@dataclass(frozen=True, slots=True)
class RefineStage:
    """Stage 2, augmented pseudo-labels. `rounds` times: label the clean images, then train on them."""

    steps: int  # of one round
    rounds: int = 1
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 3e-4
    warm_up: int = 20
    # "few": a twentieth of the weights alone, for a finished model that is nearly right
    learns: Literal["all", "few"] = "all"
    augment: bool = True  # the paper's augmentation of pseudo-labelled tiles; False only crops them
    glass: float = 0.0  # share of the pseudo-labelled tiles with holes of bare glass, which are no objects
    vary_stains: float = 0.0  # the stains of coloured tiles are made stronger or weaker by up to so much
    extra_noise: float = 0.0  # up to so many times a tile's own noise is added to it; 0 none
    min_score: float = 0.5  # z
    # findings between this score and z teach neither "object" nor "background", but for the last round, in
    # which they are background; None: always background
    doubt_score: float | None = None
    # pseudo-labels an image keeps, best first; the rest is background. On Kumar's images learning from all
    # was worse (docs/results.md)
    max_objects: int = 300
    max_diameters: float | None = None  # what is larger than so many nominal diameters is no pseudo-label
    scales: tuple[float, ...] = (1.0,)  # the images are labelled at each of these scales, results merged
    # whether objects are brighter or darker than what surrounds them; findings of the other polarity are
    # dropped. "one": all are alike, and the findings say which; "any": both occur
    polarity: Literal["any", "one", "bright", "dark"] = "any"
    # of stained tissue: findings with less than this share of their image's median optical density in red
    # light are doubtful in every round, those with less than half of it are dropped; 0 asks for none
    min_stain: float = 0.0
    fit_masks: bool = False  # fit each pseudo-mask to its image by a threshold between inside and outside
    source_every: int = 0  # every n-th step learns from the photographs again; 0 never
    # every n-th step learns from synthesized tiles, but where photographs are due; 0 never
    synthetic_every: int = 0
    # share of the pseudo-labelled tiles that are crowded: copies of their single objects laid against others
    crowding: float = 0.0


@dataclass(frozen=True, slots=True)
class Export:
    """What the bundle of this recipe is told."""

    min_score: float = 0.5
    max_diameters: float | None = None  # what is larger than so many nominal diameters is not reported
    tile_px: int = 512
    found_diameter_px: float | None = None  # what the model takes objects of the nominal diameter for


@dataclass(frozen=True, slots=True)
class Ablation:
    """On which labelled images the arms of `darcnn-train ablation` are scored; training never reads them."""

    folder: str  # holds images/ and labels/, relative to the data folder
    diameter_px: float | None = None  # typical object in these images; None: pixels as they are
    paper: Literal["none", "bbbc", "tnbc"] = "none"  # whose figures in Tables 3 and 4 stand beside
    seeds: tuple[int, ...] = ()  # more seeds of source only, full stage 1 and full stage 2


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run."""

    name: str
    preset: str
    seed: int
    data: str  # folder, relative to the recipe file
    data_licence: str
    target: Target
    refine_stage: RefineStage
    source: Source | None = None  # None: no labelled images; the stages that need them have 0 steps
    source_stage: SourceStage = field(default_factory=SourceStage)
    adapt_stage: AdaptStage = field(default_factory=AdaptStage)
    tile_px: int = 256
    # or "coco", a Mask R-CNN that knows photographs, the name of a shipped model, or a bundle (.darcnn) or
    # detectron2 checkpoint (.pkl, .pth) relative to the data folder
    weights: str = "imagenet"
    export: Export = field(default_factory=Export)
    ablation: Ablation | None = None


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in the TOML file `path`.

    Raises:
        UsageError: the file cannot be read, is no TOML, or a key is unknown, missing or of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark before it
    except OSError as err:
        raise UsageError(
            err.strerror or "cannot be read", where=path, fix="give the path of a recipe"
        ) from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"is not TOML ({err})", where=path, fix="correct that line") from err
    recipe = recipe_from_table(table, where=str(path))
    try:
        check_name(recipe.name)  # of checkpoints from before it was checked the name may be any
    except ValueError as err:
        raise UsageError(
            f"name = {recipe.name!r}: {err}", where=path, fix="use letters, digits, - and _"
        ) from err
    return recipe


def recipe_from_table(table: Mapping[str, Any], *, where: str) -> Recipe:
    """Return the recipe that a parsed table holds; `where` names it in errors.

    Raises:
        UsageError: a key is unknown (the error names the nearest valid one), missing or of the wrong type.
    """
    recipe = _parse(Recipe, table, where, "")
    for problem, fix in problems_of(recipe):
        raise UsageError(problem, where=where, fix=fix)
    return recipe


def recipe_to_table(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as nested tables that JSON holds; `recipe_from_table` reads them back."""
    return asdict(recipe)


def relevant_part(recipe: Recipe, stage: str) -> tuple[object, ...]:
    """Return what the result of `stage` ("source", "adapt", "refine") depends on, stages before it included.

    Two recipes that agree in it may share the stage's checkpoint.
    """
    parts: tuple[object, ...] = (
        recipe.preset,
        recipe.weights,
        recipe.seed,
        recipe.tile_px,
        recipe.source,
        recipe.source_stage,
    )
    if recipe.source is not None and recipe.source.synthetic_fraction > 0:
        parts = (*parts, recipe.target)  # the source stage already sees crops of its images
        told = "bright" if recipe.target.channels == _COLOURS else "dark"  # what they are not taken for, else
        parts = (*parts, recipe.refine_stage.polarity == told)
    if stage == "source":
        return parts
    parts = (*parts, recipe.target, recipe.adapt_stage)
    return parts if stage == "adapt" else (*parts, recipe.refine_stage)


def changed_keys(before: Recipe, now: Recipe) -> list[str]:
    """Return the keys that differ, among those that some stage depends on: "refine_stage.steps"."""
    tables = [dict(_values(recipe_to_table(recipe))) for recipe in (before, now)]
    beside = ("name", "data", "data_licence", "export", "ablation")
    return sorted(
        key
        for key in tables[0].keys() | tables[1].keys()
        if tables[0].get(key) != tables[1].get(key) and key.partition(".")[0] not in beside
    )


def _values(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _parse(kind: type[T], table: Any, where: str, prefix: str) -> T:
    if not isinstance(table, Mapping):
        raise UsageError(
            f"{prefix.rstrip('.') or 'recipe'} is not a table", where=where, fix="write it as [table]"
        )
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # every kind is a dataclass
    hints = get_type_hints(kind)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UsageError(
                f"unknown key {prefix}{key}", where=where, fix=f"did you mean {prefix}{near[0]}?"
            )
    values: dict[str, Any] = {}
    for name, one in known.items():
        if name in table:
            values[name] = _value(hints[name], table[name], where, prefix + name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise UsageError(f"lacks the key {prefix}{name}", where=where, fix="add it")
    return kind(**values)


def _value(hint: Any, value: Any, where: str, name: str) -> Any:
    """Return `value` as the type `hint`, or say what was expected."""
    tables = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)]
    if tables and get_origin(hint) is not tuple and not (value is None and type(None) in get_args(hint)):
        return _parse(tables[0], value, where, name + ".")
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        n_given = len(value) if isinstance(value, (list, tuple)) else -1
        kinds = [inner[0]] * n_given if inner[-1] is Ellipsis else list(inner)
        if len(kinds) == n_given:
            return tuple(
                _value(k, v, where, f"{name}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True))
            )
        wanted = f"give a list of {len(inner)}" if inner[-1] is not Ellipsis else "give a list"
        raise UsageError(f"{name} = {value!r} is not such a list", where=where, fix=wanted)
    options = get_args(hint) or (hint,)
    if value in [o for o in options if isinstance(o, str)]:
        return value
    if isinstance(value, bool):
        fits = bool in options
    elif isinstance(value, int) and float in options:
        return float(value)
    else:
        fits = any(isinstance(option, type) and isinstance(value, option) for option in options)
    if not fits:
        raise UsageError(f"{name} = {value!r} is not of its kind", where=where, fix=_wanted(options))
    return value


def _wanted(options: Sequence[Any]) -> str:
    """Return what a user is to write, of the types and words that a key takes.

    >>> _wanted((int, type(None))), _wanted(("any", "one"))
    ('give a whole number', 'give "any" or "one"')
    """
    known = [_KINDS[option] for option in options if option in _KINDS]
    return "give " + " or ".join([*known, *(f'"{option}"' for option in options if isinstance(option, str))])
