"""What planning asks of a model folder, remembered on this machine, because the classes that answer take seconds to import.

Remembered is that a folder was whole when it was looked over, its settings as transformers resolves them, and how its
processor renders and cuts the texts that were asked before. All of it holds for the same files (names, sizes, time stamps),
the same libraries and the same code of this package. What was not asked before, or is of another kind, is asked of the
real objects, which are made then.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import operator
import stat
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from nuwa.own_folder import own_folder
from nuwa.vlm.adapter import Adapter
from nuwa.vlm.checkpoint import MEMORY, keep_json
from nuwa.vlm.folder import folder_faults, generation_settings
from nuwa.vlm.processors import load_processor

LIBRARIES = (  # whose versions decide what is remembered; some need not be there
    *("transformers", "tokenizers", "huggingface-hub", "jinja2", "sentencepiece", "safetensors"),
    *("torch", "torchvision", "accelerate", "numpy", "pillow"),
)
TEXTS = 50_000  # that are remembered of a folder; beyond, those of the last run alone
Families = Callable[[str], type[Adapter]]


class FolderMemory:
    """What is known of the model in ``folder``; ``memory``: the machine's own folder for such things."""

    def __init__(self, folder: Path, stamp: str, memory: Path) -> None:
        self.folder = folder
        place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
        self._memo = own_folder(memory) / f"{place}.planning.json"
        self._known: dict[str, Any] = {"stamp": stamp}
        try:
            held = json.loads(self._memo.read_text())
            if held["stamp"] == stamp:
                self._known = held
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def faults(self, families: Families) -> list[str]:
        """Every fault of the folder, as :func:`nuwa.vlm.folder.folder_faults` tells them; that there is none is remembered."""
        if self._known.get("whole"):
            return []
        faults = list(folder_faults(self.folder, families))
        # The code of a plug-in's family is not in the stamp.
        if not faults and families(self.config().model_type).__module__.startswith("nuwa.vlm."):
            self._known["whole"] = True
            self.save()
        return faults

    def config(self) -> RememberedSettings:
        """The configuration; raises whatever ``AutoConfig.from_pretrained`` raises where it is not known."""
        if "config" not in self._known:
            self._known["config"] = _described(self._real_config())
            self.save()
        return RememberedSettings(self._known["config"], self._real_config)

    def generation(self) -> RememberedSettings:
        """The generation settings; raises :class:`nuwa.vlm.checkpoint.CheckpointError` where they are not readable."""
        if "generation" not in self._known:
            self._known["generation"] = _described(self._real_generation())
            self.save()
        return RememberedSettings(self._known["generation"], self._real_generation)

    def processor(self, backend: str = "pil") -> RememberedProcessor:
        """The processor, whose images ``backend`` resizes; what it is asked anew is kept by :meth:`save`."""
        known = self._known.setdefault("processors", {}).setdefault(backend, {})
        return RememberedProcessor(known, functools.partial(load_processor, self.folder, backend))

    def outline(self, family: type[Adapter], attention: str = "sdpa") -> Outline:
        """The model without weights, of ``family``; ``attention``: the kernel it is to be loaded with."""
        return Outline(self.config(), self.generation(), attention, lambda: _empty(family, self._real_config()))

    def save(self) -> None:
        """Keep what is known; a place that cannot be written to costs the next run some seconds."""
        for texts in self._known.get("processors", {}).values():
            for kind, held in texts.items():
                if isinstance(held, dict) and len(held) > TEXTS:
                    texts[kind] = {key: value for key, value in held.items() if key in RememberedTexts.asked}
        keep_json(self._memo, self._known)

    @functools.cached_property
    def _loaded(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    def _real_config(self) -> Any:
        return self._loaded

    def _real_generation(self) -> Any:
        return generation_settings(self.folder, self._loaded)


def folder_memory(folder: str | Path, memory: Path = MEMORY) -> FolderMemory:
    """What is known of the model in ``folder`` as it stands."""
    return _folder_memory(Path(folder), _stamp(Path(folder)), memory)


@functools.lru_cache(maxsize=8)
def _folder_memory(folder: Path, stamp: str, memory: Path) -> FolderMemory:
    return FolderMemory(folder, stamp, memory)


def _stamp(folder: Path) -> str:
    """Tells other files, libraries or code of this package. A change time cannot be set, as others can."""
    files: list[list[Any]] = []
    # What transformers reads of a folder lies in it; the folder may be anyone's, with a whole disk below.
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        try:
            status = path.stat()
        except OSError:  # a link to nothing, or into what is not ours
            files.append([str(path.relative_to(folder))])
            continue
        if stat.S_ISREG(status.st_mode):
            times = [status.st_mtime_ns, status.st_ctime_ns]
            files.append([str(path.relative_to(folder)), status.st_size, *times])
    content = [files, [_version(name) for name in LIBRARIES], _own_code()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.cache
def _own_code() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *package.glob("vlm/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


# Settings


def _described(settings: Any) -> dict[str, Any]:
    """``values``: plain ones by name. ``parts``: settings inside, described alike. ``further``: names of all else."""
    values: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    further: list[str] = []
    held = vars(settings)
    for name in sorted({*dir(type(settings)), *held}):
        if name.startswith("__"):
            continue
        value = held[name] if name in held else inspect.getattr_static(type(settings), name)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            parts[name] = _described(value)
        elif _is_plain(value):
            values[name] = value
        else:  # methods, properties, numbers by number
            further.append(name)

    described: dict[str, Any] = {"values": values, "parts": parts, "further": further}
    described["aliases"] = dict(getattr(settings, "attribute_map", {}))
    if hasattr(settings, "get_text_config"):
        text = settings.get_text_config()
        described["text"] = next((name for name in parts if getattr(settings, name) is text), None)
    return described


def _is_plain(value: Any) -> bool:
    """Whether JSON gives ``value`` back as it is."""
    if isinstance(value, dict):
        return type(value) is dict and all(type(key) is str and _is_plain(one) for key, one in value.items())
    if isinstance(value, list):
        return type(value) is list and all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


class RememberedSettings:
    """Settings of transformers by name, as they were resolved; what JSON cannot hold is asked of the real ones."""

    def __init__(self, known: Mapping[str, Any], real: Callable[[], Any]) -> None:
        self.__dict__.update(known["values"])
        for name, part in known["parts"].items():
            self.__dict__[name] = RememberedSettings(part, functools.partial(_part_of, real, name))
        self._known, self._real = known, real

    def get_text_config(self) -> RememberedSettings:
        """Of the language model; itself where there is none inside."""
        name = self._known.get("text")
        return self if name is None else getattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_known", "_real"):
            raise AttributeError(name)
        if (meant := self._known["aliases"].get(name, name)) != name:
            return getattr(self, meant)
        if name in self._known["further"]:
            return getattr(self._real(), name)
        raise AttributeError(f"these settings have no {name!r}")


def _part_of(real: Callable[[], Any], name: str) -> Any:
    return getattr(real(), name)


# Processors


class RememberedTexts:
    """Answers of a pure function of texts; ``asked``: digests of what was asked in this process, of all instances."""

    asked: ClassVar[set[str]] = set()

    def __init__(self, known: dict[str, Any]) -> None:
        self._known = known

    def of(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` says for ``key``, which JSON can hold."""
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.asked.add(digest)
        if digest not in self._known:
            self._known[digest] = make()
        return self._known[digest]


class Deferred:
    """An object that is made when something is asked of it that is not known; what is set on it lies above the real one's."""

    def __init__(self, make: Callable[[], Any], **known: Any) -> None:
        self.__dict__.update(known)
        self._make = functools.cache(make)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_make":
            raise AttributeError(name)
        return getattr(self._make(), name)

    def __call__(self, *values: Any, **options: Any) -> Any:
        return self._make()(*values, **options)


class RememberedProcessor(Deferred):
    """What an adapter asks of a processor to plan; anything else is the real one's, which ``load`` makes."""

    def __init__(self, known: dict[str, Any], load: Callable[[], Any]) -> None:
        super().__init__(load)
        if "image processor" not in known:
            real = self._make()
            known["image processor"] = class_name(real.image_processor)
            known["bos_token"] = getattr(real.tokenizer, "bos_token", None)
        self._rendered = RememberedTexts(known.setdefault("rendered", {}))
        self.image_processor = Deferred(lambda: self._make().image_processor, remembered_class=known["image processor"])
        self.tokenizer = RememberedTokenizer(known, lambda: self._make().tokenizer)

    def apply_chat_template(self, turns: list[dict[str, Any]], **options: Any) -> str:
        """The rendered chat."""
        return self._rendered.of([turns, options], lambda: self._make().apply_chat_template(turns, **options))


class RememberedTokenizer(Deferred):
    """Texts → token ids and back."""

    def __init__(self, known: dict[str, Any], load: Callable[[], Any]) -> None:
        super().__init__(load, bos_token=known["bos_token"])
        self._tokens = RememberedTexts(known.setdefault("tokens", {}))
        self._words = RememberedTexts(known.setdefault("words", {}))

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        """``input_ids`` of one text."""
        ids = self._tokens.of([text, options], lambda: list(self._make()(text, **options).input_ids))
        return SimpleNamespace(input_ids=list(ids))

    def convert_ids_to_tokens(self, number: int) -> str:
        """The token that has ``number``."""
        return self._words.of(number, lambda: self._make().convert_ids_to_tokens(number))


def class_name(image_processor: Any) -> str:
    """Module and name of an image processor's class, which tells its backend; of one that is not made yet, as it was."""
    held = vars(image_processor).get("remembered_class")
    kind = type(image_processor)
    return held or f"{kind.__module__}.{kind.__qualname__}"


# Models


class Outline:
    """A model of which only the settings are known; its modules, without weights, are made when one of them is asked for."""

    def __init__(self, config: Any, generation: Any, attention: str, make: Callable[[], Any]) -> None:
        self.config, self.generation_config = config, generation
        self._make = functools.cache(make)
        text = config.get_text_config()
        text._attn_implementation = attention
        # Families have the language model under one of two names.
        languages = {
            name: _Part(f"model.{name}", self._make, config=text, layers=range(text.num_hidden_layers))
            for name in ("language_model", "text_model")
        }
        self.model = _Part("model", self._make, **languages)

    def eval(self) -> Outline:
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_make":
            raise AttributeError(name)
        return getattr(self._make(), name)


class _Part(Deferred):
    """A module of an outline, by its path in the model."""

    def __init__(self, path: str, model: Callable[[], Any], **known: Any) -> None:
        super().__init__(lambda: operator.attrgetter(path)(model()), **known)
        self._path, self._model = path, model

    def __getattr__(self, name: str) -> Any:
        # Adapters name its parts before any is used.
        if self.__dict__.get("_path") == "model" and not name.startswith("__"):
            return _Part(f"model.{name}", self._model)
        return super().__getattr__(name)


def _empty(family: type[Adapter], config: Any) -> Any:
    import torch

    with torch.device("meta"):
        return family.model_class(config)
