"""Tiny models of the three families with random weights: the stock classes, every structural feature on.

Weights are loud, so that answers depend on what is seen and on where it stands. Nothing here needs torchvision, which the
halves of transformers' processors that read videos import.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizerFast,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from nuwa.testbed.architecture import build_model, model_config
from nuwa.testbed.language import build_processor
from nuwa.vlm import (
    Idefics3Adapter,
    InternVLAdapter,
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    Qwen2_5VLAdapter,
    Qwen2VLAdapter,
    Qwen3VLAdapter,
    SmolVLMAdapter,
)

WORDS = [
    "what",
    "is",
    "on",
    "the",
    "left",
    "right",
    "red",
    "blue",
    "a",
    "how",
    "many",
    "where",
    "near",
    "cat",
    "dog",
    "sign",
    "user",
    "assistant",
    ":",
    "?",
]
TEMPLATE = (
    "{% for message in messages %}user : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    """One token a word, padded at the left; ``named``: special tokens by what a processor calls them."""
    vocabulary = {word: at for at, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
        padding_side="left",
        model_max_length=4096,
        **({"model_specific_special_tokens": named} if named else {}),
    )


# Sizes of every language model: query heads in groups of two.
TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _text(words: PreTrainedTokenizerFast, **own: Any) -> dict[str, Any]:
    """:data:`TEXT` for these words; ``own``: what a family has beside it."""
    return TEXT | {"vocab_size": len(words)} | own


class WithoutVideos(ProcessorMixin):
    """A stock processor without its half for videos, which cannot be made without torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def louden(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.6 if "embed_tokens" in name else 0.16)
            elif "bias" in name:
                parameter.normal_(0, 0.1)


def tiny_llava() -> LlavaAdapter:
    """The testbed's architecture with random weights, loud enough that answers depend on what is seen."""
    torch.manual_seed(3)
    processor = build_processor()
    tokenizer = processor.tokenizer
    config = model_config(
        len(tokenizer), processor.image_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    config.text_config.num_key_value_heads = 2

    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12 if "embed" not in name else 0.5)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.15)
    return LlavaAdapter(model.requires_grad_(False), processor)


def tiny_next() -> LlavaNextAdapter:
    """A 6x6 base crop, anyres grids of up to four crops, grouped query heads."""
    torch.manual_seed(11)
    words = tokenizer("<image>")
    crop, patch = 24, 4
    pinpoints = [[24, 48], [48, 24], [48, 48], [24, 96]]

    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            projection_dim=16,
            num_hidden_layers=6,
            num_attention_heads=2,
            image_size=crop,
            patch_size=patch,
        ),
        text_config=LlamaConfig(**_text(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(crop // patch) ** 2,
    )

    model = LlavaNextForConditionalGeneration(config)
    louden(model)
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": crop},
            crop_size={"height": crop, "width": crop},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image> "),
    )
    return LlavaNextAdapter(model.requires_grad_(False), processor)


class PicturesOnly(WithoutVideos, LlavaOnevisionProcessor):
    """Of LLaVA-OneVision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        super().__init__(
            image_processor,
            tokenizer,
            None,
            num_image_tokens,
            vision_feature_select_strategy,
            chat_template,
            vision_aspect_ratio=vision_aspect_ratio,
        )


def tiny_onevision() -> LlavaOnevisionAdapter:
    """A 6x6 base crop, anyres grids of up to eight crops, of which those above four crops are pooled; grouped query heads."""
    torch.manual_seed(31)
    words = tokenizer("<image>", "<video>")
    identity = words.convert_tokens_to_ids
    crop, patch = 24, 4
    pinpoints = [[24, 24], [24, 48], [48, 24], [48, 48], [24, 96], [48, 96], [96, 48]]

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "image_size": crop,
            "patch_size": patch,
            "vision_use_head": False,
        },
        text_config=_text(words, model_type="qwen2"),
        image_token_index=identity("<image>"),
        video_token_index=identity("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_4",
    )

    model = LlavaOnevisionForConditionalGeneration(config)
    louden(model)
    processor = PicturesOnly(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": crop, "width": crop}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=words,
        num_image_tokens=(crop // patch) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4",
        chat_template=TEMPLATE.replace("IMAGE", "<image> "),
    )
    return LlavaOnevisionAdapter(model.requires_grad_(False), processor)


QWEN_TEMPLATE = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|> ")


QWEN_MARKS = {  # by what a configuration calls them
    "vision_start_token_id": "<|vision_start|>",
    "image_token_id": "<|image_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "video_token_id": "<|video_pad|>",
}


def _qwen_marks(words: PreTrainedTokenizerFast) -> dict[str, int]:
    return {name: words.convert_tokens_to_ids(mark) for name, mark in QWEN_MARKS.items()}


def _sections(widths: list[int]) -> dict[str, Any]:
    """M-RoPE with pairs of a head's dimensions for time, rows and columns."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": widths}


def _ends_answers(model: Any) -> None:
    """The words' own end of a sequence, where the family's configuration leaves it open."""
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0


class QwenWithoutVideos(WithoutVideos):
    """What the processors of the Qwen family are made of without videos."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template)


class Qwen2PicturesOnly(QwenWithoutVideos, Qwen2VLProcessor):
    """Of Qwen2-VL."""


class Qwen2_5PicturesOnly(QwenWithoutVideos, Qwen2_5_VLProcessor):
    """Of Qwen2.5-VL."""


def tiny_qwen() -> Qwen2_5VLAdapter:
    """Dynamic grids, windows that do not divide them, full attention in two of five blocks, M-RoPE, grouped heads."""
    torch.manual_seed(12)
    words = tokenizer(*QWEN_MARKS.values())

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 5,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 24,
            "out_hidden_size": 48,
            "fullatt_block_indexes": [2, 4],
        },
        text_config=_text(words, rope_parameters=_sections([2, 2, 2])),
        **_qwen_marks(words),
        tie_word_embeddings=False,
    )

    model = Qwen2_5_VLForConditionalGeneration(config)
    louden(model)
    _ends_answers(model)
    processor = Qwen2_5PicturesOnly(_qwen_pictures(), words, QWEN_TEMPLATE)
    return Qwen2_5VLAdapter(model.requires_grad_(False), processor)


def tiny_qwen2() -> Qwen2VLAdapter:
    """Dynamic grids, M-RoPE with sections of different widths, grouped heads, an encoder wider than half the text's."""
    torch.manual_seed(21)
    words = tokenizer(*QWEN_MARKS.values())

    config = Qwen2VLConfig(
        vision_config={
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": 48,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
        },
        text_config=_text(words, rope_parameters=_sections([2, 3, 1])),
        **_qwen_marks(words),
        tie_word_embeddings=False,
    )

    model = Qwen2VLForConditionalGeneration(config)
    louden(model)
    _ends_answers(model)
    processor = Qwen2PicturesOnly(_qwen_pictures(), words, QWEN_TEMPLATE)
    return Qwen2VLAdapter(model.requires_grad_(False), processor)


class QwenPicturesOnly(QwenWithoutVideos, Qwen3VLProcessor):
    """Of Qwen3-VL."""


def tiny_qwen3() -> Qwen3VLAdapter:
    """Features that enter the first two layers, sections interleaved, heads wider than their share, q and k normalised."""
    torch.manual_seed(41)
    words = tokenizer(*QWEN_MARKS.values())

    config = Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 48,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        },
        text_config=_text(words, head_dim=16, rope_parameters=_sections([4, 2, 2])),
        **_qwen_marks(words),
    )

    model = Qwen3VLForConditionalGeneration(config)
    louden(model)
    _ends_answers(model)
    processor = QwenPicturesOnly(_qwen_pictures(), words, QWEN_TEMPLATE)
    return Qwen3VLAdapter(model.requires_grad_(False), processor)


class InternVLPicturesOnly(WithoutVideos, InternVLProcessor):
    """Of InternVL3."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 256,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template)


def tiny_internvl() -> InternVLAdapter:
    """Up to four tiles of 3x3 tokens and a thumbnail, queries and keys of the encoder normalised, a norm behind it."""
    torch.manual_seed(51)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(*names.values(), **names)

    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "attention_bias": True,
            "use_qk_norm": True,
            "use_mean_pooling": False,
            "image_size": [24, 24],
            "patch_size": [4, 4],
        },
        text_config=_text(words, model_type="qwen2"),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
        tie_word_embeddings=False,
    )

    model = InternVLForConditionalGeneration(config)
    louden(model)
    processor = InternVLPicturesOnly(
        GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=4),
        words,
        9,
        TEMPLATE.replace("IMAGE", "<IMG_CONTEXT> "),
    )
    return InternVLAdapter(model.requires_grad_(False), processor)


class SmolVLMPicturesOnly(WithoutVideos, SmolVLMProcessor):
    """Of SmolVLM2, whose half for videos asks for num2words too."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
    ) -> None:
        self.fake_image_token, self.global_image_token = "<fake_token_around_image>", "<global-img>"
        self.image_token, self.video_token = "<image>", "<video>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_seq_len = image_seq_len
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def apply_chat_template(self, *arguments: Any, **named: Any) -> Any:
        return ProcessorMixin.apply_chat_template(self, *arguments, **named)


SMOLVLM_SIZES = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 4,
    },
    "text_config": {"model_type": "llama"} | TEXT,
    "scale_factor": 2,
}
TILES_OF_24 = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}}


def _smolvlm_words() -> PreTrainedTokenizerFast:
    names = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    return tokenizer("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *names, "\n\n", "\n")


def tiny_smolvlm() -> SmolVLMAdapter:
    """Up to two rows and columns of tiles of 3x3 tokens and the whole, all named; grouped query heads."""
    torch.manual_seed(61)
    words = _smolvlm_words()
    config = SmolVLMConfig(**SMOLVLM_SIZES, image_token_id=words.convert_tokens_to_ids("<image>"))
    config.text_config.vocab_size = len(words)
    model = SmolVLMForConditionalGeneration(config)
    louden(model)
    processor = SmolVLMPicturesOnly(
        SmolVLMImageProcessorPil(**TILES_OF_24), words, 9, TEMPLATE.replace("IMAGE", "<image>")
    )
    return SmolVLMAdapter(model.requires_grad_(False), processor)


def tiny_idefics3() -> Idefics3Adapter:
    """The same sizes in the older class."""
    torch.manual_seed(62)
    words = _smolvlm_words()
    config = Idefics3Config(**SMOLVLM_SIZES, image_token_id=words.convert_tokens_to_ids("<image>"))
    config.text_config.vocab_size = len(words)
    model = Idefics3ForConditionalGeneration(config)
    louden(model)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(**TILES_OF_24), words, 9, TEMPLATE.replace("IMAGE", "<image>")
    )
    return Idefics3Adapter(model.requires_grad_(False), processor)


def _qwen_pictures() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 80 * 80}
    )


# (width, height): wide and tall ones that lose padding, squares, odd sides.
SIZES = [(60, 40), (30, 70), (48, 48), (100, 30), (41, 57), (60, 40), (73, 65), (24, 90)]


def draw_photos() -> list[Image.Image]:
    """Coarse random pictures of :data:`SIZES`."""
    rng = np.random.default_rng(8)
    photos = []
    for width, height in SIZES:
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        photos.append(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return photos


def write_text_tower(vlm: LlavaAdapter | LlavaNextAdapter, folder: Path, longest: int = 12) -> Path:
    """A CLIP model whose vision half is the encoder of ``vlm``, its text half random; letters are its words."""
    letters = [*"abcdefghijklmnopqrstuvwxyz?.,"]
    words = ["!", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    text = {
        "vocab_size": len(words),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": longest,
        "bos_token_id": len(words) - 2,
        "eos_token_id": len(words) - 1,
        "pad_token_id": 0,
    }

    torch.manual_seed(21)
    vision = vlm.model.config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    louden(clip)
    clip.vision_model.load_state_dict(vlm.tower.state_dict())
    clip.save_pretrained(folder)
    CLIPTokenizerFast(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder
