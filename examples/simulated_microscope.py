"""A microscope that is not there: real fluorescence fields under a stage, a turret and a camera of Python.

It stands in for a Micro-Manager configuration where there is no hardware: the devices are Python devices of
pymmcore-plus (`pymmcore_plus.experimental.unicore`), the core that drives them is the real one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pymmcore_plus.experimental.unicore import SimpleCameraDevice, StateDevice, UniMMCore, XYStageDevice

FIELD_PX = 192  # the camera is square
SPECIMEN_UM = 0.5  # micrometres per pixel of the specimen
OBJECTIVES = {"10x": 2, "20x": 1}  # pixels of the specimen that one pixel of the camera averages, each way


class Stage(XYStageDevice):
    """Goes where it is told at once; (0, 0) is the middle of the specimen."""

    def __init__(self) -> None:
        super().__init__()
        self.at = (0.0, 0.0)

    def set_position_um(self, x: float, y: float) -> None:
        self.at = (x, y)

    def get_position_um(self) -> tuple[float, float]:
        return self.at

    def set_origin_x(self) -> None:
        raise NotImplementedError

    def set_origin_y(self) -> None:
        raise NotImplementedError

    def home(self) -> None:
        self.at = (0.0, 0.0)

    def stop(self) -> None:
        """Nothing moves."""


class Turret(StateDevice):
    """Two objectives."""

    def __init__(self) -> None:
        self.state = 0
        super().__init__(dict(enumerate(OBJECTIVES)))

    def get_state(self) -> int:
        return self.state

    def set_state(self, position: int) -> None:
        self.state = position

    @property
    def averages(self) -> int:
        """How many pixels of the specimen one pixel of the camera sees, each way."""
        return list(OBJECTIVES.values())[self.state]


class Camera(SimpleCameraDevice):
    """Sees the specimen where the stage is, 12 bits, black beyond its edges."""

    def __init__(self, specimen: NDArray[np.uint16], stage: Stage, turret: Turret) -> None:
        super().__init__()
        self._specimen, self._stage, self._turret = specimen, stage, turret
        self._exposure = 10.0

    def get_exposure(self) -> float:
        return self._exposure

    def set_exposure(self, exposure: float) -> None:
        self._exposure = exposure

    def dtype(self) -> Any:
        return np.uint16

    def sensor_shape(self) -> tuple[int, int]:
        return (FIELD_PX, FIELD_PX)

    def snap(self, buffer: NDArray[Any]) -> Mapping[str, Any]:
        n = self._turret.averages
        side = FIELD_PX * n
        height, width = self._specimen.shape
        x0, y0 = (
            round(extent / 2 + at / SPECIMEN_UM - side / 2)
            for extent, at in zip((width, height), self._stage.at, strict=True)
        )
        seen = np.zeros((side, side), np.float64)
        inside = self._specimen[max(0, y0) : max(0, y0 + side), max(0, x0) : max(0, x0 + side)]
        top, left = max(0, -y0), max(0, -x0)
        seen[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
        buffer[:] = seen.reshape(FIELD_PX, n, FIELD_PX, n).mean(axis=(1, 3))
        return {}


def make_specimen(images: Path) -> NDArray[np.uint16]:
    """Return 768 x 768 px: the fields of U2OS nuclei under `images` (BBBC038), side by side and turned."""
    paths = sorted(path for path in images.rglob("u2os_*.png") if path.parent.name != "labels")
    fields = [np.asarray(Image.open(path).convert("L")) for path in paths]
    rng = np.random.default_rng(0)
    rows = [
        np.hstack([np.rot90(fields[rng.integers(len(fields))], rng.integers(4)) for _ in range(6)])
        for _ in range(6)
    ]
    return np.vstack(rows).astype(np.uint16) * 16


def pixel_size_um(objective: str) -> float:
    """Return micrometres per pixel of the camera behind an objective."""
    return SPECIMEN_UM * OBJECTIVES[objective]


def open_microscope(specimen: NDArray[np.uint16]) -> UniMMCore:
    """Return a core with the stage, the turret and the camera, ready to acquire."""
    core = UniMMCore(mm_path=str(Path(__file__).parent))  # no device adapters: nothing to look for
    stage, turret = Stage(), Turret()
    for label, device in (("XY", stage), ("Turret", turret), ("Camera", Camera(specimen, stage, turret))):
        core.loadPyDevice(label, device)
        core.initializeDevice(label)
    core.setXYStageDevice("XY")
    core.setCameraDevice("Camera")
    core.setExposure(10)
    core.setAutoShutter(False)  # there is no shutter
    return core
