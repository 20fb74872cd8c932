"""An engine that finds dark squares on stained slides, for tests; workers import it by its name."""

import numpy as np

from darcnn.runtime.engines.oracle import OracleEngine

CELL_PX = 16


class DarkEngine(OracleEngine):
    """Reports dark squares of 16 px of stained tissue: no model, but real pixels."""

    def detect(self, tiles):
        n, side = tiles.shape[0], tiles.shape[1] // CELL_PX
        dark = tiles.reshape(n, side, CELL_PX, side, CELL_PX, 3).mean(axis=(2, 4, 5)) < 110
        row, column = np.ogrid[:side, :side]
        squares = (dark * (1 + row % 2 + 2 * (column % 2))).astype(np.uint8)  # neighbours differ
        labels = np.repeat(np.repeat(squares, CELL_PX, 1), CELL_PX, 2)
        return super().detect(np.stack([labels, labels * 0, labels * 0], axis=3))
