"""What calls remember of a model: which encoder it has, and its text tower. Both cost much, and go with the model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from nuwa.vlm import Adapter
from nuwa.vlm.text_tower import TextTower

# By model: what its encoder was when it was hashed, and the digest.
_KNOWN: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = WeakKeyDictionary()
# By model: of which files and which encoder its text tower is, and the tower; one a model.
_TOWERS: WeakKeyDictionary[PreTrainedModel, tuple[Any, TextTower]] = WeakKeyDictionary()


def encoder_identity(vlm: Adapter) -> str:
    """As :attr:`nuwa.vlm.Adapter.encoder_identity`; hashed anew where weights were written to, moved or exchanged."""
    state = _state(vlm)
    held = _KNOWN.get(vlm.model)
    if state is None or held is None or held[0] != state:
        held = _KNOWN[vlm.model] = state, vlm.encoder_fingerprint()
    return held[1]


def remembered_tower(vlm: Adapter, folder: str | Path) -> TextTower:
    """The CLIP model in ``folder``, read and held against the model's encoder once: anew where the folder's files or the
    encoder are others. Raises :class:`nuwa.vlm.text_tower.TextTowerError`."""
    encoder = _state(vlm)
    state = os.path.realpath(folder), _stamps(Path(folder)), encoder, vlm.device
    held = _TOWERS.get(vlm.model)
    if encoder is None or held is None or held[0] != state:
        held = _TOWERS[vlm.model] = state, TextTower(folder)
    return held[1]


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    """What tells other files. A change time cannot be set, as others can."""
    held = []
    for path in sorted(folder.glob("*")):
        try:
            status = path.stat()
        except OSError:  # a link to nothing, which nobody reads
            continue
        if stat.S_ISREG(status.st_mode):
            held.append((path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return held


def _state(vlm: Adapter) -> Any:
    """What is another where the identity may be: of every tensor its place and how often it was written to.

    Null where tensors do not count that.
    """
    tensors = [one for module in vlm.encoder_modules.values() for one in module.state_dict(keep_vars=True).values()]
    if any(one.is_inference() for one in tensors):
        return None
    places = [(one.data_ptr(), one._version, one.dtype, one.shape) for one in tensors]
    preprocessing = json.dumps(vlm.processor.image_processor.to_dict(), sort_keys=True, default=str)
    return places, preprocessing, json.dumps(vlm.encoder_settings)
