"""Nüwa as a model of the harnesses that people already use, one file each; none of them is needed otherwise."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval reads at the entry point ``lmms_eval.models``: under which name which class is found."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="nuwa", simple_class_path="nuwa.integrations.lmms_eval.Nuwa")
