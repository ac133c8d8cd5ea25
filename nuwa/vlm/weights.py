"""Whether a folder's weights are whole, from names, sizes and headers alone: nothing is guessed, and no tensor is read.

A checkpoint that lacks tensors is no error to ``from_pretrained``: it fills them at random and says so in a table among
its messages. Here the files are compared with their index and with their own headers, and a *dry load*, transformers'
own loader on tensors without storage, says which tensors the model would lack: with its renames, its tied heads, its
list of names that do not count. ``deep`` also reads all tensors and refuses numbers that are not finite.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nuwa.vlm.checkpoint import CheckpointError, canonical_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
POINTER = b"version https://git-lfs.github.com/spec/"
ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1},
}
FLOATS = ("F64", "F32", "F16", "BF16")  # weights in any other type belong to quantised models
TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in torch's messages
NAMED = 3  # names in a message; the others are counted


def check_weights(folder: Path, model_class: type[PreTrainedModel], config: Any, *, deep: bool = False) -> None:
    """Refuse ``folder`` unless its files hold every tensor that ``model_class`` of ``config`` has, in its shape.

    ``deep``: read all tensors and refuse those with numbers that are not finite.

    Raises:
        CheckpointError: names the file or the first tensors concerned and what to do.
    """
    from transformers.utils import is_accelerate_available

    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _empty_tensors(path)
    _check_apart(folder, files)
    _check_index(folder, tensors)
    if is_accelerate_available():  # the dry load needs it; without it the loader's own report speaks, after loading
        try:
            report = _dry_load(model_class, config, tensors)
        except Exception as error:  # of whatever kind: the values in config.json make no model
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise CheckpointError(
                f"{folder / 'config.json'}: no model can be made of it ({words}); fetch it again"
            ) from None
        check_report(folder, report)
    if deep:
        for path in files:
            _check_finite(path)


def check_report(source: str | Path, report: Mapping[str, Any]) -> None:
    """Refuse a model whose loading report (``output_loading_info``) tells of tensors that are not the checkpoint's.

    Raises:
        CheckpointError: names the first missing, mis-shaped or unexpected tensors.
    """
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{source}: {_count(missing, 'tensor')} of the model missing from its files: {_names(missing)}; "
            "fetch the checkpoint again"
        )

    if mismatched := sorted(report["mismatched_keys"]):
        name, held, needed = mismatched[0]
        raise CheckpointError(
            f"{source}: {_count(mismatched, 'tensor')} of another shape than config.json says, first {name}: "
            f"{_shape(held)} instead of {_shape(needed)}; fetch config.json and weights of one checkpoint"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        raise CheckpointError(
            f"{source}: {_count(unexpected, 'tensor')} that the model of config.json does not have: "
            f"{_names(unexpected)}; fetch config.json and weights of one checkpoint"
        )

    if report.get("error_msgs"):
        raise CheckpointError(f"{source}: {' '.join(str(report['error_msgs'][0]).split())}")


def weight_files(folder: Path) -> list[Path]:
    """The files that ``from_pretrained`` would read, all of them there.

    Raises:
        CheckpointError: no weights, or a part that the index names is missing.
    """
    for name in (WEIGHTS, f"{WEIGHTS}.index.json", PICKLED, f"{PICKLED}.index.json"):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path}: a link to {path.readlink()}, which is not there; fetch it again")
        if not path.exists():
            continue
        if not name.endswith(".json"):
            return [path]

        parts = sorted(set(_index(path).values()))
        for part in parts:
            if not (folder / part).is_file():
                raise CheckpointError(f"{folder / part}: no such file, but {name} names it; fetch it again")
        return [folder / part for part in parts]

    others = sorted(
        path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    )
    hint = f" ({', '.join(others[:NAMED])} is not one that transformers loads)" if others else ""
    raise CheckpointError(f"{folder}: no {WEIGHTS} or {WEIGHTS}.index.json{hint}; fetch the checkpoint's weights")


def stored_numbers(folder: Path) -> int | None:
    """How many numbers the weights in ``folder`` are, by the headers of its files; null where they have none."""
    files = weight_files(folder)
    if any(path.suffix != ".safetensors" for path in files):
        return None
    return sum(tensor.numel() for path in files for tensor in _safetensors_header(path).values())


def shape_numbers(model_class: type[PreTrainedModel], config: Any) -> int:
    """How many numbers the weights of a configuration are."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(config).parameters())


def refuse_pointer(path: Path) -> None:
    """Raises :class:`CheckpointError` for a file that only points to where git-lfs keeps the content, and for what is no
    file, such as a pipe, to which nothing may ever write."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise CheckpointError(f"{path}: no file but a pipe or a device; fetch the file")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise CheckpointError(
                f"{path}: a git-lfs pointer of {path.stat().st_size} bytes, not the file; `git lfs pull` fetches it"
            )


def _index(path: Path) -> dict[str, str]:
    refuse_pointer(path)
    try:
        held = json.loads(path.read_text())
        names = held["weight_map"]
        named = names and all(isinstance(part, str) and Path(part).name == part for part in names.values())
        if named and isinstance(held["metadata"], dict):  # transformers asks for both
            return names
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"{path}: no index of weights (weight_map: tensor → file, and metadata); fetch it again")


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    path = folder / f"{WEIGHTS}.index.json"
    if not path.exists() or (folder / WEIGHTS).exists():
        return
    names = _index(path)
    if lost := sorted(set(names) - set(tensors)):
        raise CheckpointError(
            f"{folder / names[lost[0]]}: {_count(lost, 'tensor')} that {path.name} names missing: {_names(lost)}; "
            "fetch the file again"
        )


def _check_apart(folder: Path, files: list[Path]) -> None:
    """Refuse a tensor that two files hold with other values each, one of ``files`` or what lies beside them: a model is
    identified by all files of weights in its folder."""
    beside = sorted(set(folder.glob("*.safetensors")) - set(files))
    if beside and files[0].suffix == ".bin":
        raise CheckpointError(
            f"{beside[0]}: transformers loads {files[0].name} and not this file, so which one is meant is open; move one away"
        )

    holder: dict[str, tuple[Path, str]] = {}
    for path in [*files, *beside]:
        for name in _safetensors_header(path) if path.suffix == ".safetensors" else ():
            first, known = holder.setdefault(canonical_name(name), (path, name))
            if first != path and not _same_tensor(first, known, path, name):
                raise CheckpointError(
                    f"{path}: tensor {name} stands in {first.name} too, with other values; move the file that is not meant "
                    "away, or fetch both again"
                )


def _same_tensor(one: Path, name: str, other: Path, also: str) -> bool:
    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        return torch.equal(first.get_tensor(name), second.get_tensor(also))


def _empty_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name, without storage; raises :class:`CheckpointError` where the file is not whole."""
    refuse_pointer(path)
    return _pickled_tensors(path) if path.suffix == ".bin" else _safetensors_header(path)


def _pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in held.items()}
    except Exception as error:  # a damaged archive, an old format, anything but tensors
        reason = " ".join(COLOURS.sub("", str(error)).split())[:120]
        raise CheckpointError(f"{path}: no whole file of tensors ({reason}); fetch {WEIGHTS} instead") from None


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, HEADER_LIMIT):
            raise CheckpointError(f"{path}: {size} bytes, cut off within its header; fetch it again")
        content = file.read(length)

    try:
        entries = json.loads(content)
        entries.pop("__metadata__", None)
        shapes = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: its header is damaged; fetch it again") from None
    for name, (kind, shape, span) in shapes.items():
        if not (isinstance(kind, str) and _counts(shape) and _counts(span) and len(span) == 2):
            raise CheckpointError(f"{path}: its header is damaged at tensor {name}; fetch it again")

    end = 0
    for name, (kind, shape, (start, stop)) in sorted(shapes.items(), key=lambda item: item[1][2]):
        if (kind in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[kind]) or start != end:
            raise CheckpointError(f"{path}: its header is damaged at tensor {name}; fetch it again")
        end = stop
    if size != 8 + length + end:
        raise CheckpointError(f"{path}: {size} bytes, but its header tells of {8 + length + end}; fetch it again")
    quantised = sorted(name for name, (kind, *_) in shapes.items() if kind not in FLOATS and name.endswith("weight"))
    if quantised:
        kind = shapes[quantised[0]][0]
        raise CheckpointError(
            f"{path}: {quantised[0]} holds {kind} numbers, so the model is quantised, which is not supported; "
            "fetch the checkpoint in bfloat16, float16 or float32"
        )
    return {
        name: torch.empty(shape, dtype=TORCH_TYPES.get(kind, torch.uint8), device="meta")
        for name, (kind, shape, _) in shapes.items()
    }


def _counts(value: Any) -> bool:
    """Whether ``value`` is a list of sizes or places, and not of what only looks like them."""
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _dry_load(model_class: type[PreTrainedModel], config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    with _silent():
        _, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    return report


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' progress bar and its table of what is missing."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_finite(path: Path) -> None:
    for name, tensor in _tensors(path):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name} holds numbers that are not finite; fetch it again")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        yield from torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
        return
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}; fetch it again") from None


def _count(names: list, noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _names(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _shape(size: torch.Size) -> str:
    return "x".join(map(str, size)) or "one number"
