"""What a store keeps of an image: which signals, in which dtype, how many bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nuwa.layout import VisualLayout
from nuwa.signals import ATTENTION_SIGNALS
from pipelines.settings import FeatureSettings


def signal_dtype(name: str, dtype: str) -> torch.dtype:
    """What a store of ``dtype`` keeps a signal in: shares of attention always in float32.

    They are one number a token, and among thousands of tokens they fall below what float16 holds in full precision.
    """
    return torch.float32 if name in ATTENTION_SIGNALS else getattr(torch, dtype)


def signal_bytes(widths: Mapping[str, int], layout: VisualLayout, settings: FeatureSettings) -> int:
    """Bytes the store takes for one image of ``layout``; ``widths`` as of :meth:`nuwa.vlm.Adapter.signal_widths`."""
    return layout.patches * sum(
        widths.get(name, 1) * signal_dtype(name, settings.dtype).itemsize for name in settings.keep
    )
