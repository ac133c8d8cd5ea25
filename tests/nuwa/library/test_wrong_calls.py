"""Wrong calls of the library: one line each, which names the argument, its value and what is allowed, before any work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from listening import heard
from PIL import Image

import nuwa
from nuwa.methods import RECIPES
from nuwa.registry import unknown
from nuwa.stage2 import SCORERS

ASKED = "what is on the left ?"
PICTURE = Image.new("RGB", (60, 40), (200, 30, 30))
PLACE, TEXT = {"type": "image"}, {"type": "text", "text": ASKED}
TAKEN = "a path, bytes of an image file, a Pillow image, an array or a tensor"
KEYWORDS = (
    "average_tokens, batch_images, conversation, image_aspect_ratio, max_new_tokens, method, on_error, parameters, "
    "pass_tokens, position, preset, progress, retention, seed, stage2, text_tower, without_stage2"
)


def said(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(parts)}]


# What a call says otherwise than a right one, and what it is told.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": -3}, "max_new_tokens=-3 must be a whole number of 1 or more"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of 1 or more"),
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number of 1 or more"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number of 1 or more"),
    ({"batch_images": 0}, "batch_images=0 must be a whole number of 1 or more"),
    ({"batch_images": "8"}, "batch_images='8' must be a whole number of 1 or more"),
    ({"pass_tokens": 0}, "pass_tokens=0 must be a whole number of 1 or more"),
    ({"seed": -1}, "seed=-1 must be a whole number of 0 or more"),
    (
        {"max_tokens": 3},
        f"argument 'max_tokens' is unknown; allowed: {KEYWORDS}; did you mean 'max_new_tokens'?",
    ),
    ({"temperature": 0}, f"argument 'temperature' is unknown; allowed: {KEYWORDS}"),
    ({"method": "nuva"}, unknown("method", "nuva", RECIPES)),
    ({"method": None}, unknown("method", None, RECIPES)),
    ({"position": "sparse"}, "position 'sparse' is unknown; allowed: own, perc, pesp, rpme, gap"),
    (
        {"preset": "release"},
        "nuwa has no preset 'release'; allowed: released, released_next, released_qwen, paper, paper_next",
    ),
    ({"preset": 3}, "preset=3 must be a preset's name"),
    ({"preset": ""}, "preset='' must be a preset's name"),
    ({"average_tokens": None}, "method 'nuwa' needs average_tokens or retention, one of the two"),
    ({"retention": 0.5}, "method 'nuwa' needs average_tokens or retention, one of the two"),
    ({"average_tokens": None, "retention": 1.5}, "retention 1.5 must lie in (0, 1]"),
    ({"average_tokens": None, "retention": "half"}, "retention='half' must be a number"),
    ({"average_tokens": 0}, "average_tokens=0 must be above 0"),
    ({"average_tokens": float("nan")}, "average_tokens=nan must be a number"),
    ({"average_tokens": "64"}, "average_tokens='64' must be a number"),
    (
        {"average_tokens": 0.001},
        "budget 0.001 is out of reach with a stage-2 cut before layer 3 of 6: allowed 1..40 average tokens",
    ),
    ({"method": "unpruned"}, "method 'unpruned' takes neither average_tokens nor retention; leave them out"),
    (
        {"method": "unpruned", "average_tokens": None, "retention": 0.5},
        "method 'unpruned' takes neither average_tokens nor retention; leave them out",
    ),
    (
        {"method": "unpruned", "average_tokens": None, "stage2": {"ratio": 0.5}},
        "method 'unpruned' has no stage 2; leave stage2={'ratio': 0.5} out",
    ),
    (
        {"method": "unpruned", "average_tokens": None, "parameters": {"alpha": 1}},
        "unpruned has no parameter 'alpha'; allowed: none",
    ),
    (
        {"stage2": {"layers": 4}},
        "stage2: key 'layers' is unknown; allowed: layer, ratio, recycling, scorer; did you mean 'layer'?",
    ),
    ({"stage2": {"layer": 0}}, "stage2: layer 0 must lie in 1..5: the model has 6 layers"),
    ({"stage2": {"layer": 6}}, "stage2: layer 6 must lie in 1..5: the model has 6 layers"),
    ({"stage2": {"layer": "4"}}, "stage2: layer '4' must be a whole number, or several that ascend"),
    ({"stage2": {"layer": []}}, "stage2: layer [] must be a whole number, or several that ascend"),
    ({"stage2": {"layer": [4, 2]}}, "stage-2 layers 4, 2 must ascend"),
    ({"stage2": {"scorer": "attention"}}, unknown("stage-2 scorer", "attention", SCORERS)),
    ({"stage2": {"ratio": 2}}, "stage-2 ratio K2/K1 2 must lie in (0, 1]"),
    ({"stage2": {"ratio": "a half"}}, "stage2: ratio 'a half' must be a number"),
    ({"stage2": {"recycling": "yes"}}, "stage2: recycling 'yes' must be true or false"),
    ({"stage2": 4}, "stage2=4 must be a dictionary"),
    (
        {"stage2": {"scorer": "nope"}, "without_stage2": True},
        "without_stage2=True leaves nothing for stage2={'scorer': 'nope'} to do; give one of the two",
    ),
    ({"without_stage2": 1}, "without_stage2=1 must be true or false"),
    (
        {"method": "fastv", "without_stage2": True},
        "method 'fastv' prunes in stage 2 only; without_stage2=True would leave nothing of it",
    ),
    (
        {"method": "fastv", "stage2": {"ratio": 0.5}},
        "fastv keeps all tokens in stage 1; a stage-2 ratio of 0.5 would not: leave it out",
    ),
    ({"parameters": {"pillars": 1}}, "nuwa.pillars 1 is of the wrong type; allowed: bool"),
    ({"parameters": [1]}, "parameters=[1] must be a dictionary of hyper-parameters by name"),
    ({"parameters": {"coordinates": 2.0}}, "coordinates 2 must lie in [0, 1]"),
    ({"conversation": "vicuna"}, "conversation 'vicuna' is unknown; allowed: template, vicuna_v1, llava_v1, qwen"),
    (
        {"image_aspect_ratio": "pad"},
        "image_aspect_ratio 'pad' is not for Qwen2.5-VL's vision encoder; allowed: processor",
    ),
    ({"text_tower": 7}, "text_tower=7 must be a folder"),
    ({"on_error": "ignore"}, "on_error 'ignore' is unknown; allowed: raise, return"),
    ({"progress": "yes"}, "progress='yes' must be true, false, or a function of (done, all)"),
    (
        {"method": "downsample"},
        "method 'downsample' makes images smaller before the encoder, and Qwen2.5-VL's vision encoder chooses sizes by "
        "itself; it can be asked of LLaVA-1.5",
    ),
]
IMAGES: list[tuple[Any, str]] = [
    (7, f"images is of type int; give {TAKEN}, or a list of them"),
    ({"a": PICTURE}, f"images is of type dict; give {TAKEN}, or a list of them"),
    (torch.zeros(2, 2, 2, 2, 2), f"images is of type Tensor; give {TAKEN}, or a list of them"),
    ([None], f"NoneType is no image; give {TAKEN}"),
    (["nowhere.png"], "there is no file 'nowhere.png'"),
    (
        ["data:text/plain,hallo"],
        "'data:text/plain,hallo' is no image in base64; write the bytes of its file so, alone or behind data:image/png;base64,",
    ),
    (["file:///nowhere/a%20b.png"], "there is no file '/nowhere/a b.png'"),
    (
        [torch.zeros(3, 8, 8, device="meta")],
        "Tensor of shape (3, 8, 8) does not hold a number for every pixel; give a dense tensor of uint8 or floats in [0, 1]",
    ),
    (
        [torch.zeros(8, 8).to_sparse()],
        "Tensor of shape (8, 8) does not hold a number for every pixel; give a dense tensor of uint8 or floats in [0, 1]",
    ),
    (["https://example.org/a.png"], f"'https://example.org/a.png' is no path; fetch the image and give {TAKEN}"),
    ([b"no picture"], "its 10 image bytes cannot be opened (UnidentifiedImageError)"),
    (
        [np.zeros((8, 8, 2), np.uint8)],
        "ndarray of shape (8, 8, 2) is no image; allowed: (height, width), (height, width, channels) or "
        "(channels, height, width) with 1, 3 or 4 channels",
    ),
    (
        [np.full((8, 8, 3), 300)],
        "ndarray of shape (8, 8, 3) is of dtype int64; allowed: uint8, or floats in [0, 1]",
    ),
    (
        [torch.linspace(-1, 2, 192).view(3, 8, 8)],
        "Tensor of shape (3, 8, 8) has values from -1 to 2; floats are shares of white in [0, 1], whole numbers uint8",
    ),
    (
        [np.zeros((3, 9, 3), np.uint8)],
        "ndarray of shape (3, 9, 3) has its channels first or last, which cannot be told; give a Pillow image",
    ),
]
QUESTIONS: list[tuple[Any, Any, str]] = [
    ([PICTURE] * 2, [ASKED], "2 images but 1 questions; give one, or a list, for each image"),
    (
        [PICTURE] * 3,
        "abc",
        "questions is one text for 3 images; give a list of 3: a question, or a list of questions, for each image",
    ),
    (
        [PICTURE],
        "a",
        "questions is one text for a list of one image; give a list of 1: a question, or a list of questions, for each "
        "image",
    ),
    (
        [PICTURE] * 2,
        said(PLACE, TEXT),
        "questions is one conversation for 2 images; give a list of 2: a question, or a list of questions, for each image",
    ),
    (
        [PICTURE],
        None,
        "questions is of type NoneType; give a list of 1: a question, or a list of questions, for each image",
    ),
    ([PICTURE], [[]], "every image needs at least one question"),
    ([PICTURE], [7], "7 is no question; give a text, or messages with role and content"),
    (None, ASKED, "there is no image: give images, or conversations that hold theirs"),
    (None, said(PLACE, TEXT), "there is no image: give images, or put it into the messages"),
    (
        [PICTURE],
        [said(TEXT)],
        'questions[0]: the conversation speaks of no image; give a part {"type": "image"} where each stands',
    ),
    (
        [PICTURE],
        [said(PLACE, PLACE, TEXT)],
        "questions[0]: the conversation speaks of 2 images, and 1 is given; give one image for each part of type image",
    ),
    (
        [[PICTURE, PICTURE]],
        [said(PLACE, TEXT)],
        "questions[0]: the conversation speaks of 1 image, and 2 are given; give one image for each part of type image",
    ),
    ([[]], ["?"], "images[0] is an empty list; give an image, or a list of images"),
    (
        None,
        said({"type": "image", "image": PICTURE}, PLACE, TEXT),
        "the messages hold 1 of their 2 images; give all in the messages, or all as images",
    ),
    (
        [PICTURE],
        [[ASKED, said(PLACE, TEXT, role="human")]],
        "questions[0][1]: a message's role 'human' is unknown; allowed: system, user, assistant",
    ),
    (
        PICTURE,
        said(PLACE, TEXT) + said(TEXT, role="assistant"),
        "the last message is the assistant's; a conversation ends with the user's, which is answered",
    ),
    (PICTURE, said(PLACE, TEXT) + said(TEXT, role="system"), "a system message stands first or nowhere"),
    (PICTURE, [{"role": "user"}], "a message has the keys ['role']; allowed: role and content, both"),
    (PICTURE, [{"role": "user", "content": 7}], "a message's content 7 must be a text or a list of parts"),
    (PICTURE, said(PLACE, {"type": "video"}), "a part of type 'video' is unknown; allowed: image, image_url, text"),
    (PICTURE, said(PLACE, {"text": ASKED}), "a part of type None is unknown; allowed: image, image_url, text"),
    (
        PICTURE,
        said("image", TEXT),
        """'image' is no part of a message; give {"type": "text", "text": …} or {"type": "image"}""",
    ),
    (
        None,
        said({"type": "image", "imgae": PICTURE}, TEXT),
        "a part of type image: key 'imgae' is unknown; allowed: base64, image, path, url; did you mean 'image'?",
    ),
    (
        PICTURE,
        said(PLACE, TEXT | {"cache_control": "x"}),
        "a part of type text: key 'cache_control' is unknown; allowed: text",
    ),
    (
        None,
        said({"type": "image", "base64": "no base"}, TEXT),
        "'no base' is no image in base64; write the bytes of its file so, alone or behind data:image/png;base64,",
    ),
    (None, said({"type": "image", "base64": b"aGFsbG8="}, TEXT), "a message's base64 is of type bytes; give a string"),
    (
        None,
        said({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, TEXT),
        "a message's image_url {'url': 'a.png', 'detail': 'high'} must be a URL, or a dictionary of url alone",
    ),
    (PICTURE, "a \ud800", "the text 'a \\ud800' holds half a character at 2; decode it anew"),
    (PICTURE, said(PLACE, {"type": "text"}), "a part of type text has the text None; give a string"),
    (
        PICTURE,
        said({"type": "image", "image": PICTURE}, TEXT),
        "the messages hold an image, and images has one, too; leave one of the two out",
    ),
    (
        None,
        said({"type": "image", "image": PICTURE, "path": "a.png"}, TEXT),
        "a message's image has one of image, path, url and base64, not several",
    ),
    (
        PICTURE,
        said(PLACE, {"type": "text", "text": "<|image_pad|>"}),
        "the conversation of 1 image comes to 2 image placeholders in the model's chat template; take the placeholder out of its texts",
    ),
    (
        [PICTURE] * 2,
        [ASKED, "<|image_pad|> ?"],
        "images[1]: the question '<|image_pad|> ?' holds the model's image placeholder; reword it or take it out",
    ),
]


def refused(vlm, images: Any, questions: Any, **options: Any) -> str:
    """What a call is told; nothing may have passed the vision encoder by then."""
    with heard(vlm.model.model.visual) as encoded, pytest.raises(ValueError) as caught:
        nuwa.generate(
            vlm.model, vlm.processor, images, questions, **{"average_tokens": 20, "max_new_tokens": 2, **options}
        )
    assert not encoded
    return str(caught.value)


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_a_wrong_option_is_named(tiny_qwen, options, message):
    assert refused(tiny_qwen, [PICTURE], [ASKED], **options) == message


@pytest.mark.parametrize(("images", "message"), IMAGES, ids=[message[:40] for _, message in IMAGES])
def test_what_is_no_image_is_named(tiny_qwen, images, message):
    assert refused(tiny_qwen, images, [ASKED]) == message


@pytest.mark.parametrize(("images", "questions", "message"), QUESTIONS, ids=[case[2][:50] for case in QUESTIONS])
def test_what_is_no_question_is_named(tiny_qwen, images, questions, message):
    assert refused(tiny_qwen, images, questions) == message


def test_a_wrong_model_or_processor_is_named(tiny_qwen):
    for model, processor, message in (
        (
            "models/testbed",
            tiny_qwen.processor,
            "model is of type str; give a model that is loaded, AutoModelForImageTextToText.from_pretrained(path).eval()",
        ),
        (
            tiny_qwen.model,
            None,
            "processor is of type NoneType, without image processor and tokenizer; give "
            "AutoProcessor.from_pretrained(path)",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            nuwa.generate(model, processor, PICTURE, ASKED, average_tokens=20)
        assert str(caught.value) == message


def test_a_stream_refuses_before_it_is_read(tiny_qwen):
    with pytest.raises(ValueError) as caught:
        nuwa.stream(tiny_qwen.model, tiny_qwen.processor, PICTURE, ASKED, average_tokens=20, batch_images=0)
    assert str(caught.value) == "batch_images=0 must be a whole number of 1 or more"
