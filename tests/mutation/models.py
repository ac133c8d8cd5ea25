"""Tiny random models of every family, as the tests' fixtures make them."""

from __future__ import annotations

from typing import Any

import tiny_families
from conftest import tiny_vlm


def tiny_models() -> dict[str, tuple[Any, Any]]:
    """Model type → model and processor."""
    fixtures = {"llava": tiny_vlm, "llava_next": tiny_families.tiny_next, "qwen2_5_vl": tiny_families.tiny_qwen}
    adapters = {name: fixture.__wrapped__() for name, fixture in fixtures.items()}
    return {name: (adapter.model, adapter.processor) for name, adapter in adapters.items()}
