"""How large everything is: as in the papers on a GPU, tiny in a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig

from nuwa.vlm.shapes import model_shape

LLAVA, LLAVA_NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
TRUE_TOKENS = {LLAVA: 576, LLAVA_NEXT: 2928}  # of a square image, newline tokens included


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt: ``before`` the image; ``instruction``, an expression of ``shortest`` to ``longest``, ``closing``
    behind it. Answers have ``answer`` (least, most) tokens.

    Grounding as LLaVA-1.5 is asked: vicuna_v1's system prompt, "Please provide the bounding box ...", an expression of
    RefCOCO's 1 to 9 words, four numbers of two decimals.
    """

    before: int = 35
    instruction: int = 18
    shortest: int = 2
    longest: int = 12
    closing: int = 5
    answer: tuple[int, int] = (22, 28)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes of all parts.

    ``scenes``, ``questions``: the testbed's images, and questions about each. ``photos``: images shown to the tiny
    families. ``answer_tokens``: how long answers of part (a) may be. ``shape``: a published checkpoint's configuration. ``side``: pixels of the square images, by model.
    ``questions_an_image``, ``output_tokens``, ``repeats``: of part (b). ``batches``, ``batch_questions``: images of part
    (c), and questions about each; ``stock_rows``, ``stock_batches``: rows that stock ``generate`` gets at once, and how
    often. ``traced_tokens``: generated under the profiler in part (d). ``tiny``: whether models are small stand-ins.
    """

    scenes: int
    questions: int
    photos: int
    answer_tokens: int
    shape: Callable[[str], PretrainedConfig]
    side: dict[str, int]
    questions_an_image: tuple[int, ...]
    output_tokens: int
    repeats: int
    lengths: Lengths
    batches: tuple[int, ...]
    batch_questions: int
    stock_rows: int
    stock_batches: int
    traced_tokens: int
    tiny: bool = False

    def budget(self, path: str, average_tokens: float, tokens: int) -> float:
        """``average_tokens`` of the true model; of a tiny one twice the share of its ``tokens``, since few newline tokens
        and a first cut behind one layer of 8 are much of them."""
        return 2 * average_tokens * tokens / TRUE_TOKENS[path] if self.tiny else average_tokens


def tiny_shape(path: str) -> PretrainedConfig:
    """A checkpoint's configuration with everything but its structure made small: 64 tokens a crop, 8 layers of 64."""
    config = model_shape(path)
    crop = 8 * config.vision_config.patch_size
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    for name, value in (narrow | {"num_hidden_layers": 3, "image_size": crop, "projection_dim": 32}).items():
        setattr(config.vision_config, name, value)
    text = narrow | {"num_hidden_layers": 8, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320}
    for name, value in text.items():
        setattr(config.text_config, name, value)
    config.image_token_id = 300
    if hasattr(config, "image_grid_pinpoints"):
        config.image_grid_pinpoints = [[side // 336 * crop for side in pair] for pair in config.image_grid_pinpoints]
    return config


FULL = Scale(
    scenes=40,
    questions=10,
    photos=8,
    answer_tokens=16,
    shape=model_shape,
    side={LLAVA: 336, LLAVA_NEXT: 672},
    questions_an_image=(1, 10),
    output_tokens=32,
    repeats=5,
    lengths=Lengths(),
    batches=(8, 32),
    batch_questions=10,
    stock_rows=32,
    stock_batches=2,
    traced_tokens=9,
)
DRY = Scale(
    scenes=2,
    questions=5,
    photos=2,
    answer_tokens=4,
    shape=tiny_shape,
    side={LLAVA: 112, LLAVA_NEXT: 224},
    questions_an_image=(1, 2),
    output_tokens=3,
    repeats=1,
    lengths=Lengths(4, 3, 1, 3, 2, (2, 4)),
    batches=(1, 2),
    batch_questions=2,
    stock_rows=2,
    stock_batches=1,
    traced_tokens=3,
    tiny=True,
)
