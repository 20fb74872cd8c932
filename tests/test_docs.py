"""The documents are true: what they show runs, what they name exists, and no command goes unmentioned."""

import doctest
import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest

import darcnn.runtime
from darcnn.runtime.geometry import Region

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "training", "export")
PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/export.md",
    "docs/live.md",
    "docs/method.md",
    "docs/native.md",
    "docs/runtime.md",
    "docs/tomograms.md",
    "docs/your-own-images.md",
)
# How each command's click object is found.
COMMANDS = {
    "darcnn-run": ("darcnn.runtime.cli", "main"),
    "darcnn-train": ("darcnn.training.cli", "commands"),
    "darcnn-export": ("darcnn.export.cli", "cli"),
}
LANGUAGES = {"bash", "python"}


class Block(NamedTuple):
    language: str
    mark: str
    text: str
    line: int


def read_page(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not written yet")
    return path.read_text(encoding="utf-8")


def blocks(text):
    pattern = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for match in pattern.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(match[1], match[2].strip(), match[3], line)


def readme_blocks(language, mark):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [block for block in blocks(text) if (block.language, block.mark) == (language, mark)]
    return pytest.mark.parametrize("block", found, ids=[f"line {block.line}" for block in found])


def click_commands():
    """Return {"darcnn-export info": click command} of every command and subcommand."""
    found = {}
    for program, (module, name) in COMMANDS.items():
        command = getattr(importlib.import_module(module), name)
        found[program] = command
        if isinstance(command, click.Group):
            found |= {f"{program} {sub}": command.commands[sub] for sub in command.commands}
    return found


def needs_model(name):
    if name not in darcnn.runtime.shipped_models():
        pytest.skip(f"the model {name} is not in this checkout")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs_or_says_why_not(page):
    for block in blocks(read_page(page)):
        if block.language in LANGUAGES:
            said = block.mark == "run" or re.fullmatch(r"skip: .+", block.mark)
            assert said, f"{page}:{block.line}: mark the block `run`, or `skip: ` and why"


@pytest.mark.slow
@readme_blocks("python", "run")
def test_python_block_of_the_readme_runs(block, example_slide):
    for name in re.findall(r'load\("([^"]+)"\)', block.text):
        needs_model(name)
    with darcnn.runtime.open_source(example_slide) as slide:
        image = slide.read(Region(0, 0, 300, 300), level=0)
    namespace = {"image": image}
    exec(compile(block.text, f"README.md:{block.line}", "exec"), namespace)
    instances = namespace["instances"]
    assert instances.labels().shape == (300, 300)
    assert len(instances.polygons()) == len(instances.boxes) == len(instances.scores)


@pytest.mark.slow
def test_python_block_of_the_page_on_slides_runs(example_slide, tmp_path, monkeypatch):
    needs_model("nuclei-he")
    (tmp_path / "examples").symlink_to(example_slide.parent, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks(read_page("docs/runtime.md")) if block.mark == "run"]
    namespace = {}
    exec(compile(block.text, f"docs/runtime.md:{block.line}", "exec"), namespace)
    assert namespace["summary"].n_objects > 0
    assert (tmp_path / "out" / "CMU-1-Small-Region" / "objects.csv").exists()


@pytest.mark.slow
@readme_blocks("bash", "run")
def test_bash_block_of_the_readme_runs(block, tmp_path):
    programs = Path(sys.executable).parent
    if shutil.which("darcnn-run", path=str(programs)) is None:
        pytest.skip("darcnn is not installed in this environment, only importable")
    for name in re.findall(r"--model (\S+)", block.text):
        needs_model(name)
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-euc", block.text], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True, timeout=1800
    )


def test_readme_names_every_command():
    readme = read_page("README.md")
    for name in click_commands():
        assert f"`{name}" in readme or f"\n{name} " in readme, f"README.md does not name {name}"


def test_commands_in_the_readme_have_the_options_shown():
    commands = click_commands()
    for block in blocks(read_page("README.md")):
        if block.language != "bash":
            continue
        for line in block.text.splitlines():
            words = line.split()
            if not words or words[0] not in COMMANDS:
                continue
            name = f"{words[0]} {words[1]}" if isinstance(commands[words[0]], click.Group) else words[0]
            assert name in commands, f"README.md:{block.line}: no command {name}"
            known = {option for parameter in commands[name].params for option in parameter.opts}
            shown = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert shown <= known, f"README.md:{block.line}: {name} has no {sorted(shown - known)}"


def test_every_command_and_option_has_help():
    for name, command in click_commands().items():
        assert command.help, f"{name} has no help"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]} has no help"


@pytest.mark.parametrize("program", COMMANDS)
def test_help_needs_no_torch(program):
    module, _ = COMMANDS[program]
    code = (
        f"import sys; sys.modules['torch'] = None; sys.argv = [{program!r}, '--help']\n"
        f"import {module}; {module}.main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert f"Usage: {program}" in result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", read_page(page)):
        if not re.match(r"https?:", target):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def module_paths():
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def test_architecture_names_the_modules_there_are():
    sections = re.split(r"^##+ ", read_page("docs/architecture.md"), flags=re.MULTILINE)
    named = set()
    for section in sections:
        heading = re.match(r"`(\S+)/`", section)
        if heading:
            named |= {
                f"{heading[1]}/{name}.py" for name in re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
            }
    paths = (path for room in ("runtime", "training", "export") for path in (ROOT / room).rglob("*.py"))
    found = {path.relative_to(ROOT).as_posix() for path in paths if path.name != "__init__.py"}
    assert sorted(named) == sorted(found)


def method_rows():
    path = ROOT / "docs" / "method.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines if "|" in line]
    return [row for row in rows if len(row) == 5 and row[2].startswith("`darcnn.")]


@pytest.mark.parametrize("row", method_rows(), ids=lambda row: row[2].strip("`"))
def test_method_map_is_true(row):
    citation, _, function, tests, deviation = row
    module, _, name = function.strip("`").rpartition(".")
    if module.startswith("darcnn.training"):
        pytest.importorskip("torch", reason="the training room needs torch")
    subject = getattr(importlib.import_module(module), name)
    said = " ".join((inspect.getdoc(subject) or "").split())
    source, _, place = citation.rpartition(", ")
    for part in (place, source.partition(" (")[0]):
        assert part in said, f"the docstring of {name} does not cite {citation}"
    assert (ROOT / tests.strip("`")).is_file(), f"{tests} does not exist"
    assert deviation


def test_method_map_has_rows():
    read_page("docs/method.md")
    equations = " ".join(row[0] for row in method_rows())
    for number in range(1, 5):
        assert f"({number})" in equations


def module_names():
    paths = [
        path for room in ("runtime", "training", "export") for path in sorted((ROOT / room).rglob("*.py"))
    ]
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return [".".join(("darcnn", *names)).removesuffix(".__init__") for names in parts]


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name):
    if not name.startswith("darcnn.runtime") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    problems: list[str] = []
    for test in doctest.DocTestFinder().find(module, extraglobs={"np": np}):
        runner.run(test, out=problems.append)
    assert runner.failures == 0, "".join(problems)
