"""A method that keeps the tokens with the longest features, a scorer, and a benchmark of a table of one's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nuwa.benchmarks import register_benchmark
from nuwa.benchmarks.own_tables import own_benchmark
from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, top_indices
from nuwa.stage1 import register
from nuwa.stage2 import CutEvidence, register_scorer


@dataclass(frozen=True)
class Loudest:
    """``power``: exponent of the norm."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"loudest.power {self.power:g} must be positive")


@register("loudest", Loudest)
def select(signals: VisionSignals, keep: int, config: Loudest, seed: int = 0) -> Selection:
    """The tokens whose features are longest."""
    return keep_unmerged(signals, top_indices(loudness(signals.features, config.power), keep))


def loudness(vectors: Tensor, power: float) -> Tensor:
    """``(batch, tokens)``."""
    return vectors.float().norm(dim=-1) ** power


@register_scorer("loudest_value", reads_attention=False)
def loudest_value(evidence: CutEvidence) -> Tensor:
    """Length of a visual token's values at the layer before the cut."""
    values = evidence.projections("visual", False, False).value
    return loudness(values.transpose(1, 2).flatten(2), 1.0)


register_benchmark(own_benchmark("clocks", "Clocks", "exact"))
