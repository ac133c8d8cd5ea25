"""Prompts as stock builds them: ids of questions and templates of every kind beside transformers' own call."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from nuwa.vlm import Adapter, LlavaAdapter, load_adapter
from nuwa.vlm.adapter import CONVERSATIONS

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


# What LLaVA-1.5's published template makes of a system prompt, images and a text.
PUBLISHED = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def of_llamas_kind(placeholder: int) -> Any:
    """A tokenizer of single characters with Llama's rules: a blank before every piece of text, ``<s>`` in front."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [letter for letter in map(chr, range(10, 127)) if letter == "\n" or letter > "\x1f"]
    numbers = iter(number for number in range(1000) if number != placeholder)
    vocabulary = {token: next(numbers) for token in ("<unk>", "<s>", "</s>", "▁", *letters)} | {"<image>": placeholder}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<image>"]
    )


@pytest.mark.parametrize("conversation", ["vicuna_v1", "llava_v1"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_input_ids_are_those_of_llava_s_own_code(tiny_vlm, conversation, images):
    """LLaVA splits a prompt at ``<image>`` and tokenizes the pieces alone, of which the first keeps its ``<s>``."""
    tokenizer = of_llamas_kind(tiny_vlm.image_token)
    tokenizer.chat_template = PUBLISHED
    processor = SimpleNamespace(
        tokenizer=tokenizer,
        image_processor=tiny_vlm.processor.image_processor,
        apply_chat_template=tokenizer.apply_chat_template,
        chat_template=PUBLISHED,
    )
    vlm = LlavaAdapter(tiny_vlm.model, processor, conversation=conversation)

    for question in ("Is it red?", " a blank before", "<image 1> or <image 2>?\nA. yes\n\nLetter.", "x" * 300):
        shown = " ".join(["<image>"] * images)
        pieces = f"{CONVERSATIONS[conversation]} USER: {shown}\n{question} ASSISTANT:".split("<image>")
        begin, *others = [tokenizer(piece).input_ids for piece in pieces]
        *between, behind = [piece[1:] for piece in others]
        prompt = vlm.encode_prompt(question, images)
        assert prompt.before == tuple(begin) and prompt.after == tuple(behind)
        assert prompt.between == tuple(map(tuple, between))
        assert [tokenizer.convert_ids_to_tokens(piece) for piece in between] == [["▁", "▁"]] * (images - 1)
        assert tokenizer.unk_token_id not in behind
