"""Processors of checkpoints, by the backend that is asked for and no other."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from nuwa.errors import in_one_line
from nuwa.image_rules import ImageRulesError


def load_processor(path: Any, backend: str = "pil", **options: Any) -> Any:
    """The processor of a folder or hub id, whose images ``backend`` resizes whatever else is installed.

    Raises:
        ImageRulesError: ``torchvision`` is not installed, or is not of this build of torch.
    """
    from transformers.utils import is_torchvision_available

    try:
        from transformers import AutoImageProcessor, AutoProcessor
    except ImportError:
        check_torchvision()
        raise

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


def check_torchvision() -> None:
    """Say so where torchvision is installed and cannot be imported: transformers then imports next to nothing, whatever
    the backend. ``pip install torchvision`` takes PyPI's wheels, which are of torch's CUDA build alone.

    Raises:
        ImageRulesError: it is of another build of torch.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        import torch

        raise ImageRulesError(
            f"torchvision is installed, but not for this torch ({torch.__version__}): {in_one_line(error)}; install the "
            "wheel of the same build, or uninstall it where no model needs it"
        ) from None
