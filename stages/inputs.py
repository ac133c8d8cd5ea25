"""``inputs``: digests of what stages read and DVC cannot see, so that a stage runs again when it has changed.

Published tables of ``prepare.tables``, instruction data of ``pruner.data``, and weights that grids name under
``parameters.weights`` lie anywhere, and their places are in ``params.yaml``, not in ``dvc.yaml``. This stage always runs
and takes a fraction of a second: files whose sizes and time stamps stand still are not read again. It checks nothing;
a place where nothing is has no digest, and the stage that reads it says what is wrong.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.files.atomic import atomic_path
from pipelines.files.digests import DigestMemo
from pipelines.files.surroundings import surroundings

PARAMS = Path("params.yaml")
INPUTS = Path("data/inputs")
MEMO = Path("cache/inputs.json")
LEARNED = "learnpruner"  # the method whose weights are found by their encoder
# What the processor of the model decides is read by `prepare` too, which need not run again for new weights.
PROCESSOR = ("config.json", "preprocessor_config.json", "processor_config.json")


def inputs(params: Mapping[str, Any], memo: DigestMemo) -> dict[str, dict[str, str | None]]:
    """Name of a file under ``data/inputs`` → place as ``params.yaml`` has it → digest."""
    prepared, trained = params.get("prepare") or {}, params.get("pruner") or {}
    tables = [str(place) for place in (prepared.get("tables") or {}).values()]
    model = Path(str((params.get("model") or {}).get("path")))
    graded = (params.get("evaluate") or {}).get("grades")
    lessons = [trained[name] for name in ("data", "images_folder") if trained.get(name) not in (None, "scenes")]

    places = {
        "tables": [*tables, *(str(model / name) for name in PROCESSOR)],
        "lessons": [str(place) for place in lessons[:1]],  # a folder of images is too large to read each time
        "grades": [str(graded)] if graded else [],
        "plugins": [place for name in params.get("plugins") or () for place in _plugin(str(name))],
        "weights": sorted(
            {*_weights(params.get("sweep")), *_weights(params.get("search")), *_text_tower(params), *_found(params)}
        ),
    }
    return {name: {place: memo.of(Path(place)) for place in listed} for name, listed in places.items()}


def _plugin(name: str) -> list[str]:
    """Where a plugin's code lies: the folder of its package, or its file; nothing is imported."""
    package = name.partition(".")[0]
    here = [Path(package), Path(f"{package}.py")]
    source = next((place for place in here if place.exists()), None)
    if source is not None:
        return [str(source)]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return []
    return (
        []
        if spec is None or spec.origin is None
        else [str(spec.origin if not spec.submodule_search_locations else Path(spec.origin).parent)]
    )


def _text_tower(params: Mapping[str, Any]) -> set[str]:
    """The folder of CLIP's text tower, where one is named."""
    named = (params.get("model") or {}).get("text_tower")
    return {str(named)} if named else set()


def _found(params: Mapping[str, Any]) -> Iterator[str]:
    """Files outside this project that a sweep may take LearnPruner's weights from (:mod:`nuwa.stage1.found_weights`, which
    takes long to import). The testbed's own are in the project."""
    model = params.get("model") or {}
    if model.get("prompt_style") == "testbed" or LEARNED not in json.dumps([params.get("sweep"), params.get("search")]):
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nuwa/pruner"
    folders = [Path(os.environ.get("NUWA_PRUNER") or cache).expanduser()]
    if model.get("path") and Path(model["path"]).is_dir():
        folders.append(Path(model["path"]).resolve().parent / "pruner")
    for folder in folders:
        if folder.resolve() != Path("models/pruner").resolve():  # which DVC sees
            yield from map(str, folder.glob("*.safetensors"))


def _weights(value: Any) -> Iterator[str]:
    """Every file that stands under a key ``weights``, however deep."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            if key == "weights":
                yield from (str(one) for one in (held if isinstance(held, list) else [held]) if isinstance(one, str))
            else:
                yield from _weights(held)
    elif isinstance(value, list):
        for held in value:
            yield from _weights(held)


def write_inputs() -> None:
    """Digest everything and write ``data/inputs``."""
    memory = DigestMemo(MEMO)
    for file, digests in inputs(yaml.safe_load(PARAMS.read_text()) or {}, memory).items():
        with atomic_path(INPUTS / f"{file}.json") as fresh:
            fresh.write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")
    memory.save()


if __name__ == "__main__":
    try:
        write_inputs()
    except OSError as error:
        if (told := surroundings(error)) is None:
            raise
        sys.exit(f"error: {told}")
    except Exception:
        from pipelines.settings import SettingsError, load_settings  # takes a second, and says what is wrong

        try:
            load_settings(PARAMS)
        except SettingsError as error:
            sys.exit(f"error: {error}")
        raise
