"""Killed at any moment, the same command goes on and ends with the same bytes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from darcnn.runtime.sinks.result_folder import RUN_FILE

pytest.importorskip("starfile", reason="volumes need the extra volumes")

KILLS = 10
# A slow reader: planes come with a pause, so that a kill hits the search as well as the writing.
SCRIPT = """
import sys, time
from pathlib import Path
from dataclasses import replace
from darcnn.runtime.engines.oracle import OracleEngine, make_oracle_manifest
from darcnn.runtime.intensity import IntensityRule
from darcnn.runtime.segmenter import Segmenter
from darcnn.runtime.volumes.pipeline import run_volume

engine = OracleEngine(tile_px=64, channels=1)
manifest = make_oracle_manifest(engine, halo_px=16)
manifest = replace(manifest, input=replace(manifest.input, intensity=IntensityRule("range", 0, 255)))

def wait(done, total, **more):
    time.sleep(0.05)

print("begins", flush=True)
with Segmenter(engine, manifest) as segmenter:
    run_volume(segmenter, Path(sys.argv[1]), Path(sys.argv[2]), progress=wait)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RUN_FILE
    }


@pytest.mark.slow
def test_ten_kills_change_no_byte(mrc_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(mrc_file)]
    with subprocess.Popen([*command, str(tmp_path / "whole")], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        started = time.monotonic()
        assert run.wait() == 0
    lasts = time.monotonic() - started
    moments = random.Random(0)
    n_killed = 0
    while n_killed < KILLS:
        with subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            run.stdout.readline()  # imported: from here on there is something to lose
            time.sleep(moments.uniform(0.0, 0.5 * lasts))
            if run.poll() is None:
                run.kill()
            elif (tmp_path / "killed" / "balls" / RUN_FILE).exists():
                break  # it came to its end between two kills
        n_killed += 1
    subprocess.run([*command, str(tmp_path / "killed")], check=True, capture_output=True)
    assert n_killed > 1
    assert content(tmp_path / "killed" / "balls") == content(tmp_path / "whole" / "balls")
