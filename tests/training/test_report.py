"""The report: one file that holds everything and reads well whatever has run."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from darcnn.runtime.errors import OutputError
from darcnn.training.checkpoint import CheckpointInfo, save_checkpoint
from darcnn.training.config import Recipe
from darcnn.training.history import History
from darcnn.training.model.network import Darcnn
from darcnn.training.report import write_report
from darcnn.training.trust import TRUST_FILE

IMAGE = re.compile(r'src="data:image/png;base64,([^"]+)"')


class Page(HTMLParser):
    """Collects what a page refers to, its headings and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: dict[str, list[str]] = {"h2": [], "td": []}
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag in self.words:
            self.words[tag].append("")

    def handle_data(self, data: str) -> None:
        if self._tag in self.words:
            self.words[self._tag][-1] += data.strip()

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def pictures(text: str) -> list[Image.Image]:
    found = []
    for encoded in IMAGE.findall(text):
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as picture:
            assert picture.format == "PNG"
            picture.load()
            found.append(picture)
    return found


def leave(out: Path, name: str, network: Darcnn, recipe: Recipe) -> None:
    """Leave the folder of a stage: three steps, a sheet and, of refinement, labels of two images."""
    folder, stage = out / name, name.split("-")[0]
    save_checkpoint(folder, network, CheckpointInfo(stage, 3, True, recipe))
    extra = {"consistency": 0.0, "regions": 12.0} if stage == "adapt" else {}
    with History(folder, stage, 0) as history:
        for step in range(3):
            values = {"rpn_box": 0.5 / (step + 1), "total": 2.0 / (step + 1), "learning_rate": 1e-4}
            history.add(step, values | extra)
        history.show(3, lambda network: Image.new("RGB", (40, 30), "red"), network)
    if stage == "refine":
        labels = folder / "pseudo_labels"
        labels.mkdir()
        for image in ("a", "b"):
            Image.new("I;16", (4, 4)).save(labels / f"{image}.png")
        summary = {"objects": 57, "scores": [0] * 19 + [57], "recipe": ""}
        (labels / "complete.json").write_text(json.dumps(summary))
    if name == "refine":
        trust = {"agreement": 0.81, "separation": 0.64, "n_objects": 9}
        (folder / TRUST_FILE).write_text(json.dumps(trust))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, _imagenet_network: Darcnn, recipe: Recipe) -> str:
    """The report of a run of two rounds."""
    out = tmp_path_factory.mktemp("run")
    for name in ("refine", "refine-1", "source", "adapt"):
        leave(out, name, _imagenet_network, recipe)
    (out / "refine-old").mkdir()  # not ours
    path = write_report(out, recipe)
    assert path == out / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_refers_to_nothing_else(text: str) -> None:
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    for word in ("<script", "<link", "@import", "url(", "http:", "https:"):
        assert word not in text


def test_the_report_shows_every_stage_in_order_with_curves_scores_and_findings(text: str) -> None:
    assert Page(text).words["h2"] == ["source", "adapt", "refine-1", "refine", "Recipe"]
    found = pictures(text)
    assert len(found) == 4 * 2 + 2  # curves and a sheet each, and the scores of two rounds
    assert sum(picture.size == (40, 30) for picture in found) == 4
    assert '"nominal_diameter_px": 20.0' in text.replace("&quot;", '"')


def test_the_report_counts_steps_regions_and_pseudo_labels(text: str) -> None:
    cells = Page(text).words["td"]
    rows = [cells[n : n + 7] for n in range(0, len(cells), 7)]
    assert rows == [
        ["source", "3", "0.667", "", "", "", ""],
        ["adapt", "3", "0.667", "12.0", "", "", ""],
        ["refine-1", "3", "0.667", "", "57", "2", ""],
        ["refine", "3", "0.667", "", "57", "2", "0.720"],
    ]


def test_a_report_on_some_stages_or_none_is_written(tmp_path: Path, network: Darcnn, recipe: Recipe) -> None:
    assert Page(write_report(tmp_path, recipe).read_text()).words["h2"] == ["Recipe"]
    leave(tmp_path, "adapt", network, recipe)
    (tmp_path / "adapt" / "history.csv").unlink()  # a stage of an older version
    text = write_report(tmp_path, recipe).read_text()
    assert Page(text).words["h2"] == ["adapt", "Recipe"]
    assert len(pictures(text)) == 1
    for folder in ("source", "refine"):  # a start that took no step, and a stage with nothing to show
        save_checkpoint(tmp_path / folder, network, CheckpointInfo(folder, 0, True, recipe))
    text = write_report(tmp_path, recipe).read_text()
    assert Page(text).words["h2"] == ["adapt", "Recipe"]
    assert Page(text).words["td"][::7] == ["source", "adapt", "refine"]  # of the table
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["report.html"]


def test_a_report_that_cannot_be_written_is_an_output_error(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report(tmp_path, recipe)
