"""One call from a model's name, or the path of a bundle, to a segmenter."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from darcnn.runtime.bundle import Bundle, open_bundle
from darcnn.runtime.engines.choose import open_engine
from darcnn.runtime.errors import BundleError, UsageError
from darcnn.runtime.segmenter import Segmenter

__all__ = ["find_bundle", "load", "names_bundle", "shipped_models"]

_SUFFIX = ".darcnn"


def load(
    name_or_path: str | Path,
    *,
    device: str = "auto",
    backend: str = "auto",
    min_score: float | None = None,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda words: None,
    engine: str | Path | None = None,
) -> Segmenter:
    """Return a segmenter, ready to run; a context manager that owns its engine.

    Args:
        name_or_path: one of `shipped_models()`, or the path of a .darcnn file.
        device: "cpu", "cuda", or "auto": CUDA where it serves, else the CPU.
        backend: "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", or "auto": a compiled TensorRT engine
            where one fits the GPU, else ONNX Runtime; that of `engine` where it is given.
        threads: that compute on a CPU; None: one a core that this process may use.
        min_score: objects below it are not reported; None takes the model's own.
        tell: is told in a line each what runs, and why what would be faster does not.
        engine: the folder that `darcnn-export engine --out` wrote of this model; None: of those in the user's
            cache one that fits.
    Raises:
        BundleError: no such model, or the file cannot be used.
        DeviceError: the device or the engine does not serve.
        UsageError: no such device or backend, none that runs `engine`, or `min_score` is not between 0 and 1.
    """
    if min_score is not None and not 0 <= min_score <= 1:
        raise UsageError(f"{min_score} is not a score", where="--min-score", fix="give a number from 0 to 1")
    bundle = find_bundle(name_or_path)
    opened = open_engine(
        bundle,
        device=device,
        backend=backend,
        threads=threads,
        tell=tell,
        engine=None if engine is None else Path(engine),
    )
    return Segmenter(opened, bundle.manifest, min_score=min_score)


def find_bundle(name_or_path: str | Path) -> Bundle:
    """Return the verified bundle of a shipped model, or the one at a path; shipped names go first.

    Raises:
        BundleError: no such model, or the file cannot be used.
    """
    shipped = shipped_models()
    if isinstance(name_or_path, str) and name_or_path in shipped:
        entry = resources.files("darcnn.runtime").joinpath("models", name_or_path + _SUFFIX)
        with resources.as_file(entry) as path:
            return open_bundle(path)
    path = Path(name_or_path)
    if path.suffix == _SUFFIX or os.path.exists(path):  # noqa: PTH110  # raises of no name
        return open_bundle(path)
    names = ", ".join(shipped) or "none"
    raise BundleError(
        "no such model", where=path, fix=f"name one that is shipped ({names}) or the path of a .darcnn file"
    )


def names_bundle(text: str) -> bool:
    """Tell whether `text` is the name of a shipped model, or ends as the path of a bundle does."""
    return text.endswith(_SUFFIX) or text in shipped_models()


def shipped_models() -> tuple[str, ...]:
    """Return the names of the models that come with the package, sorted."""
    folder = resources.files("darcnn.runtime").joinpath("models")
    if not folder.is_dir():
        return ()
    names = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))
