"""The rooms keep to their walls: who imports whom, what never is imported, how large a module grows."""

import ast
import configparser
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "training", "export")
MAX_LINES = 350

# room -> which rooms it may import
MAY_IMPORT = {
    "runtime": {"runtime"},
    "training": {"training", "runtime"},
    "export": {"export", "training", "runtime"},
}
# The shells of the runtime: training and export use its parts, not its programs.
SHELLS = {
    *("batch", "cli", "journal", "live", "outputs", "pipeline", "progress", "record", "sinks", "summary"),
}
NO_SHELL = "darcnn.runtime.sinks.atomic."  # how anything is written
TORCH = {"torch", "torchvision", "timm", "torchaudio", "functorch"}
# Forks copy locks in whatever state they are, and neither exists on Windows.
NOT_PORTABLE = {"fcntl", "pwd", "grp", "resource", "termios"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# The one module that reads pickles (of other programs), and all that it may import for it: an unpickler,
# whose `find_class` it replaces by a short list of names.
READS_PICKLES = "training/model/tensor_file.py"
UNPICKLER = {"pickle.Unpickler", "pickle.UnpicklingError"}
# Modules of the runtime that may import an extra, and which; nothing else there leaves the base install.
EXTRAS_OF_RUNTIME: dict[str, set[str]] = {
    "runtime/cluster.py": {"distributed"},
    "runtime/cluster_worker.py": {"distributed"},
    "runtime/engines/cuda.py": {"cuda"},
    "runtime/engines/openvino.py": {"openvino"},
    "runtime/engines/openvino_parts.py": {"openvino"},
    "runtime/engines/openvino_pooling.py": {"openvino"},
    "runtime/live/micromanager.py": {"pymmcore_plus", "useq"},
    "runtime/readers/czi.py": {"pylibCZIrw"},
    "runtime/readers/ims.py": {"h5py", "hdf5plugin"},
    "runtime/readers/lif.py": {"liffile"},
    "runtime/readers/mrc_header.py": {"mrcfile"},
    "runtime/readers/nd2.py": {"nd2"},
    "runtime/readers/ome_zarr.py": {"aiohttp"},
    "runtime/readers/nifti.py": {"nibabel"},
    "runtime/volumes/extras.py": {"mrcfile"},
    "runtime/volumes/particles.py": {"pandas", "starfile"},
}
# What an importable name is called in the registry, where the two differ.
REGISTRY_NAMES = {"PIL": "pillow", "openslide": "openslide-python"}


def read_setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text):
    return {
        parsed.name: parsed
        for line in text.strip().splitlines()
        for parsed in [Requirement(line)]
        if parsed.name != "darcnn"
    }


def modules(*rooms):
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """Yield every (dotted name, line) that the file imports, at any depth, TYPE_CHECKING included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} imports relatively"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


EVERY_MODULE = pytest.mark.parametrize("path", modules(*ROOMS), ids=name_of)


@EVERY_MODULE
def test_module_imports_only_the_rooms_it_may(path):
    room = path.relative_to(ROOT).parts[0]
    for name, line in imports(path):
        if name.startswith("darcnn."):
            assert name.split(".")[1] in MAY_IMPORT[room], f"{name_of(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", modules("training", "export"), ids=name_of)
def test_other_rooms_use_parts_of_the_runtime_not_its_shells(path):
    for name, line in imports(path):
        parts = name.split(".")
        if parts[:2] == ["darcnn", "runtime"] and len(parts) > 2 and not name.startswith(NO_SHELL):
            assert parts[2] not in SHELLS, f"{name_of(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", modules("runtime"), ids=name_of)
def test_runtime_imports_only_the_base_install(path):
    base = {name.lower() for name in requirements(read_setup()["options"]["install_requires"])}
    allowed = EXTRAS_OF_RUNTIME.get(name_of(path), set())
    for name, line in imports(path):
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top == "darcnn" or top in allowed:
            continue
        assert top not in TORCH, f"{name_of(path)}:{line} imports {name}"
        assert REGISTRY_NAMES.get(top, top).lower() in base, f"{name_of(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", modules("runtime"), ids=name_of)
def test_runtime_runs_on_every_system(path):
    for name, line in imports(path):
        assert name.split(".")[0] not in NOT_PORTABLE, f"{name_of(path)}:{line} imports {name}"
        assert not name.startswith("os.fork"), f"{name_of(path)}:{line} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in {"fork", "forkpty"}:
            raise AssertionError(f"{name_of(path)}:{node.lineno} forks")


@EVERY_MODULE
def test_nothing_unpickles(path):
    allowed = UNPICKLER if name_of(path) == READS_PICKLES else set()
    for name, line in imports(path):
        is_allowed = name in allowed or name.split(".")[0] not in PICKLES
        assert is_allowed, f"{name_of(path)}:{line} imports {name}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"torch.load", "np.load", "numpy.load"}:
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe = safe.get("weights_only") == "True" or safe.get("allow_pickle") == "False"
            assert is_safe, f"{name_of(path)}:{node.lineno} may unpickle"


def test_the_unpickler_looks_up_no_names():
    tree = ast.parse((ROOT / READS_PICKLES).read_text(encoding="utf-8"))
    readers = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "Unpickler" in map(ast.unparse, node.bases)
    ]
    assert len(readers) == 1
    methods = {node.name: ast.unparse(node) for node in readers[0].body if isinstance(node, ast.FunctionDef)}
    assert "super()" not in methods["find_class"]
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {"Unpickler", "getattr", "__import__", "import_module"} & set(calls)


@EVERY_MODULE
def test_module_is_small(path):
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_LINES, f"{name_of(path)} has {n_lines} lines: split it by noun"


def test_no_module_is_called_utils():
    for path in [*modules(*ROOMS), *(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert path.stem not in {"utils", "util", "helpers", "common", "misc"}, name_of(path)


def test_setup_lists_every_package_on_the_disk():
    listed = read_setup()["options"]["packages"].split()
    found = {
        "darcnn." + path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in modules(*ROOMS)
    }
    assert sorted(listed) == sorted(found)


def test_every_package_has_an_init_and_every_room_its_types():
    for folder in {path.parent for path in modules(*ROOMS)}:
        assert (folder / "__init__.py").is_file(), folder
    for room in ROOMS:
        assert (ROOT / room / "py.typed").is_file()
    assert not (ROOT / "darcnn").exists(), "darcnn is a namespace"


def test_commands_exist():
    scripts = read_setup()["options.entry_points"]["console_scripts"].strip().splitlines()
    assert len(scripts) == 3
    for line in scripts:
        target = line.split("=")[1].strip()
        module, _, function = target.partition(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        names = [
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")
        ]
        assert function in names, target


def test_constraints_pin_what_the_checks_install():
    setup = read_setup()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.search(r"^EXTRAS := (.+)$", makefile, re.MULTILINE)
    assert extras is not None
    wanted = requirements(setup["options"]["install_requires"])
    for extra in extras[1].split(","):
        wanted |= requirements(setup["options.extras_require"][extra])
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name] = version
    assert sorted(pins) == sorted(wanted)
    for name, requirement in wanted.items():
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes {pins[name]}"


def test_every_dependency_has_a_lower_bound_and_no_pin():
    setup = read_setup()
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for text in texts:
        for requirement in requirements(text).values():
            assert {part.operator for part in requirement.specifier} == {">="}, str(requirement)


def test_python_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    lowest = read_setup()["options"]["python_requires"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == lowest
    assert project["tool"]["ruff"]["target-version"] == "py" + lowest.replace(".", "")


WITHOUT_TORCH = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import darcnn.runtime
for module in pkgutil.walk_packages(darcnn.runtime.__path__, "darcnn.runtime."):
    if module.name.replace(".", "/") not in {skipped!r}:
        importlib.import_module(module.name)
        print(module.name)
"""


def test_runtime_imports_without_torch():
    others = {"onnx", "onnxscript", "safetensors", "tensorboard", "pycocotools", "tqdm"}
    blocked = sorted(TORCH.union(others, *EXTRAS_OF_RUNTIME.values()))
    skipped = [f"darcnn/{name.removesuffix('.py')}" for name in EXTRAS_OF_RUNTIME]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_TORCH.format(blocked=blocked, skipped=skipped)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert result.returncode == 0, result.stderr
    n_modules = len([path for path in modules("runtime") if path.name != "__init__.py"])
    assert len(result.stdout.split()) >= n_modules - len(skipped)


def test_version_is_that_of_the_package():
    import darcnn.runtime

    try:
        installed = importlib.metadata.version("darcnn")
    except importlib.metadata.PackageNotFoundError:
        installed = "0+unknown"
    assert darcnn.runtime.__version__ == installed
