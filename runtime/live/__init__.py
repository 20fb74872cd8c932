"""The engine inside programs that acquire images: frames in, objects out, nothing on disk."""

from darcnn.runtime.live.calibration import Calibration
from darcnn.runtime.live.mosaic import Mosaic
from darcnn.runtime.live.mosaic_grid import MosaicGrid
from darcnn.runtime.live.segmenter import LiveSegmenter
from darcnn.runtime.live.stats import LiveStats, StageTimes
from darcnn.runtime.live.ticket import FrameDroppedError, LiveResult, Ticket
from darcnn.runtime.live.visits import CameraAxes

__all__ = [
    "Calibration",
    "CameraAxes",
    "FrameDroppedError",
    "LiveResult",
    "LiveSegmenter",
    "LiveStats",
    "Mosaic",
    "MosaicGrid",
    "StageTimes",
    "Ticket",
]
