"""A tiny LLaVA-1.5 with a tokenizer and chat template of its kind, and small instruction data in LLaVA's form."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.gpu.families import louden
from nuwa.vlm import LlavaAdapter

SIDE, PATCH = 24, 4
# As the published checkpoint's: typed parts, images first, a space behind every text, no end token after an answer.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = [
    "USER: What is on the left? ASSISTANT: A red cat near the sign.",
    "How many dogs are there? Two. Is the sign blue? No, it is red.",
    "Answer the question using a single word or phrase. Describe the image. left right above below",
]


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE that writes spaces as ``▁`` and puts one before every text, like Llama's."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{value:02X}>" for value in range(256))]
    core.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    core = Tokenizer.from_str(_without_byte_tokens_among_the_special(core.to_str()))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[AddedToken("<image>", special=True, normalized=False)],
        padding_side="left",
        model_max_length=4096,
    )


def _without_byte_tokens_among_the_special(text: str) -> str:
    """Bytes are in the vocabulary, but a text that spells ``<0x41>`` does not mean one."""
    content = json.loads(text)
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


@functools.cache
def _processor(template: str) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=llama_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )


def tiny_llava(template: str = TEMPLATE) -> LlavaAdapter:
    """A fresh one with the same random weights every time: 36 tokens an image."""
    processor = _processor(template)
    words = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            projection_dim=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=len(words),
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = LlavaForConditionalGeneration(config)
        louden(model)
    model.generation_config.eos_token_id = 2
    return LlavaAdapter(model.requires_grad_(False), processor)


def entry(number: int, *said: str, image: str | None = "") -> dict:
    """An entry of the file; ``image`` null: text only."""
    turns = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(said)]
    named = {} if image is None else {"image": image or f"photos/{number}.png"}
    return {"id": f"{number:03}", **named, "conversations": turns}


ENTRIES = [
    entry(0, "<image>\nWhat is on the left?\nAnswer the question using a single word or phrase.", "A red cat"),
    entry(1, "Is the sign blue?\n<image>", "No, it is red.", "How many dogs are there?", "Two", "Where?", " left "),
    entry(2, "What is a dog?", "A dog is a dog.", image=None),
    entry(3, "<image>\nDescribe the image.", "Ein Café – 猫 near the sign\nand two dogs."),
    entry(4, "<image>\nHow many?", "", "Is there a cat?", "No"),
    entry(5, "Say something.", "Something.", image=None) | {"model": ""},
    entry(6, "<image>\nWhat is above the sign?", "A dog") | {"source": {"split": "train"}},
    entry(7, "<image>\nWhat is below?", "A blue sign", "And right?", "A cat"),
]


def write_data(folder: Path, entries: list = ENTRIES, **options) -> Path:
    """The file, with a photo of its own for every entry that names one."""
    rng = np.random.default_rng(4)
    for number, one in enumerate(entries):
        if isinstance(one, dict) and isinstance(name := one.get("image"), str) and name:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (30 + number, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert("L" if number == 6 else "RGB").save(path)
    path = folder / "instructions.json"
    path.write_text(json.dumps(entries, **options), encoding="utf-8")
    return path
