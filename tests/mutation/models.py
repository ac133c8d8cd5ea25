"""Tiny random models of every family, as the tests' fixtures make them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import families
from nuwa.stage1.learnpruner import Lpm, save_lpm
from nuwa.vlm import adapt


def tiny_models(wanted: Collection[str] | None = None) -> dict[str, tuple[Any, Any]]:
    """Model type → model and processor; of all families where none is named."""
    made = {"llava": families.tiny_llava, "llava_next": families.tiny_next, "qwen2_5_vl": families.tiny_qwen}
    adapters = {name: make() for name, make in made.items() if name in (wanted or made)}
    return {name: (adapter.model, adapter.processor) for name, adapter in adapters.items()}


def save_pruner(model: Any, processor: Any, path: Path) -> None:
    """Random weights of LearnPruner's module for the encoder of ``model``."""
    torch.manual_seed(3)
    lpm = Lpm(model.config.vision_config.hidden_size)
    with torch.no_grad():
        for parameter in lpm.parameters():
            parameter.normal_(0, 0.7)  # so that keep probabilities range from 0 to 1
    save_lpm(lpm, path, adapt(model, processor).encoder_fingerprint(), {})
