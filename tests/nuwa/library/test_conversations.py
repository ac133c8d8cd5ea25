"""Chat messages: what stock ``generate`` says to them, with the image and the turns where they stand."""

from __future__ import annotations

import base64
import copy

import pytest
import torch
from PIL import Image

import nuwa
from nuwa.vlm import LlavaAdapter

torch.set_num_threads(1)
MAX_NEW = 6
PLACE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def said(role, *parts):
    return {"role": role, "content": list(parts)}


@pytest.fixture(scope="module")
def pictures(family, scenes, photos):
    return [Image.fromarray(scene.image) for scene in scenes[:2]] if isinstance(family, LlavaAdapter) else photos[:2]


@pytest.fixture(scope="module")
def conversations(family):
    first, second = ("what is on the left ?", "how many red")
    if isinstance(family, LlavaAdapter):
        first, second = ("what digit is blue?", "how many digits are there?")
    answered = [said("user", PLACE, text(first)), said("assistant", text("red")), said("user", text(second))]
    late = [said("user", text(first)), said("assistant", text("blue")), said("user", text(second), PLACE, text(first))]
    return [[said("user", PLACE, text(first))], answered, late]


def stock(vlm, picture, messages):
    """What the stock model says to a conversation, by its own processor and template."""
    rendered = vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = vlm.processor(images=[picture], text=[rendered], return_tensors="pt")
    made = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tuple(token for token in made.tolist() if token not in vlm.end_tokens)


def test_unpruned_conversations_equal_stock_generate(family, pictures, conversations):
    asked = [conversations, conversations[::-1]]
    found = nuwa.generate(family.model, family.processor, pictures, asked, method="unpruned", max_new_tokens=MAX_NEW)
    for picture, messages, answers in zip(pictures, asked, found, strict=True):
        assert [one.tokens for one in answers] == [stock(family, picture, one) for one in messages]
    assert len({one.tokens for answers in found for one in answers}) > 3


def test_a_pruned_conversation_of_one_turn_is_the_question(family, pictures, conversations):
    options = {"average_tokens": 20, "max_new_tokens": MAX_NEW}
    (turn,) = conversations[0]
    question = turn["content"][1]["text"]
    held = [said("user", {"type": "image", "image": pictures[0]}, text(question))]
    plain = nuwa.generate(family.model, family.processor, pictures[0], question, **options)
    for images, messages in ((pictures[0], conversations[0]), (None, held)):
        found = nuwa.generate(family.model, family.processor, images, messages, **options)
        assert (found.tokens, found.kept, found.kept_last) == (plain.tokens, plain.kept, plain.kept_last)


def test_several_conversations_hold_their_images(tiny_qwen, photos, tmp_path):
    path = tmp_path / "photo.png"
    photos[1].save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    url = f"data:image/png;base64,{encoded}"
    parts = [
        {"type": "image", "image": photos[0]},
        {"type": "image", "path": path, "image": None, "text": None},  # as rows of a table have it
        *({"type": "image", "url": given} for given in (str(path), path.as_uri(), url)),
        *({"type": "image", "base64": given} for given in (encoded, url)),
        *({"type": "image_url", "image_url": given} for given in (url, {"url": url})),
    ]
    held = [[said("user", part, text("how many red"))] for part in parts]
    options = {"average_tokens": 20, "max_new_tokens": 2}
    found = nuwa.generate(tiny_qwen.model, tiny_qwen.processor, None, held, **options)
    plain = nuwa.generate(tiny_qwen.model, tiny_qwen.processor, photos[:2], ["how many red"] * 2, **options)
    assert [(one.tokens, one.kept) for one in found] == [(plain[at].tokens, plain[at].kept) for at in (0, *[1] * 8)]


def test_a_system_message_of_the_callers(tiny_qwen, photos):
    messages = [said("system", text("where is a dog ?")), said("user", PLACE, text("how many red"))]
    options = {"method": "unpruned", "max_new_tokens": MAX_NEW}
    found = nuwa.generate(tiny_qwen.model, tiny_qwen.processor, photos[0], messages, **options)
    assert found.tokens == stock(tiny_qwen, photos[0], messages)
    with pytest.raises(ValueError) as caught:
        nuwa.generate(tiny_qwen.model, tiny_qwen.processor, photos[0], messages, conversation="vicuna_v1", **options)
    assert str(caught.value) == "the conversation has a system message of its own; leave the argument conversation out"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for part in messages[-1]['content'] %}{% if part['type'] == 'image' %}<|image_pad|>{% else %}"
            "{{ part['text'] }}{% endif %}{% endfor %}",
            "the model's chat template does not show the user's 'what is on the left ?'",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the model's chat template refuses the conversation (roles must alternate)",
        ),
    ],
)
def test_a_template_that_drops_or_refuses_turns_is_not_asked(tiny_qwen, photos, template, message):
    processor = copy.copy(tiny_qwen.processor)
    processor.chat_template = template
    messages = [
        said("user", text("what is on the left ?")),
        said("assistant", text("a cat")),
        said("user", PLACE, text("how many red")),
    ]
    with pytest.raises(ValueError) as caught:
        nuwa.generate(tiny_qwen.model, processor, photos[0], messages, average_tokens=20)
    assert str(caught.value) == message
