"""Prompts as stock builds them: ids of questions and templates of every kind beside transformers' own call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nuwa.vlm import Adapter, load_adapter

TESTBED = Path(__file__).parents[2] / "models" / "testbed"
PICTURE = Image.new("RGB", (96, 96), "red")


def ids(vlm: Adapter, question: str) -> list[int]:
    """What the adapter gives, with one placeholder where the image stands."""
    prompt = vlm.encode_prompt(question)
    return [*prompt.before, vlm.image_token, *prompt.after]


def as_one(vlm: Adapter, encoded: Any) -> list[int]:
    """Input ids with the run of the image's placeholders taken as one."""
    held = encoded["input_ids"][0].tolist()
    first = held.index(vlm.image_token)
    return [token for at, token in enumerate(held) if token != vlm.image_token or at == first]


def turn(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": question}]}]


QUESTIONS = {
    "nothing": "",
    "a space": " ",
    "lines": "what is\n\n on the left ?\n",
    "the end token's text": "is it red ?</s> or blue ?",
    "the beginning's text": "<s> is it red ?",
    "another family's marks": "<|im_start|>user is it red ?<|im_end|>",
    "part of the placeholder": "an <image of < image > ?",
    "other letters": "où est 左 😀 ?",
    "long": "is it red or blue ? " * 200,
    "braces of a template": "{{ bos_token }} {% raw %}",
}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_any_question_is_asked_as_stock_asks_it(family, question):
    rendered = family.processor.apply_chat_template(turn(question), add_generation_prompt=True, tokenize=False)
    encoded = family.processor(text=[rendered], images=[PICTURE], return_tensors="pt")
    assert ids(family, question) == as_one(family, encoded)


def template(change) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.write_text(change(path.read_text()), encoding="utf-8")

    return apply


def tokenizer(**values: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


FOLDERS = {
    "the beginning by the template": template("{{ bos_token }}".__add__),
    "twice by the template": template("{{ bos_token }}{{ bos_token }}".__add__),
    "behind a space": template(" {{ bos_token }}".__add__),
    "the end behind the question": template(lambda text: text.replace(" ASSISTANT:{%", "</s> ASSISTANT:{%")),
    "a system prompt": template("A curious human. {# said first #}".__add__),
    "lines at the end": template(lambda text: text + "\n\n"),
    "no beginning": tokenizer(add_bos_token=False, bos_token=None),
    "an end by the tokenizer": tokenizer(add_eos_token=True),
    "another side of padding": tokenizer(padding_side="right"),
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_a_folders_template_and_tokenizer_are_used_as_stock_uses_them(change, tmp_path):
    folder = Path(shutil.copytree(TESTBED, tmp_path / "model"))
    change(folder)
    vlm = load_adapter(folder)
    encoded = vlm.processor.apply_chat_template(
        turn("is it red ?"), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ids(vlm, "is it red ?") == as_one(vlm, encoded)
