"""From labelled and unlabelled images to files of results, with the three commands that a user has."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="training needs torch: pip install 'darcnn[train]'")
pytest.importorskip("onnxscript", reason="export needs onnxscript: pip install 'darcnn[export]'")

RECIPE = """
name = "tiny"
preset = "lite"
seed = 5
data = "."
data_licence = "CC0, see tests/data/PROVENANCE.md"
tile_px = 128

[source]
images = "source/images"
annotations = "source/instances.json"
diameter_px = [12.0, 60.0]

[source_stage]
steps = 40
batch = 2
warm_up = 1

[target]
channels = 1
intensity = { kind = "percentile", low = 0.5, high = 99.8 }
nominal_diameter_px = 20.0

[[target.sets]]
images = "target/*.png"

[adapt_stage]
steps = 3
warm_up = 1

[refine_stage]
steps = 3
batch = 2
warm_up = 1
min_score = 0.0     # a network that learned for seconds is sure of nothing
fit_masks = true
source_every = 2

[export]
min_score = 0.0
tile_px = 128
"""
IMAGE = "u2os_212b858a66"
OUTPUTS = {"objects.parquet", "objects.geojson.gz", "labels.ome.zarr", "overview.png", "run.json"}


def _succeed(main: Callable[[], object], program: str, arguments: list[object]) -> None:
    """Run a command as from a shell; it must end with exit code 0."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_of:
            main()
    assert not exit_of.value.code, program


@pytest.fixture(scope="module")
def folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the chain worked: `run` holds the checkpoints, `tiny.darcnn` is the model, `out` the results."""
    torch.set_num_threads(1)  # steps of milliseconds
    from darcnn.export.cli import main as export
    from darcnn.runtime.cli import main as run
    from darcnn.training.cli import main as train

    folder, data = tmp_path_factory.mktemp("chain"), root / "tests" / "data"
    recipe, bundle, checkpoints = folder / "tiny.toml", folder / "tiny.darcnn", folder / "run"
    recipe.write_text(RECIPE, encoding="utf-8")
    _succeed(train, "darcnn-train", ["run", recipe, "--data", data, "--out", checkpoints])
    _succeed(
        export,
        "darcnn-export",
        ["bundle", checkpoints / "refine", "--out", bundle, "--data", data / "target", "--tile", 128],
    )
    image = data / "evaluate" / "images" / f"{IMAGE}.png"
    _succeed(run, "darcnn-run", [image, "--model", bundle, "--pixels", "--out", folder / "out"])
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Path:
    return folder / "out" / IMAGE


@pytest.mark.slow
def test_training_leaves_a_checkpoint_for_each_stage(folder: Path) -> None:
    for stage in ("source", "adapt", "refine"):
        assert json.loads((folder / "run" / stage / "checkpoint.json").read_text())["complete"]
    assert list((folder / "run" / "refine" / "pseudo_labels").glob("*.png"))


@pytest.mark.slow
def test_training_leaves_a_report_on_all_stages_that_stands_alone(folder: Path) -> None:
    text = (folder / "run" / "report.html").read_text(encoding="utf-8")
    for stage in ("source", "adapt", "refine"):
        assert f"<h2>{stage}</h2>" in text
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3 * 2 + 1  # curves and findings of each stage, and the pseudo-labels' scores
    for source in sources:
        kind, _, encoded = source.partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as picture:
            picture.load()
    labels = json.loads((folder / "run" / "refine" / "pseudo_labels" / "complete.json").read_text())
    assert f"<td>{labels['objects']}</td>" in text
    assert "http" not in text


@pytest.mark.slow
def test_a_run_writes_the_five_outputs_and_nothing_else(results: Path) -> None:
    assert {path.name for path in results.iterdir()} == OUTPUTS


@pytest.mark.slow
def test_every_output_opens_and_tells_of_the_same_objects(results: Path) -> None:
    import pyarrow.parquet
    import zarr

    record = json.loads((results / "run.json").read_text(encoding="utf-8"))
    table = pyarrow.parquet.read_table(results / "objects.parquet")
    with gzip.open(results / "objects.geojson.gz", "rt", encoding="utf-8") as file:
        features = json.load(file)["features"]
    labels = np.asarray(zarr.open_group(results / "labels.ome.zarr", mode="r")["0"][...])
    with Image.open(results / "overview.png") as overview:
        overview.load()
    assert record["model"]["name"] == "tiny"
    assert table.num_rows == len(features) > 0
    numbers = table.column("id").to_pylist()
    assert numbers == list(range(1, table.num_rows + 1))
    assert labels.shape[-2:] == (128, 128)
    assert set(np.unique(labels)) - {0} <= set(numbers)
    assert labels.any()


@pytest.mark.slow
def test_the_model_as_a_bundle_finds_what_its_checkpoint_finds(folder: Path, root: Path) -> None:
    from darcnn.export.graph import freeze_network
    from darcnn.runtime import load
    from darcnn.runtime.boxes import pairwise_iou
    from darcnn.training.checkpoint import load_network
    from darcnn.training.engine import make_segmenter

    with Image.open(root / "tests" / "data" / "evaluate" / "images" / f"{IMAGE}.png") as picture:
        image = np.array(picture)
    network, info = load_network(folder / "run" / "refine")
    rounded = freeze_network(network)  # a bundle keeps 16 bits of each weight
    with (
        load(folder / "tiny.darcnn", device="cpu") as shipped,
        make_segmenter(rounded, info.recipe.target, min_score=0.0, tile_px=128) as trained,
    ):
        assert shipped.manifest.input == trained.manifest.input
        ours, theirs = trained(image), shipped(image)
    # A network that learned for seconds scores many overlapping boxes almost alike, and which of two such
    # boxes suppresses the other hangs on the last bit; the better half of its findings does not.
    for mine, other in ((ours, theirs), (theirs, ours)):
        strong = mine.select(mine.scores >= np.median(mine.scores))
        best = pairwise_iou(strong.boxes, other.boxes).max(axis=1)
        assert len(strong) > 3
        assert (best > 0.9).mean() > 0.9
    overlap = (ours.labels() > 0) & (theirs.labels() > 0)
    either = (ours.labels() > 0) | (theirs.labels() > 0)
    assert overlap.sum() / either.sum() > 0.95


@pytest.mark.slow
def test_evaluation_of_the_bundle_prints_figures(
    folder: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from darcnn.training.cli import main as train

    labelled = root / "tests" / "data" / "evaluate"
    _succeed(train, "darcnn-train", ["evaluate", folder / "tiny.darcnn", labelled, "--pixels"])
    assert "all 2, mean" in capsys.readouterr().out
