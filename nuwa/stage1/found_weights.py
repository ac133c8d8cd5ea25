"""Weights that were trained on an encoder, found by that encoder and not by where one stands.

A weights file names its encoder in its head (:func:`nuwa.stage1.learnpruner.save_lpm`), and whatever it is called it is
found by that. Looked at, in this order: the file that is named, and then no other place; the folder ``pruner`` beside the
model's own; the user's store, ``$NUWA_PRUNER`` or else ``nuwa/pruner`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; what this
project ships, ``models/pruner``. Weights of another encoder are never taken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nuwa.stage1.learnpruner import DEFAULT_WEIGHTS, METADATA, LearnPruner, WeightsError

FOLDER = Path(DEFAULT_WEIGHTS).parent.name
SHIPPED = Path(__file__).parents[2] / Path(DEFAULT_WEIGHTS).parent
STORE = "NUWA_PRUNER"  # the variable that names the user's store
SHOWN = 12  # digits of an encoder's digest in a message


def user_store() -> Path:
    """The user's own folder of weights, whether it is there or not."""
    if named := os.environ.get(STORE):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "nuwa" / FOLDER


def weight_places(model: str | Path | None) -> tuple[Path, ...]:
    """Where weights for the model of the folder ``model`` are looked for, the first place first; null, or the name of a
    model of the hub: it has no folder of its own."""
    beside = [Path(model).resolve().parent / FOLDER] if model and Path(model).is_dir() else []
    return tuple(dict.fromkeys((*beside, user_store(), SHIPPED)))


def weights_for(encoder: str, folders: Sequence[Path]) -> dict[str, Any]:
    """``weights`` and ``digest`` of the file that was trained on the encoder of that fingerprint, as hyper-parameters.

    The first of ``folders`` that has one decides. Raises :class:`nuwa.stage1.learnpruner.WeightsError` where none has,
    naming the encoder, every place and what is there, and where one has several that differ.
    """
    seen = []
    for folder in folders:
        held = {path: _encoder_of(path) for path in sorted(folder.glob("*.safetensors"))}
        fitting = {path: LearnPruner(str(path)).digest for path, of in held.items() if of == encoder}
        if len(set(fitting.values())) > 1:
            raise WeightsError(
                f"{folder} holds several weights for encoder {encoder[:SHOWN]}: "
                f"{', '.join(path.name for path in fitting)}; name one of them as learnpruner.weights"
            )
        for path, digest in fitting.items():
            return {"weights": str(path), "digest": digest}
        seen.append(f"{folder} ({_said(folder, held)})")

    raise WeightsError(
        f"learnpruner has no weights for the model's encoder {encoder[:SHOWN]}; looked in {', '.join(seen)}; train them "
        "with `make pruner` on that model (docs/models.md), or name their file as learnpruner.weights"
    )


def _encoder_of(path: Path) -> str | None:
    """The fingerprint in a file's head; null where it is no weights file. Tensors are not read."""
    try:
        with safe_open(path, "pt") as content:
            return str(json.loads((content.metadata() or {})[METADATA])["encoder"])
    except (SafetensorError, OSError, LookupError, ValueError, TypeError):
        return None


def _said(folder: Path, held: Mapping[Path, str | None]) -> str:
    if not held:
        return "no *.safetensors there" if folder.is_dir() else "no such folder"
    return ", ".join(
        f"{path.name} is of encoder {of[:SHOWN]}" if of else f"{path.name} names no encoder"
        for path, of in held.items()
    )
