"""Fixtures that several rooms share, and what a machine lacks said as the reason of a skip."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, and no limit of time on a busy machine: a red one is about the change.
# HYPOTHESIS_PROFILE=default searches on.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where no NVIDIA GPU answers."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the engines that were built: tests note them as a property, which comes from any process."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "built":
                terminalreporter.write_line(str(value))


def _has_gpu() -> bool:
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listing = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=60)
    return listing.returncode == 0 and "GPU 0" in listing.stdout


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def example_slide() -> Path:
    """The real slide that comes with the repository, 2220 x 2967 px, 0.499 um per pixel."""
    path = ROOT / "examples" / "CMU-1-Small-Region.svs"
    if not path.exists():
        pytest.skip("examples/CMU-1-Small-Region.svs is not in this checkout")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with data beside the checkout, which is not part of the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return path
