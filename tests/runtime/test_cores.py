"""A process computes on the cores that it may use, and on no others."""

import math
import os
import subprocess
import sys

import pytest

from darcnn.runtime import cores
from darcnn.runtime.cores import core_limit, usable_cores

BOUND = """
import os, sys
from pathlib import Path
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from darcnn.runtime.bundle import open_bundle
from darcnn.runtime.engines.onnxruntime import OnnxRuntimeEngine
engine = OnnxRuntimeEngine(open_bundle(Path(sys.argv[1])), device="cpu")
allowed = [os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")]
sys.exit(any(one != os.sched_getaffinity(0) for one in allowed))
"""


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "share"),
    [("max 100000\n", math.inf), ("150000 100000\n", 1.5), ("50000 100000", 0.5), ("", math.inf)],
)
def test_a_container_has_the_share_of_its_control_group(cgroups, text, share):
    (cgroups / "cpu.max").write_text(text)
    assert cores._share(cgroups) == share
    all_cores = os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    assert usable_cores() == (all_cores if share == math.inf else min(all_cores, math.ceil(share)))


@pytest.mark.parametrize(("quota", "share"), [("-1\n", math.inf), ("200000\n", 2.0)])
def test_control_groups_of_version_1(cgroups, quota, share):
    (cgroups / "cpu").mkdir()
    (cgroups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (cgroups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores._share(cgroups) == share


def test_there_is_a_limit_only_where_some_cores_are_kept_from_the_process(cgroups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert core_limit() is None
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert core_limit() == 2


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)
def test_no_thread_computes_on_a_core_that_the_process_is_kept_from(tiny_bundle):
    subprocess.run([sys.executable, "-c", BOUND, str(tiny_bundle)], check=True)
