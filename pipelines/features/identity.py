"""What decides features: the model's files, how images are handed to its encoder, and the code that encodes.

Nothing is loaded: :mod:`nuwa.vlm.checkpoint` describes the files, and reads weights once a machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuwa.own_folder import own_folder
from nuwa.signals import SIGNAL_NAMES
from nuwa.vlm import ADAPTERS, Adapter
from nuwa.vlm.checkpoint import MEMORY, StoredTensors, read_checkpoint, weight_files
from nuwa.vlm.language import TEXT_FAMILIES
from nuwa.vlm.remembered import class_name
from pipelines.features.loading import AS_PUBLISHED, Loading, load_model
from pipelines.features.signals import signal_dtype

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]  # fetched of a model of the hub


@dataclass(frozen=True)
class Described:
    """A digest and what it is of: ``parts`` by the names that a person knows them by."""

    digest: str
    parts: Mapping[str, str]

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Described:
        """``parts`` are numbers, words or digests."""
        held = {name: str(parts[name]) for name in sorted(parts)}
        return cls(hashlib.sha256(json.dumps(held).encode()).hexdigest(), held)


@dataclass(frozen=True)
class ModelIdentity:
    """``encoder``: parts that decide signals; ``language``: parts that decide answers besides.

    ``fingerprint`` is what trained modules are tied to (:meth:`nuwa.vlm.Adapter.encoder_fingerprint`).
    """

    encoder: Mapping[str, str]
    language: Mapping[str, str]
    fingerprint: str

    @classmethod
    def of(cls, path: str, loading: Loading, vlm: Adapter, memory: Path = MEMORY) -> ModelIdentity:
        """Of the model at ``path``, whose shape and processor ``vlm`` has; raises ``CheckpointError``."""
        folder = model_folder(path)
        files = read_checkpoint(folder, memory)
        encoder = files.encoder | {
            "image processor's class": class_name(vlm.processor.image_processor),
            "model.dtype": loading.dtype,
            "model.image_aspect_ratio": loading.image_aspect_ratio,
        }
        if loading.image_rules != AS_PUBLISHED:
            encoder["model.image_rules"] = repr(loading.image_rules)
        language = files.language | {"model.conversation": loading.conversation}
        if loading.attention != "sdpa":
            language["model.attention"] = loading.attention
        # The shape of a product moves its last bits in half precision; in float32 no answer depends on it.
        if loading.dtype != "float32" and loading.pass_tokens is not None:
            language["model.pass_tokens"] = str(loading.pass_tokens)
        return cls(encoder, language, _fingerprint(folder, Described.of(encoder).digest, loading, vlm, memory))


def model_folder(path: str) -> Path:
    """Where the files of a folder's or the hub's model lie; those of the hub are fetched once."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, allow_patterns=MODEL_FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except LocalEntryNotFoundError:
        pass
    return Path(snapshot_download(path, allow_patterns=MODEL_FILES))


def _fingerprint(folder: Path, encoder: str, loading: Loading, vlm: Adapter, memory: Path) -> str:
    """From the files, once a machine and content."""
    library = importlib.metadata.version("transformers")  # whose defaults are part of it
    memo = own_folder(memory) / f"{encoder[:24]}-{library}.encoder"
    if memo.exists() and (held := memo.read_text()):
        return held
    if all(path.suffix == ".safetensors" for path in weight_files(folder)):
        fingerprint = loading.shape(str(folder), vlm).encoder_fingerprint(StoredTensors(folder))
    else:
        fingerprint = load_model(str(folder), "cpu", loading).encoder_fingerprint()
    with tempfile.NamedTemporaryFile("w", dir=memory, suffix=".tmp", delete=False) as sink:
        sink.write(fingerprint)
    os.replace(sink.name, memo)
    return fingerprint


def model_type(vlm: Adapter) -> str:
    """The name of an adapter among all adapters."""
    return next(name for name, family in ADAPTERS.items() if family is type(vlm))


def code_names(model: str, language: str | None = None) -> dict[str, list[str]]:
    """Which entries of registries code runs on a model of these types; ``language``: null where it does not answer."""
    return {
        "model type": [model],
        TEXT_FAMILIES.kind: [] if language is None else [language],
        "stage-1 method": [],
        "stage-2 scorer": [],
        "method": [],
        "benchmark": [],
    }


def code_by_file(pieces: Mapping[str, str]) -> dict[str, str]:
    """A closure's digests gathered by file: ``code of nuwa/grid.py``."""
    files: dict[str, list[str]] = {}
    for name in sorted(pieces):
        files.setdefault(f"code of {_place(name)}", []).append(pieces[name])
    return {name: hashlib.sha256("".join(digests).encode()).hexdigest() for name, digests in files.items()}


def _place(piece: str) -> str:
    """The file that a piece of a closure stands in; of a registry's entry its name."""
    module, _, name = piece.partition(":")
    if module not in sys.modules:
        return f"the {module} {name}"
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if hasattr(sys.modules[module], "__path__") else f"{path}.py"


def stored_signals(dtype: str, keep: Iterable[str] = SIGNAL_NAMES) -> dict[str, str]:
    """Which signals a store keeps, and in what."""
    return {f"features.{name}": str(signal_dtype(name, dtype)) for name in keep}
