from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder(tiny_vlm, tmp_path_factory) -> Path:
    """A random model and its processor on disk, as any user's model would be."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_vlm.model.save_pretrained(folder)
    tiny_vlm.processor.save_pretrained(folder)
    return folder
