"""Which encoder a call's model has: all its weights are read for that once, not at every call."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from nuwa.vlm import Adapter

# By model: what its encoder was when it was hashed, and the digest.
_KNOWN: WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = WeakKeyDictionary()


def encoder_identity(vlm: Adapter) -> str:
    """As :attr:`nuwa.vlm.Adapter.encoder_identity`; hashed anew where weights were written to, moved or exchanged."""
    state = _state(vlm)
    held = _KNOWN.get(vlm.model)
    if state is None or held is None or held[0] != state:
        held = _KNOWN[vlm.model] = state, vlm.encoder_fingerprint()
    return held[1]


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
