"""FasterVLM (arXiv 2412.01818, first version): the tokens to which the encoder's CLS token attends most. No merging.

Released code: github.com/Theia-4869/FasterVLM. Nothing deviates on one grid. On LLaVA-NeXT the released code prunes every
crop by itself, here the stitched local grid is one view, as for every method.
"""

from __future__ import annotations

from dataclasses import dataclass

from nuwa.selection import Selection, keep_unmerged
from nuwa.signals import VisionSignals, top_indices
from nuwa.stage1.registry import register


@dataclass(frozen=True)
class FasterVLM:
    """No hyper-parameters."""


@register(
    "fastervlm",
    FasterVLM,
    cite=("fastervlm",),
    presets={"released": {}},
    reads_cls=True,
    reads=lambda config: ("features", "cls_attention"),
)
def select(signals: VisionSignals, keep: int, config: FasterVLM, seed: int = 0) -> Selection:
    """The ``keep`` largest of ``cls_attention``, in raster order."""
    return keep_unmerged(signals, top_indices(signals.cls_attention.float(), keep))
