"""Language models whose layers the decoder runs from outside: those that come out right, and what their layers take.

The decoder calls a model's own layers with masks, rotary tables and caches of its own. Whatever else a model's
``forward`` does around its layers is said here, one entry a ``model_type`` of the text configuration; a model without an
entry is refused by name when it is loaded. Every entry is tested on a tiny random model against stock ``generate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from nuwa.errors import UserError
from nuwa.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"  # as in ``layer_types`` of a configuration
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary tables that change with the longest sequence of a batch


class UnsupportedModel(UserError, ValueError):
    """A model that the decoder does not answer rightly, or not with the attention kernel it was loaded with."""


@dataclass(frozen=True)
class TextFamily:
    """What a family's ``forward`` does around its layers.

    ``windows``: which layers see a sliding window of ``config.sliding_window`` tokens: none, all where it is set, or
    those whose entry in ``config.layer_types`` says so. ``rotary_by_kind``: whether ``rotary_emb`` has a table for every
    kind of layer. ``axes``: position ids of a token. ``multiplier``: attribute of the model by which all input embeddings are multiplied, images' too.
    """

    windows: Literal["none", "all", "by_layer"] = "none"
    rotary_by_kind: bool = False
    axes: int = 1
    multiplier: str | None = None


TEXT_FAMILIES: Registry[TextFamily] = Registry("language model (text_config.model_type)")
for _name, _family in {
    "llama": TextFamily(),
    "mistral": TextFamily(windows="all"),
    "qwen2": TextFamily(windows="by_layer"),
    "qwen2_5_vl_text": TextFamily(windows="by_layer", axes=3),
    "qwen2_vl_text": TextFamily(windows="by_layer", axes=3),
    "qwen3": TextFamily(windows="by_layer"),
    "qwen3_vl_text": TextFamily(axes=3),
    "gemma": TextFamily(),
    "gemma2": TextFamily(windows="by_layer"),
    "gemma3_text": TextFamily(windows="by_layer", rotary_by_kind=True),
    "phi3": TextFamily(windows="all"),
    "granite": TextFamily(multiplier="embedding_multiplier"),
    "olmo2": TextFamily(),
    "smollm3": TextFamily(windows="by_layer"),
    "cohere": TextFamily(),
    "cohere2": TextFamily(windows="by_layer"),
}.items():
    TEXT_FAMILIES.add(_name, _family)


class TextModel:
    """The language model inside a vision-language model, seen layer by layer.

    ``kinds``: of every layer, ``FULL`` or ``SLIDING``. ``window``: how many tokens a layer of kind ``SLIDING`` sees, the
    asking one included, counted in position ids: on an unpruned sequence the stock window, and dropped tokens leave the
    distances of the others as they are wherever the position strategy does.
    """

    def __init__(self, language: PreTrainedModel) -> None:
        """Raises ``UnknownName`` for a family that is not listed, and :class:`UnsupportedModel`."""
        config = language.config
        self.language = language
        self.family = TEXT_FAMILIES.look_up(config.model_type)
        # Null where no layer is SLIDING, and read nowhere else.
        self.window: int | Any = getattr(config, "sliding_window", None) if self.family.windows != "none" else None
        self.kinds = self._kinds(config)
        _check(config, self.family, SLIDING in self.kinds)

    def _kinds(self, config: Any) -> tuple[str, ...]:
        layers = len(self.language.layers)
        if self.family.windows == "by_layer":
            return tuple(config.layer_types[:layers])
        return (FULL if self.window is None else SLIDING,) * layers

    def enter(self, embedded: Tensor) -> Tensor:
        """Input embeddings ``(..., dim)`` as the first layer takes them."""
        multiplier = self.family.multiplier
        return embedded if multiplier is None else embedded * getattr(self.language, multiplier)

    def rotations(self, hidden: Tensor, positions: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For every kind of layer what it takes as ``position_embeddings``; ``positions`` ``(axes, rows, tokens)``."""
        positions = (positions if len(positions) > 1 else positions[0]).to(hidden.device)
        rotary = self.language.rotary_emb
        kinds = sorted(set(self.kinds))
        if self.family.rotary_by_kind:
            return {kind: rotary(hidden, positions, kind) for kind in kinds}
        return dict.fromkeys(kinds, rotary(hidden, position_ids=positions))


def _check(config: Any, family: TextFamily, sliding: bool) -> None:
    name, attention = f"text_config.model_type = {config.model_type}", config._attn_implementation
    if sliding and family.axes > 1:
        raise UnsupportedModel(
            f"{name} with text_config.sliding_window = {config.sliding_window}: sliding-window attention is not supported "
            "with several position ids a token; set it to null where prompt and answer are shorter than the window"
        )
    if sliding and "flash" in attention:
        raise UnsupportedModel(
            f"{name} with model.attention {attention}: its kernels count a sliding window in kept tokens, not in "
            "positions; allowed: sdpa, eager"
        )
    if getattr(config, "attn_logit_softcapping", None) is not None and attention == "sdpa":
        raise UnsupportedModel(
            f"{name} with model.attention sdpa: that kernel cannot soft-cap attention; allowed: eager, flash_attention_2"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(f"{name} with use_bidirectional_attention: only causal language models are supported")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]

    for kind in {str(part.get("rope_type")) for part in kinds} & set(LENGTH_DEPENDENT):
        raise UnsupportedModel(
            f"{name} with rope_type {kind}: its rotary tables depend on the longest sequence of a batch; use a "
            "checkpoint with another rope_type (default, linear, llama3, yarn)"
        )
