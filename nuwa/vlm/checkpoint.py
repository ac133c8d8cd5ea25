"""What a model is, from its files: no weights are loaded, and each is read once a machine.

A checkpoint is described by *parts*: what each is called → the digest of its meaning. Weights count tensor by tensor, as
they are stored, under the names that every version of transformers agrees on, however they are cut into files. JSON
counts by what it says: key order, spacing and who wrote it do not. Other files, such as a README, do not count.

What tensors digest to is remembered beside the size and time stamp of their file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from nuwa.errors import UserError
from nuwa.own_folder import own_folder

MEMORY = Path(tempfile.gettempdir()) / f"nuwa-models-{os.getuid()}"  # what weights digest to, on each machine
ENCODERS = ("vision_tower.", "visual.", "vision_model.")  # canonical beginnings of an encoder's tensors
# Keys of config.json that decide an encoder's signals and the layout of an image.
VISION_KEYS = (
    "model_type",
    "vision_config",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_grid_pinpoints",
    "downsample_ratio",
    "scale_factor",
)
# What decides them besides in families whose signals stand behind the projector: tensors and keys, by model_type.
BEHIND_PROJECTOR = {
    "llava_onevision": (
        ("multi_modal_projector.",),
        ("vision_aspect_ratio", "projector_hidden_act", "multimodal_projector_bias"),
    )
}
# Keys that say where a file comes from or how it was saved; models are loaded in a dtype of our own choosing. In a
# vocabulary they are words like any other.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
PROVENANCE = {
    "_commit_hash",
    "_from_model_config",
    "_name_or_path",
    "architectures",
    "dtype",
    "name_or_path",
    "torch_dtype",
    "transformers_version",
}
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)
TEXTS = ("merges.txt", "tokenizer.model", "chat_template.jinja")  # by their bytes
CHUNK = 16 * 1024**2


class CheckpointError(UserError, ValueError):
    """A model folder that lacks what makes it a model, or holds a file that cannot be read."""


class Checkpoint(NamedTuple):
    """``encoder``: parts that decide an image's signals. ``language``: those that decide answers besides."""

    encoder: dict[str, str]
    language: dict[str, str]


def canonical_name(name: str) -> str:
    """A tensor's name as all versions of transformers would agree on it."""
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name).removeprefix("model.")
    name = re.sub(r"^(layers|embed_tokens|norm)\.", r"language_model.\1.", name)
    return name.replace("vision_tower.vision_model.", "vision_tower.", 1)


def read_checkpoint(folder: Path, memory: Path = MEMORY) -> Checkpoint:
    """The parts of the model in ``folder``; raises :class:`CheckpointError`. ``memory``: where digests are kept."""
    tensors = _tensors(folder, memory)
    config = _meaning(folder, "config.json")
    if config is None:
        raise CheckpointError(f"{folder}/config.json: no such file; name a folder that holds a model")
    further, keys = BEHIND_PROJECTOR.get(config.get("model_type"), ((), ()))
    encoder, language = _weights(tensors, (*ENCODERS, *further))
    seen = {key: config[key] for key in (*VISION_KEYS, *keys) if key in config}
    encoder["config.json (vision)"] = _digest(seen)
    language["config.json"] = _digest({key: value for key, value in config.items() if key not in seen})

    # Older checkpoints keep the image processor in a file of its own, newer ones inside the processor's; where both are,
    # transformers obeys the inner one.
    processor = _meaning(folder, "processor_config.json") or {}
    own = _meaning(folder, "preprocessor_config.json")
    inner = processor.pop("image_processor", None)
    encoder["preprocessor_config.json"] = _digest(own if inner is None else inner)
    language["processor_config.json"] = _digest(processor)

    for name in ("generation_config.json", *TOKENIZER):
        content = _meaning(folder, name)
        if content is not None:
            language[name] = _digest(content)
    for name in TEXTS:
        if (folder / name).is_file():
            language[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return Checkpoint(encoder, language)


def _meaning(folder: Path, name: str) -> Any:
    """A JSON file's content without provenance; null where there is none."""
    try:
        content = json.loads((folder / name).read_text())
        return content if name in VOCABULARIES else _without_provenance(content)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}/{name}: no readable JSON ({error}); fetch the file again") from None


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_provenance(one) for key, one in value.items() if key not in PROVENANCE}
    return [_without_provenance(one) for one in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# Weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, else those of torch's own format; raises :class:`CheckpointError`."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors and no pytorch_model*.bin; name a folder that holds a model")
    return files


def _tensors(folder: Path, memory: Path) -> dict[str, str]:
    """Canonical name → digest, of all files."""
    tensors: dict[str, str] = {}
    for name, digests in _remembered_digests(folder, memory).items():
        for tensor, digest in digests.items():
            if tensors.setdefault(tensor, digest) != digest:
                raise CheckpointError(f"{folder}/{name}: tensor {tensor} stands in another file too, with other values")
    return tensors


def _weights(tensors: Mapping[str, str], beginnings: tuple[str, ...]) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of the encoder's tensors, whose names have one of these ``beginnings``, and that of all others."""
    whole_files = {name: digest for name, digest in tensors.items() if name.endswith(".bin")}
    seen = {name: digest for name, digest in tensors.items() if name.startswith(beginnings)} | whole_files
    rest = {name: digest for name, digest in tensors.items() if name not in seen}
    return {"weights of the encoder": _digest(seen)}, {"weights": _digest(rest)}


def _remembered_digests(folder: Path, memory: Path) -> dict[str, dict[str, str]]:
    """File → tensor → digest; a file that is as it was is not read."""
    memo = own_folder(memory) / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    try:
        held = json.loads(memo.read_text())
    except (OSError, ValueError):
        held = {}
    fresh: dict[str, Any] = {}
    for path in weight_files(folder):
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = held.get(path.name)
        fresh[path.name] = known if known and known[0] == stamp else [stamp, _tensor_digests(path)]
    if fresh != held:
        keep_json(memo, fresh)
    return {name: digests for name, (_, digests) in fresh.items()}


def keep_json(memo: Path, content: Any) -> None:
    """Whole or not at all; a place that cannot be written to costs the next run some reading."""
    own_folder(memo.parent)
    try:
        with tempfile.NamedTemporaryFile("w", dir=memo.parent, suffix=".tmp", delete=False) as sink:
            json.dump(content, sink)
        os.replace(sink.name, memo)
    except OSError:
        return


def _tensor_digests(path: Path) -> dict[str, str]:
    """Canonical name → digest of dtype, shape and bytes; a file that is no safetensors counts whole, by its name."""
    if path.suffix != ".safetensors":
        with open(path, "rb") as content:
            return {path.name: hashlib.file_digest(content, "sha256").hexdigest()}
    try:
        return dict(_read_digests(path))
    except (ValueError, KeyError, TypeError, struct.error, OSError) as error:
        raise CheckpointError(f"{path}: no readable safetensors ({error}); fetch the file again") from None


def _read_digests(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as content:
        (length,) = struct.unpack("<Q", content.read(8))
        header: dict[str, dict[str, Any]] = json.loads(content.read(length))
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = tensor["data_offsets"]
            digest = hashlib.blake2b(f"{tensor['dtype']} {tensor['shape']}".encode(), digest_size=20)
            content.seek(8 + length + start)
            while start < end:
                block = content.read(min(CHUNK, end - start))
                if not block:
                    raise ValueError(f"tensor {name} is cut off")
                digest.update(block)
                start += len(block)
            yield canonical_name(name), digest.hexdigest()


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors by canonical name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, tuple[Path, str]] = {}
        for path in weight_files(folder):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as content:
                    self._places |= {canonical_name(name): (path, name) for name in content.keys()}  # noqa: SIM118 (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._places[name]
        with safe_open(path, "pt") as content:
            return content.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def module_tensors(model: torch.nn.Module, part: torch.nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of ``part`` of a ``model`` without weights, as loading it from ``stored`` would fill it.

    Raises :class:`CheckpointError` naming a tensor that the files lack.
    """
    prefix = next(name for name, module in model.named_modules() if module is part)
    state = {}
    for name, empty in part.state_dict().items():
        try:
            state[name] = stored[canonical_name(f"{prefix}.{name}")].to(empty.dtype)
        except KeyError:
            raise CheckpointError(
                f"the model's files lack the tensor {prefix}.{name}; fetch the checkpoint again"
            ) from None
    return state
