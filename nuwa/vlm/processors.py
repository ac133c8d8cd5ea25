"""Processors of checkpoints, by the backend that is asked for and no other."""

from __future__ import annotations

from typing import Any

from nuwa.image_rules import ImageRulesError


def load_processor(path: Any, backend: str = "pil", **options: Any) -> Any:
    """The processor of a folder or hub id, whose images ``backend`` resizes whatever else is installed.

    Raises:
        ImageRulesError: ``torchvision`` is not installed.
    """
    from transformers import AutoImageProcessor, AutoProcessor
    from transformers.utils import is_torchvision_available

    if backend == "torchvision" and not is_torchvision_available():
        raise ImageRulesError(
            "image_backend 'torchvision' needs torchvision, which is not installed (its wheels must be of this torch); "
            "install it or choose pil"
        )
    processor = AutoProcessor.from_pretrained(path, **options)
    by_pil = type(processor.image_processor).__name__.endswith("Pil")
    if is_torchvision_available() and by_pil != (backend == "pil"):
        processor.image_processor = AutoImageProcessor.from_pretrained(path, backend=backend, **options)
    return processor
