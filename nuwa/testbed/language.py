"""The testbed's words: a word-level tokenizer and a LLaVA-style processor, both stock transformers classes."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nuwa.testbed.architecture import GRID, PATCH_SIZE
from nuwa.testbed.scenes import COLOR_NAMES, IMAGE_SIZE
from nuwa.testbed.vision import PIXEL_MEAN, PIXEL_STD

BOS, EOS, PAD, UNK, IMAGE = "<s>", "</s>", "<pad>", "<unk>", "<image>"
# One turn about one image, rendered as "USER: <image>\nlocate the red 3 ASSISTANT:".
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% else %} ASSISTANT: {{ message['content'][0]['text'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
SPECIAL = (BOS, EOS, PAD, UNK, IMAGE)
DIGITS = tuple(str(digit) for digit in range(10))
COORDINATES = tuple(f"{value / 100:.2f}" for value in range(101))
WORDS = tuple(
    [
        "user",
        "assistant",
        ":",
        "[",
        "]",
        ",",
        ".",
        "?",
        "the",
        "a",
        "of",
        "is",
        "are",
        "there",
        "in",
        "this",
        "image",
        "how",
        "many",
        "what",
        "color",
        "digit",
        "digits",
        "locate",
        "left",
        "right",
        "top",
        "bottom",
        "above",
        "below",
        "on",
        "that",
        "and",
        "looks",
        "like",
        "yes",
        "no",
        "it",
    ]
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, punctuation mark, digit or two-decimal number; ``decode`` gives ``[0.12, 0.30, 0.34, 0.55]``."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS, *COLOR_NAMES, *DIGITS, *COORDINATES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\.\d\d|\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" ,", ","),
            decoders.Replace("[ ", "["),
            decoders.Replace(" ]", "]"),
            decoders.Replace(" ?", "?"),
            decoders.Replace(" :", ":"),
        ]
    )

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """96x96 images pass unresized; ``<image>`` expands to the grid's 144 tokens."""
    return LlavaProcessor(
        # Scenes have the size of the tower, so resizing passes them as they are.
        image_processor=CLIPImageProcessorPil(
            do_resize=True,
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            do_center_crop=False,
            do_rescale=True,
            do_normalize=True,
            image_mean=list(PIXEL_MEAN),
            image_std=list(PIXEL_STD),
            do_convert_rgb=True,
        ),
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def format_box(bbox: list[float], width: int, height: int) -> str:
    """``[x, y, w, h]`` pixels → ``[left, top, right, bottom]`` text, as shares of the image with two decimals."""
    x, y, w, h = bbox
    edges = (x / width, y / height, (x + w) / width, (y + h) / height)
    return "[" + ", ".join(f"{edge:.2f}" for edge in edges) + "]"


IMAGE_TOKENS = GRID * GRID
