"""What is left of a run's time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds left of a run, dealt out to its parts by weight; what a part leaves over goes to the later ones."""

    def __init__(self, seconds: float, weights: dict[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.weights = now, dict(weights)
        self.end = self.part_end = now() + seconds

    def begin(self, part: str) -> None:
        """Give ``part`` its share of the time that is left."""
        share = self.weights[part] / sum(self.weights.values())
        del self.weights[part]
        self.part_end = self.now() + share * (self.end - self.now())

    @property
    def left(self) -> float:
        """Seconds left to the part that has begun; below zero where it ran over."""
        return self.part_end - self.now()
