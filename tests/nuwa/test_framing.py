"""How words and images are handed to a model: LLaVA-1.5's system prompt and padded squares, or the processor's own way."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import nuwa
from nuwa.vlm import adapt
from nuwa.vlm.llava import pad_to_square

torch.set_num_threads(1)
ASKED = "what is on the left ?"
# Renders as the template of LLaVA-1.5's published conversion does.
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
VICUNA_V1 = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. USER: <image>\n" + ASKED + " ASSISTANT:"
)


LLAVA_V1 = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the human's questions. USER: <image>\n" + ASKED + " ASSISTANT:"
)


def published(vlm):
    processor = copy.copy(vlm.processor)
    processor.chat_template = PUBLISHED
    return processor


def stock_answer(vlm, processor, image, conversation) -> tuple[int, ...]:
    """From the whole text of a conversation through the processor and the model's own ``generate``."""
    inputs = processor(images=[image], text=[conversation], return_tensors="pt")
    out = vlm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    made = out[0, inputs["input_ids"].shape[1] :].tolist()
    end = vlm.model.generation_config.eos_token_id
    return tuple(made[: made.index(end)] if end in made else made)


def test_llava_v1_is_llavas_conversation_word_for_word(tiny_next):
    processor = published(tiny_next)
    vlm = adapt(tiny_next.model, processor, conversation="llava_v1")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}
    text = processor.apply_chat_template([*vlm.opening, turn], add_generation_prompt=True, tokenize=False)
    assert text == LLAVA_V1


def test_vicuna_v1_is_llavas_conversation_word_for_word(tiny_next, photos):
    processor = published(tiny_next)
    vlm = adapt(tiny_next.model, processor, conversation="vicuna_v1")
    ids = processor.tokenizer(VICUNA_V1).input_ids
    at = ids.index(vlm.image_token)
    found = vlm.encode_prompt(ASKED)
    assert (list(found.before), list(found.after)) == (ids[:at], ids[at + 1 :])
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]}
    options = {"add_generation_prompt": True, "tokenize": False}
    assert processor.apply_chat_template([*vlm.opening, turn], **options) == VICUNA_V1
    assert processor.apply_chat_template([*adapt(vlm.model, processor).opening, turn], **options) == (
        f"USER: <image>\n{ASKED} ASSISTANT:"
    )


def test_the_system_prompt_reaches_the_model(tiny_next, photos):
    processor = published(tiny_next)
    options = {"method": "unpruned", "max_new_tokens": 6}
    answers = {
        name: [
            nuwa.generate(tiny_next.model, processor, [photo], [ASKED], conversation=name, **options)[0].tokens
            for photo in photos
        ]
        for name in ("vicuna_v1", "template")
    }
    without = VICUNA_V1.partition("questions. ")[2]
    assert answers["vicuna_v1"] == [stock_answer(tiny_next, processor, photo, VICUNA_V1) for photo in photos]
    assert answers["template"] == [stock_answer(tiny_next, processor, photo, without) for photo in photos]
    assert answers["vicuna_v1"] != answers["template"]


def test_a_template_that_hides_the_system_prompt_is_refused(tiny_next):
    processor = copy.copy(tiny_next.processor)
    processor.chat_template = "{% for message in messages if message['role'] == 'user' %}<image> {{ message['content'][-1]['text'] }}{% endfor %}"
    adapt(tiny_next.model, processor).encode_prompt(ASKED)
    with pytest.raises(ValueError) as caught:
        adapt(tiny_next.model, processor, conversation="vicuna_v1").encode_prompt(ASKED)
    assert str(caught.value) == "the model's chat template shows no system prompt: use conversation 'template'"


# --- images


@pytest.mark.parametrize("size", [(60, 40), (31, 70), (48, 48), (5, 2)])
def test_padding_centres_the_image_in_a_square(size):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    side, (width, height) = max(size), size
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = (122, 116, 104)
    top, left = (side - height) // 2, (side - width) // 2
    for row in range(height):
        for column in range(width):
            expected[top + row, left + column] = pixels[row, column]
    assert np.array_equal(np.asarray(pad_to_square(Image.fromarray(pixels), (122, 116, 104))), expected)


@pytest.fixture
def cropping(tiny_vlm):
    """The tiny model behind a processor that cuts the middle out, as the published conversion's does."""
    processor = copy.copy(tiny_vlm.processor)
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})
    return tiny_vlm.model, processor


def test_a_padded_image_is_seen_to_its_edges(cropping):
    """Red at the left edge and blue at the right of a wide photo: cut off by the processor, kept by padding."""
    model, processor = cropping
    wide = np.full((480, 640, 3), 128, np.uint8)
    wide[:, :80], wide[:, -80:] = (255, 0, 0), (0, 0, 255)
    image = Image.fromarray(wide)
    cropped, padded = (
        adapt(model, processor, image_aspect_ratio=ratio).pixels([image])[0] for ratio in ("processor", "pad")
    )
    assert cropped.shape == padded.shape
    redness = [(one[0] - one[2]).flatten() for one in (cropped, padded)]
    assert redness[0].abs().max() < 1, "the middle is grey, but for what resizing smears over its edge"
    assert redness[1].max() > 2 and redness[1].min() < -2
    bars = padded[:, :2].mean(dim=(1, 2))
    assert bars.abs().max() < 0.02, "the bars have the processor's mean colour"


def test_framing_is_part_of_the_identities(cropping):
    model, processor = cropping
    processor.chat_template = PUBLISHED
    usual = adapt(model, processor)
    padded = adapt(model, processor, image_aspect_ratio="pad")
    spoken_to = adapt(model, processor, conversation="vicuna_v1")
    assert padded.encoder_fingerprint() != usual.encoder_fingerprint() == spoken_to.encoder_fingerprint()
    assert len({one.fingerprint() for one in (usual, padded, spoken_to)}) == 3


@pytest.mark.parametrize(
    ("framing", "message"),
    [
        ({"conversation": "vicuna"}, "conversation 'vicuna' is unknown; allowed: template, vicuna_v1, llava_v1, qwen"),
        (
            {"image_aspect_ratio": "pad"},
            "image_aspect_ratio 'pad' is not for LLaVA-NeXT's CLIP tower; allowed: processor",
        ),
    ],
)
def test_framing_that_cannot_be_had_is_refused(tiny_next, framing, message):
    with pytest.raises(ValueError) as caught:
        adapt(tiny_next.model, tiny_next.processor, **framing)
    assert str(caught.value) == message
