"""How weights of losses and learning rates move, and when a stage has plateaued."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["PlateauProgress", "PlateauRule", "learning_rate_factor", "similarity_weight"]


def similarity_weight(step: int, *, first: float, rise_steps: int) -> float:
    """Return alpha of DARCNN, equation (1): from `first` to 1 over `rise_steps` steps, then 1.

    >>> [similarity_weight(step, first=0.1, rise_steps=10) for step in (0, 5, 10, 99)]
    [0.1, 0.55, 1.0, 1.0]
    """
    if step >= rise_steps:
        return 1.0
    return first + (1.0 - first) * step / rise_steps


def learning_rate_factor(step: int, *, warm_up: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up, then a cosine down to a twentieth.

    >>> [round(learning_rate_factor(s, warm_up=10, steps=110), 3) for s in (0, 9, 10, 60, 110)]
    [0.1, 1.0, 1.0, 0.525, 0.05]
    """
    if step < warm_up:
        return (step + 1) / warm_up
    progress = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(slots=True)
class PlateauProgress:
    """What a plateau rule remembers between steps; goes into checkpoints."""

    best: float = math.inf
    best_step: int = 0
    weighted_sum: float = 0.0
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class PlateauRule:
    """Tell while training when the smoothed loss has stopped falling.

    DARCNN, section 4 stops "0.1 epochs before the loss plateaus". Deviation: that needs the future.
    Here the exponential average of the loss must improve by `least_gain` (relative) within `patience`
    steps; `best_step` is the step of the best average, whose weights are the ones to keep. With
    `settle_steps`, that many first steps do not count, since alpha still rises and the loss with it,
    nor do those that follow until the average is full.
    """

    patience: int
    settle_steps: int = 0
    least_gain: float = 0.01
    smoothing: float = 0.98
    progress: PlateauProgress = field(default_factory=PlateauProgress)

    @property
    def best_step(self) -> int:
        """The last step at which the average had improved enough."""
        return self.progress.best_step

    def update(self, step: int, loss: float) -> bool:
        """Take the loss of `step`; return True when training has plateaued."""
        now = self.progress
        filled = self.settle_steps + round(1.0 / (1.0 - self.smoothing)) if self.settle_steps else 0
        if step < filled:
            now.best_step = step
        if step < self.settle_steps:
            return False
        now.weighted_sum = self.smoothing * now.weighted_sum + (1.0 - self.smoothing) * loss
        now.weight = self.smoothing * now.weight + (1.0 - self.smoothing)
        average = now.weighted_sum / now.weight  # unbiased from the first step on
        if step >= filled and average < now.best * (1.0 - self.least_gain):
            now.best, now.best_step = average, step
        return step - now.best_step >= self.patience
