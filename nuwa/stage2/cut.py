"""One cut inside the language model."""

from __future__ import annotations

from typing import NamedTuple

from nuwa.stage2.recycling import Recycling
from nuwa.stage2.scorers import Scorer


class Cut(NamedTuple):
    """Before ``layer`` only ``keep`` visual tokens go on: the best by ``scorer``, recycled ones among them.

    ``trims``: whether generated tokens see only these in the layers below, too; the prompt has seen all.
    """

    layer: int
    keep: int
    scorer: Scorer
    recycling: Recycling | None = None
    trims: bool = False
