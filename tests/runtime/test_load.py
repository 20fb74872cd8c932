"""A model is found by its name or by its path, and an unknown one is answered with the names there are."""

import numpy as np
import pytest

import darcnn.runtime as darcnn
from darcnn.runtime.errors import BundleError, UsageError


def test_load_opens_a_bundle_by_its_path(tiny_bundle):
    with darcnn.load(tiny_bundle, device="cpu") as segmenter:
        assert segmenter.manifest.name == "tiny"
        assert segmenter.min_score == 0.5
        assert len(segmenter(np.zeros((8, 8, 3), np.uint8))) == 0
    with darcnn.load(str(tiny_bundle), min_score=0.25) as segmenter:
        assert segmenter.min_score == 0.25


def test_load_answers_an_unknown_name_with_the_names_there_are():
    with pytest.raises(BundleError, match="no such model") as caught:
        darcnn.load("nuclei-on-mars")
    for name in darcnn.shipped_models():
        assert name in str(caught.value)


def test_load_says_that_a_bundle_is_not_there(tmp_path):
    with pytest.raises(BundleError, match="no such file"):
        darcnn.load(tmp_path / "none.darcnn")


def test_load_refuses_a_score_that_is_none(tiny_bundle):
    for score in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match="--min-score"):
            darcnn.load(tiny_bundle, min_score=score)


def test_shipped_models_are_those_of_the_package(root):
    folder = root / "runtime" / "models"
    assert darcnn.shipped_models() == tuple(sorted(path.stem for path in folder.glob("*.darcnn")))


def test_shipped_models_load(monkeypatch, tmp_path):
    for name in darcnn.shipped_models():
        (tmp_path / name).mkdir()  # a folder of the same name does not stand in the way
    monkeypatch.chdir(tmp_path)
    for name in darcnn.shipped_models():
        with darcnn.load(name, device="cpu") as segmenter:
            assert segmenter.manifest.name == name
