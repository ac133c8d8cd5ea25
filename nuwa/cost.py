"""What a token schedule costs: arithmetic of the prefill, bytes of the key-value cache, overhead of metrics.

Published figures follow different conventions, so every figure here names its own (:class:`Accounting`). Table 4 of
Nüwa, 5.973 T unpruned and 0.6476 T at 64 average tokens on LLaVA-1.5-7B, is appendix C's formula as printed, one
multiply-accumulate as two FLOP, two matrices in the FFN, the 576 visual tokens alone, counted as they enter a layer,
without the vision encoder: 5.972 T and 0.6476 T. No other convention comes near both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nuwa.schedule import TokenSchedule


@dataclass(frozen=True)
class LlmShape:
    """Sizes of a decoder-only language model. ``ffn_matrices``: 3 where the FFN is gated (Llama, Qwen), else 2."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_matrices: int = 3

    @classmethod
    def from_config(cls, config: Any) -> LlmShape:
        """Of a transformers configuration, of a language model or of a vision-language model around one."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a CLIP-like tower and its two-layer projector. ``positions``: patches and, where there is one, CLS."""

    layers: int
    hidden: int
    intermediate: int
    patches: int
    positions: int
    patch_values: int  # numbers in a patch: 3 * 14 * 14
    projected: int  # width of the language model

    @classmethod
    def from_config(cls, config: Any) -> VisionShape:
        """Of a LLaVA-like configuration. Raises ``ValueError`` for towers of another kind."""
        vision = config.vision_config
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "image_size", "patch_size")
        missing = [name for name in needed if not hasattr(vision, name)]
        if missing:
            raise ValueError(f"vision_config of {config.model_type} has no {', '.join(missing)}: not a CLIP-like tower")
        patches = (vision.image_size // vision.patch_size) ** 2
        return cls(
            layers=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            patches=patches,
            positions=patches + ("clip" in vision.model_type),
            patch_values=getattr(vision, "num_channels", 3) * vision.patch_size**2,
            projected=config.get_text_config().hidden_size,
        )

    def macs(self) -> int:
        """Multiply-accumulates of encoding one image and projecting all its patches."""
        embedding = self.patches * self.patch_values * self.hidden
        layer = _layer_macs(self.positions, self.hidden, self.hidden, self.hidden, self.intermediate, 2)
        projector = self.patches * (self.hidden + self.projected) * self.projected
        return embedding + self.layers * layer + projector


@dataclass(frozen=True)
class Accounting:
    """A convention of counting. Defaults: what is really computed, of the visual tokens, as FLOP.

    ``unit``: a multiply-accumulate is one MAC or two FLOP. ``ffn_matrices``: null for what the model has; 2 is what
    papers often count for gated FFNs too. ``counted``: tokens entering a layer, or leaving it. ``text_tokens``: how
    many stand in the sequence beside the visual ones. ``vision``: the encoder and projector, where they count.
    """

    unit: Literal["FLOP", "MAC"] = "FLOP"
    ffn_matrices: int | None = None
    counted: Literal["entering", "leaving"] = "entering"
    text_tokens: int = 0
    vision: VisionShape | None = None

    def label(self, llm: LlmShape) -> str:
        """The convention in words, to stand beside every figure."""
        tokens = "visual tokens" + (f" and {self.text_tokens} of text" if self.text_tokens else "")
        parts = "language model" + (" and vision encoder" if self.vision else " only")
        matrices = self.ffn_matrices or llm.ffn_matrices
        return f"{self.unit}, {matrices}-matrix FFN, {tokens} {self.counted} each layer, {parts}"


APPENDIX_C = Accounting(ffn_matrices=2)  # Nüwa's Table 4
AS_COMPUTED = Accounting()


def prefill(schedule: TokenSchedule, llm: LlmShape, accounting: Accounting) -> int:
    """Arithmetic of the prefill under ``schedule``, in ``accounting.unit``; see :meth:`Accounting.label`.

    Per layer with S tokens and width H: ``8 S H² + 4 S² H + 4 S H I`` FLOP with two FFN matrices, ``6 S H I`` with
    three (appendix C). Query heads wider than H and fewer key-value heads are counted as they are.
    """
    tokens = schedule.entering if accounting.counted == "entering" else schedule.leaving
    matrices = accounting.ffn_matrices or llm.ffn_matrices
    width = llm.heads * llm.head_dim
    lengths = [count + accounting.text_tokens for count in tokens]
    kv_width = llm.kv_heads * llm.head_dim
    macs = sum(_layer_macs(length, llm.hidden, width, kv_width, llm.intermediate, matrices) for length in lengths)
    macs += accounting.vision.macs() if accounting.vision else 0
    return macs * (2 if accounting.unit == "FLOP" else 1)


def _layer_macs(tokens: int, hidden: int, width: int, kv_width: int, intermediate: int, matrices: int) -> int:
    """Multiply-accumulates of one layer: projections, attention, FFN. ``width``: all heads together."""
    projections = 2 * tokens * hidden * (width + kv_width)
    return projections + 2 * tokens**2 * width + matrices * tokens * hidden * intermediate


def kv_cache_bytes(schedule: TokenSchedule, llm: LlmShape, bytes_per_number: int, text_tokens: int = 0) -> int:
    """Keys and values of all layers after the prefill: ``2 * kv_heads * head_dim`` numbers a token and layer."""
    tokens = sum(schedule.cached) + schedule.layers * text_tokens
    return tokens * 2 * llm.kv_heads * llm.head_dim * bytes_per_number


def attention_score_flops(queries: int, visual: int, hidden: int) -> int:
    """FLOP of scoring ``visual`` tokens by the attention of ``queries`` rows (appendix C)."""
    return 2 * queries * visual * hidden


def pairwise_cosine_flops(visual: int, hidden: int) -> int:
    """FLOP of the cosines between all pairs of ``visual`` tokens, each pair once (appendix C)."""
    return visual**2 * hidden


def norm_flops(visual: int, hidden: int) -> int:
    """FLOP of the norms of ``visual`` vectors (appendix C)."""
    return 2 * visual * hidden


def cost_columns(schedule: TokenSchedule, llm: LlmShape, bytes_per_number: int) -> dict[str, Any]:
    """Costs of a trial's visual tokens in the language model, as columns of ``trials.parquet``."""
    return {
        "flops": float(prefill(schedule, llm, AS_COMPUTED)),
        "flops_convention": AS_COMPUTED.label(llm),
        "kv_bytes": float(kv_cache_bytes(schedule, llm, bytes_per_number)),
    }
