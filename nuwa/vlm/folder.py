"""A model folder, looked over before anything is loaded: every fault that can be known from its files, in one line each.

``check_folder`` refuses the first, ``folder_faults`` tells all. What is looked at: configuration (family, vision tower,
language model, features read), weights (:mod:`nuwa.vlm.weights`), processor and tokenizer, chat template, generation
settings. Kinds of folders that are not a model of transformers are told by name: LoRA adapters, LLaVA's original format,
quantised weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from nuwa.errors import UserError, in_one_line
from nuwa.vlm.adapter import (
    ENDS_THE_PROGRAM,
    Adapter,
    check_end_tokens,
    check_template,
    render_question,
    tokenize_prompt,
)
from nuwa.vlm.checkpoint import TEXTS, CheckpointError
from nuwa.vlm.generation_settings import check_generation, check_values
from nuwa.vlm.processors import check_torchvision
from nuwa.vlm.weights import check_weights, refuse_pointer

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
SHOWN = 80  # characters of a wrong value in a message
QUESTION = "what is on the left?"
PICTURE = (64, 48)  # width and height of what processors are tried on
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
ORIGINAL_LLAVA = ("llava_llama", "llava_mistral", "llava_mpt", "llava_qwen", "llava")


class ModelFolder(NamedTuple):
    """A folder whose configuration has been read."""

    path: Path
    config: Any
    family: type[Adapter]


def check_folder(path: Path, families: Callable[[str], type[Adapter]], *, deep: bool = False) -> None:
    """Refuse ``path`` unless it holds a whole model that is supported; see :func:`folder_faults`.

    Raises:
        CheckpointError: the first fault, in one line.
    """
    faults = list(folder_faults(path, families, deep=True)) if deep else _remembered(path, _stamp(path), families)
    if faults:
        raise CheckpointError(faults[0])


def folder_faults(path: Path, families: Callable[[str], type[Adapter]], *, deep: bool = False) -> Iterator[str]:
    """Every fault of a model folder. ``families``: model type → adapter; ``deep``: numbers that are not finite too."""
    try:
        folder = read_folder(path, families)
    except UserError as error:
        yield str(error)
        return
    except OSError as error:
        yield f"{error.filename or path}: {error.strerror or error}"
        return

    try:
        check_architecture(folder)
    except UserError as error:  # what else is wrong with such a folder follows from it
        yield str(error)
        return
    checks: list[Callable[[ModelFolder], object]] = [
        lambda folder: check_weights(folder.path, folder.family.model_class, folder.config, deep=deep),
        check_processor,
        check_settings,
    ]
    for check in checks:
        try:
            check(folder)
        except UserError as error:
            yield str(error)
        except OSError as error:
            yield f"{error.filename or path}: {error.strerror or error}"


@functools.lru_cache(maxsize=8)
def _remembered(path: Path, _stamp: tuple, families: Callable[[str], type[Adapter]]) -> list[str]:
    return list(folder_faults(path, families))


def _stamp(path: Path) -> tuple:
    """Tells a folder whose files have changed."""
    if not path.is_dir():
        return ()
    held = sorted((file.name, file.stat()) for file in path.iterdir() if file.is_file())
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in held)


def read_folder(path: Path, families: Callable[[str], type[Adapter]]) -> ModelFolder:
    """Configuration and family of a folder.

    Raises:
        CheckpointError: no folder, no readable ``config.json``, an adapter, an original LLaVA, quantised weights, or a
            model type of no family.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name one that holds a model")
    if (path / "adapter_config.json").exists():
        base = _json(path / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            f"{path}: a LoRA adapter of {base}, no model of its own; merge it first: peft's "
            "AutoPeftModel.from_pretrained(folder).merge_and_unload().save_pretrained(merged)"
        )
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path}: no config.json{_nested(path)}; fetch the whole checkpoint")

    raw = _json(path / "config.json")
    kind = raw.get("model_type")
    if "mm_vision_tower" in raw or (kind in ORIGINAL_LLAVA[:-1]) or (kind == "llava" and "vision_config" not in raw):
        raise CheckpointError(
            f"{path}: LLaVA's original format ({kind}); take the converted checkpoint (llava-hf/…), or convert it: "
            "python src/transformers/models/llava/convert_llava_weights_to_hf.py of transformers' repository"
        )
    for part in ("text_config", "vision_config"):
        if not isinstance(raw.get(part, {}), dict):
            raise CheckpointError(f"{path / 'config.json'}: {part} is no settings by name; fetch it again")
    quantised = raw.get("quantization_config") or raw.get("text_config", {}).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise CheckpointError(
            f"{path}: quantised weights ({method}) are not supported; fetch the checkpoint in bfloat16, float16 or "
            "float32, or save model.dequantize() anew"
        )
    if not isinstance(kind, str):
        raise CheckpointError(f"{path / 'config.json'}: no model_type; fetch it again")
    family = families(kind)  # refuses an unknown one by name
    from transformers import AutoConfig

    try:
        return ModelFolder(path, AutoConfig.from_pretrained(path), family)
    except Exception as error:  # values of wrong type or range raise whatever the configuration class makes of them
        if isinstance(error, ImportError):  # of a library, not of this file
            check_torchvision()
        raise CheckpointError(f"{path / 'config.json'}: no valid configuration ({_words(error)})") from None


def check_architecture(folder: ModelFolder) -> None:
    """Refuse towers and language models whose mathematics the adapter does not know, and a tower without patches."""
    patch, side = (_side(folder.config.vision_config, name) for name in ("patch_size", "image_size"))
    if type(patch) is not int or patch < 1 or (type(side) is int and side < patch):
        raise CheckpointError(
            f"{folder.path / 'config.json'}: vision_config.patch_size = {patch!r} must be a whole number of pixels, no more "
            "than image_size; fetch it again"
        )
    folder.family.check_config(folder.config)


def _side(vision: Any, name: str) -> Any:
    """A size of a tower's configuration; one of two equal sides, which some families write out, is that side."""
    held = getattr(vision, name, None)
    return held[0] if isinstance(held, (list, tuple)) and len(held) == 2 and held[0] == held[1] else held


def check_processor(folder: ModelFolder) -> None:
    """Refuse a folder without image processor, tokenizer or a chat template that asks one question about one image."""
    processor = load_processor(folder.path)
    image_processor = processor.image_processor

    side = _side(folder.config.vision_config, "image_size")
    if side is not None:
        try:
            shape = image_processor([Image.new("RGB", PICTURE)], return_tensors="pt")["pixel_values"].shape
        except Exception as error:
            raise CheckpointError(f"{folder.path}: its image processor fails on a picture ({_words(error)})") from None
        if tuple(shape[-2:]) != (side, side):
            raise CheckpointError(
                f"{folder.path}: its image processor makes pictures of {shape[-1]}x{shape[-2]} pixels, the tower of "
                f"config.json takes {side}x{side}; fetch both files of one checkpoint"
            )

    if hasattr(folder.config, "image_grid_pinpoints"):
        check_grids(folder, image_processor)
    check_template(processor, folder.config.image_token_id)
    check_vocabulary(folder, processor)
    check_placeholders(folder, processor)


def check_grids(folder: ModelFolder, image_processor: Any) -> None:
    """Refuse a list of picture sizes to choose crops by that is none, or that model and processor do not share."""
    place, ours = folder.path / "config.json", folder.config.image_grid_pinpoints
    theirs: Any = getattr(image_processor, "image_grid_pinpoints", None)
    for sizes in (ours, theirs):
        pairs = isinstance(sizes, (list, tuple)) and all(
            isinstance(one, (list, tuple)) and len(one) == 2 for one in sizes
        )
        if not sizes or not pairs or not all(type(side) is int and side > 0 for one in sizes for side in one):
            raise CheckpointError(
                f"{place if sizes is ours else folder.path}: image_grid_pinpoints = {str(sizes)[:SHOWN]} must be a list of "
                "heights and widths in pixels; fetch it again"
            )
    if sorted(map(tuple, ours)) != sorted(map(tuple, theirs)):
        raise CheckpointError(
            f"{place}: image_grid_pinpoints differ from the image processor's, so crops and tokens would not match; fetch "
            "both files of one checkpoint"
        )


def check_vocabulary(folder: ModelFolder, processor: Any) -> None:
    """Refuse a tokenizer with tokens that the language model has no embedding for."""
    tokenizer, size = processor.tokenizer, folder.config.text_config.vocab_size
    prompt = tokenize_prompt(tokenizer, render_question(processor, QUESTION))  # what it adds may be in no vocabulary
    largest = max([*tokenizer.get_vocab().values(), *prompt])
    if largest >= size:
        raise CheckpointError(
            f"{folder.path}: its tokenizer has a token {largest}, the model's tokens are 0 to {size - 1}; fetch tokenizer "
            "and config.json of one checkpoint"
        )


def check_placeholders(folder: ModelFolder, processor: Any) -> None:
    """Refuse a processor that makes room for another number of visual tokens than the model of ``config.json`` has."""
    prompt = render_question(processor, QUESTION)
    try:
        made = processor(images=[Image.new("RGB", PICTURE)], text=[prompt])
    except Exception as error:
        raise CheckpointError(
            f"{folder.path}: its processor fails on a question about a picture ({_words(error)}); fetch "
            f"{' and '.join(PROCESSOR_FILES)} again"
        ) from None
    (tokens,) = made["input_ids"]
    room = list(tokens).count(folder.config.image_token_id)
    needed = folder.family.layout_for(folder.config, processor.image_processor, PICTURE).placeholders
    if room != needed:
        raise CheckpointError(
            f"{folder.path}: its processor makes room for {room} visual tokens of a picture of "
            f"{PICTURE[0]}x{PICTURE[1]} pixels, config.json says {needed}; fetch both files of one checkpoint"
        )


def check_settings(folder: ModelFolder) -> None:
    """Refuse generation settings that are not obeyed, and a model that never ends an answer."""
    path = folder.path / "generation_config.json"
    settings = generation_settings(folder.path, folder.config)
    check_generation(settings)
    check_values(settings, folder.config.text_config.vocab_size)
    ends = check_end_tokens(settings, folder.config)
    if path.exists() and not settings.eos_token_id and settings.eos_token_id != 0:
        raise CheckpointError(
            f"{path}: names no eos_token_id, so transformers would end no answer where config.json does; set it to {ends[0]}"
        )


def generation_settings(folder: Path, config: Any) -> Any:
    """The generation settings of a folder whose configuration is ``config``, as a loaded model has them.

    Raises:
        CheckpointError: its ``generation_config.json`` is no valid one.
    """
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationConfig.from_model_config(config)
    _json(path)
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{path}: no valid settings ({_words(error)})") from None


def load_processor(path: Path) -> Any:
    """The processor of a model folder.

    Raises:
        CheckpointError: which file is missing or damaged. ``ImportError``: a package the processor needs is missing.
    """
    for name in ("tokenizer_config.json", "tokenizer.json", *PROCESSOR_FILES, "special_tokens_map.json"):
        if (path / name).exists():
            _json(path / name)
    for name in TEXTS:
        if (path / name).is_file():
            refuse_pointer(path / name)
    if (path / "tokenizer.json").exists():
        _check_frames(path / "tokenizer.json")
    held = [name for name in PROCESSOR_FILES if (path / name).exists()]
    if not any(name == PROCESSOR_FILES[1] or "image_processor" in _json(path / name) for name in held):
        raise CheckpointError(f"{path}: no {PROCESSOR_FILES[1]}, which says how images are prepared; fetch it")
    if not any((path / name).exists() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{path}: no tokenizer.json or tokenizer.model; fetch the tokenizer's files")
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(path)
    except ImportError:
        raise
    except BaseException as error:  # tokenizers and processors raise of every kind; a panic of Rust's is no Exception
        if isinstance(error, ENDS_THE_PROGRAM):
            raise
        raise CheckpointError(
            f"{path}: processor or tokenizer cannot be loaded ({_words(error)}); fetch their files again"
        ) from None

    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CheckpointError(
            f"{path}: its processor is a {type(processor).__name__}, which does not take images and text; fetch "
            f"{' and '.join(PROCESSOR_FILES)}"
        )
    return processor


def _check_frames(path: Path) -> None:
    """Refuse a tokenizer that frames texts with tokens it does not have: its library, written in Rust, would panic."""
    outer = _json(path).get("post_processor")
    inner = outer.get("processors") if isinstance(outer, dict) else None
    for frame in [outer, *(inner if isinstance(inner, list) else [])]:
        if not isinstance(frame, dict) or frame.get("type") != "TemplateProcessing":
            continue
        try:
            named = [part["SpecialToken"]["id"] for part in frame["single"] if "SpecialToken" in part]
            lost = [name for name in named if name not in frame["special_tokens"]]
        except (KeyError, TypeError, AttributeError):  # of another form: its library says so itself
            continue
        if lost:
            raise CheckpointError(
                f"{path}: post_processor frames texts with {lost[0]!r}, which its special_tokens lack; fetch it again"
            )


def _json(path: Path) -> dict[str, Any]:
    refuse_pointer(path)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid JSON ({_words(error)}); fetch it again") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path}: holds a {type(held).__name__}, not settings by name; fetch it again")
    return held


def _nested(path: Path) -> str:
    inner = sorted(file.parent.relative_to(path).as_posix() for file in path.glob("*/config.json"))
    inner += sorted(file.parent.relative_to(path).as_posix() for file in path.glob("snapshots/*/config.json"))
    return f" (there is one in {inner[0]}: name that folder)" if inner else ""


def _words(error: BaseException) -> str:
    words = in_one_line(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
