"""What the tests of training share: tiny real images, a recipe for them, a network, objects from labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'darcnn[train]'")

from darcnn.runtime.instances import Instances  # noqa: E402  # after importorskip
from darcnn.runtime.intensity import IntensityRule  # noqa: E402
from darcnn.training.config import (  # noqa: E402
    AdaptStage,
    Export,
    Recipe,
    RefineStage,
    Source,
    SourceStage,
    Target,
    TargetSet,
)
from darcnn.training.data.batches import (  # noqa: E402
    Batch,
    collate,
    make_source_tile,
    random_generator,
)
from darcnn.training.data.source import PhotographSource  # noqa: E402
from darcnn.training.data.target import TargetImages  # noqa: E402
from darcnn.training.model.network import Darcnn  # noqa: E402
from darcnn.training.model.pretrained import load_imagenet  # noqa: E402

TILE_PX = 128

torch.set_num_threads(1)  # steps of milliseconds: threads that wait for each other take longer than one alone


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data(root: Path) -> Path:
    """The folder of tiny CC0 images; see its PROVENANCE.md."""
    return root / "tests" / "data"


@pytest.fixture(scope="session")
def shared_data(root: Path) -> Path:
    """The data beside the checkout, which is not part of the repository."""
    folder = root.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder `shared/data` beside the checkout")
    return folder


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """A recipe of a few steps on the tiny images; `dataclasses.replace` changes it."""
    return Recipe(
        name="tiny",
        preset="lite",
        seed=3,
        data=".",
        data_licence="CC0",
        source=Source("source/images", "source/instances.json", diameter_px=(12.0, 60.0)),
        target=Target(
            sets=(TargetSet("target/*.png"),),
            channels=1,
            intensity=IntensityRule("percentile", 0.5, 99.8),
            nominal_diameter_px=20.0,
        ),
        source_stage=SourceStage(steps=4, batch=2, warm_up=1),
        adapt_stage=AdaptStage(steps=4, warm_up=1),
        refine_stage=RefineStage(steps=4, batch=2, warm_up=1, min_score=0.0),
        tile_px=TILE_PX,
        export=Export(min_score=0.0, tile_px=TILE_PX),
    )


@pytest.fixture(scope="session")
def photographs(data: Path, recipe: Recipe) -> PhotographSource:
    """The labelled tiny images as a source."""
    return PhotographSource(data, recipe.source)


@pytest.fixture(scope="session")
def make_batch(data: Path, recipe: Recipe) -> Callable[..., Batch]:
    """A function that returns randomised labelled tiles, one for each diameter of its objects."""

    def make(tile_px: int, *diameters_px: float) -> Batch:
        tiles = []
        for index, diameter_px in enumerate(diameters_px):
            source = PhotographSource(data, replace(recipe.source, diameter_px=(diameter_px, diameter_px)))
            generator = random_generator(recipe.seed, "fixture", 0, index)
            tiles.append(
                make_source_tile(source, [], generator, tile_px, scene_fraction=0.0, grey_fraction=0.5)
            )
        return collate(tiles, range(len(tiles)))

    return make


@pytest.fixture(scope="session")
def make_target_tiles(data: Path, recipe: Recipe) -> Callable[[int, int], Any]:
    """A function that returns `n` unlabelled tiles as (n, 3, S, S)."""
    images = TargetImages(data, recipe.target, recipe.seed)

    def make(tile_px: int, n: int) -> Any:
        generators = [random_generator(recipe.seed, "target", 0, index) for index in range(n)]
        return collate([images.tile(generator, tile_px) for generator in generators], range(n)).images

    return make


@pytest.fixture(scope="session")
def small_batch(make_batch: Callable[..., Batch]) -> Batch:
    """Two labelled tiles of 64 px; not to be changed."""
    return make_batch(64, 20.0, 30.0)


@pytest.fixture(scope="session")
def small_tiles(make_target_tiles: Callable[[int, int], Any]) -> Any:
    """Two unlabelled tiles of 64 px; not to be changed."""
    return make_target_tiles(64, 2)


@pytest.fixture(scope="session")
def _imagenet_network() -> Darcnn:
    torch.manual_seed(0)
    network = Darcnn.from_name("lite")
    load_imagenet(network)
    return network


@pytest.fixture
def network(_imagenet_network: Darcnn) -> Darcnn:
    """A `lite` network with ImageNet weights, in training mode, the test's own."""
    return copy.deepcopy(_imagenet_network).train()


@pytest.fixture(scope="session")
def instances_of() -> Callable[..., Instances]:
    """A function that returns the objects of a label image, number n as object n - 1, with given scores."""
    return _instances_of


def _instances_of(labels: np.ndarray, scores: list[float] | None = None) -> Instances:
    numbers = [n for n in np.unique(labels) if n > 0]
    if not numbers:
        return Instances.empty(labels.shape)
    boxes, masks = [], []
    for number in numbers:
        rows, columns = np.nonzero(labels == number)
        x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        boxes.append((x0, y0, x1, y1))
        masks.append(labels[y0:y1, x0:x1] == number)
    corners = np.array(boxes)
    return Instances(
        shape=labels.shape,
        boxes=corners.astype(np.float32),
        scores=np.array(scores if scores is not None else np.linspace(0.9, 0.6, len(boxes)), np.float32),
        origins=corners[:, :2].astype(np.int64),
        masks=tuple(masks),
        outlines=tuple(_rectangle(*box) for box in boxes),
        truncated=np.zeros(len(boxes), bool),
    )


def _rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], np.float64)


@pytest.fixture(scope="session")
def disc() -> Callable[..., np.ndarray]:
    """A function that returns a (size, size) boolean disc."""

    def draw(size: int, x: float, y: float, radius: float) -> np.ndarray:
        rows, columns = np.mgrid[:size, :size]
        return (columns + 0.5 - x) ** 2 + (rows + 0.5 - y) ** 2 <= radius**2

    return draw


@pytest.fixture(scope="session")
def with_target(recipe: Recipe) -> Callable[..., Recipe]:
    """A function that returns the tiny recipe with a changed target."""
    return lambda **changes: replace(recipe, target=replace(recipe.target, **changes))


@pytest.fixture
def untrusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No stage is judged: what a network without training finds takes long to look at."""
    monkeypatch.setattr("darcnn.training.stages.note_trust", lambda *judged: None)
