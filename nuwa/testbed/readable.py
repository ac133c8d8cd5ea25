"""The testbed's files as other programs read them: tensor names of the model, and types that ``datasets`` shows as images."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def rename_tower(folder: Path) -> None:
    """Give the vision tower's tensors the names that published LLaVA checkpoints have (``vision_tower.vision_model.…``).

    transformers reads both, but writes names without the middle part, which vLLM and older releases do not know. What a
    tensor is called does not count towards a model's identity (:func:`nuwa.vlm.checkpoint.canonical_name`).
    """
    held = load_file(folder / WEIGHTS)
    renamed = {
        re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): held[name] for name in held
    }
    if renamed.keys() != held.keys():
        fresh = folder / f".{WEIGHTS}.tmp"
        save_file(renamed, fresh, metadata={"format": "pt"})
        fresh.chmod((folder / WEIGHTS).stat().st_mode)  # safetensors lets nobody else read what it writes
        os.replace(fresh, folder / WEIGHTS)


def with_features(schema: pa.Schema) -> pa.Schema:
    """``schema`` with the metadata by which the ``datasets`` library knows an image from a struct."""
    features = {field.name: _feature(field.type) for field in schema}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, Any]:
    if pa.types.is_struct(kind):
        names = {field.name for field in kind}
        if names == {"bytes", "path"}:
            return {"_type": "Image"}
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}  # of every release; newer ones say List
    return {"dtype": {"float": "float32", "double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
