"""``nuwa.generate`` and ``nuwa.stream``: forms of images and questions, images that come again, failures, what is told."""

from __future__ import annotations

import base64
import copy
import inspect
import io
from collections import Counter

import numpy as np
import pytest
import torch
from listening import heard, told_before
from PIL import Image

import nuwa
from nuwa.images import ImageError
from nuwa.library.options import RELEASED
from nuwa.methods import RECIPES
from nuwa.schedule import UnreachableBudget

torch.set_num_threads(1)
ASKED, OTHER = "what is on the left ?", "how many red"
MAX_NEW = 4


def ask(vlm, images, questions=ASKED, *, run=nuwa.generate, **options):
    options = {"average_tokens": 20, "max_new_tokens": MAX_NEW, **options}
    return run(vlm.model, vlm.processor, images, questions, **options)


def told(answer):
    return answer.text, answer.tokens, answer.kept, answer.kept_last, answer.finish


def saved(picture, path):
    picture.save(path)
    return path


# --- forms of images


def test_every_form_of_an_image_is_the_same_image(tiny_qwen, photos, tmp_path):
    picture = photos[0]
    pixels = np.array(picture)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    first = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    forms = [
        picture,
        saved(picture, tmp_path / "photo.png"),
        str(tmp_path / "photo.png"),
        encoded.getvalue(),
        bytearray(encoded.getvalue()),
        memoryview(encoded.getvalue()),
        (tmp_path / "photo.png").as_uri(),
        "data:image/png;base64," + base64.b64encode(encoded.getvalue()).decode(),
        pixels,
        pixels.transpose(2, 0, 1),
        (pixels / 255).astype(np.float32),
        opaque,
        first,
        first.permute(1, 2, 0),
        first.double() / 255,
        torch.nn.Parameter(first.float() / 255),
    ]
    answers = ask(tiny_qwen, forms, [ASKED] * len(forms))
    assert {told(answer) for answer in answers} == {told(answers[0])}
    assert told(ask(tiny_qwen, photos[1])) != told(answers[0]), "a model that sees nothing would prove nothing"


def test_grey_pixels_and_a_batch_of_arrays(tiny_qwen, photos):
    grey = np.array(photos[0].convert("L"))
    whole = told(ask(tiny_qwen, Image.fromarray(grey)))
    assert (
        told(ask(tiny_qwen, grey)) == told(ask(tiny_qwen, grey[None])) == told(ask(tiny_qwen, grey[..., None])) == whole
    )
    stacked = torch.from_numpy(np.stack([np.array(photos[0]), np.array(photos[0])[::-1]]).copy())
    upright, turned = ask(tiny_qwen, stacked, [ASKED, ASKED])
    assert told(upright) == told(ask(tiny_qwen, photos[0])) != told(turned)


# --- shapes


def test_answers_have_the_shape_of_images_and_questions(tiny_qwen, photos):
    one = told(ask(tiny_qwen, photos[0]))
    assert told(ask(tiny_qwen, photos[0], [ASKED, OTHER])[0]) == one
    assert [told(answer) for answer in ask(tiny_qwen, [photos[0]], [ASKED])] == [one]
    mixed = ask(tiny_qwen, photos[:2], [[ASKED, OTHER], ASKED])
    assert told(mixed[0][0]) == one and len(mixed[0]) == 2 and isinstance(mixed[1], nuwa.Generation)
    assert ask(tiny_qwen, [], []) == []


# --- images that come again


def test_an_image_that_comes_again_is_encoded_and_prefilled_once(tiny_qwen, photos, tmp_path):
    path = saved(photos[1], tmp_path / "photo.png")
    images = [photos[0], path, photos[0].copy(), path, np.array(photos[0])]
    questions = [ASKED, ASKED, OTHER, [OTHER] * 2, "where is a dog"]
    seen: Counter[str] = Counter()

    def see_images(given, named):
        seen.update(images=len(named.get("grid_thw", given[1] if len(given) > 1 else ())))

    def see_rows(given, named):
        seen.update(rows=len(given[0]))

    model = tiny_qwen.model.model
    with told_before(model.visual, see_images), told_before(model.language_model.layers[0], see_rows):
        answers = ask(tiny_qwen, images, questions, max_new_tokens=1)
    # Of two layouts each a row: the tokens before the image, the image, and its questions.
    assert seen == {"images": 2, "rows": 2}

    alone = [ask(tiny_qwen, image, text, max_new_tokens=1) for image, text in zip(images, questions, strict=True)]
    for one, other in zip(answers, alone, strict=True):
        pairs = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
        assert all(told(left) == told(right) for left, right in pairs)


# --- failures


@pytest.fixture
def eight(photos, tmp_path):
    """Seven photos, and in the sixth place a file whose pixels are cut off."""
    whole = saved(photos[5], tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return [*photos[:5], tmp_path / "cut.png", *photos[6:8]]


def test_one_failing_image_of_eight_loses_one_answer(tiny_qwen, photos, eight):
    answers = ask(tiny_qwen, eight, [ASKED] * 8, on_error="return")
    failed = answers.pop(5)
    assert isinstance(failed, nuwa.Failure) and isinstance(failed.error, ImageError)
    assert failed.message.startswith(f"{eight[5]}: the image cannot be decoded (")
    rest = ask(tiny_qwen, [*photos[:5], *photos[6:8]], [ASKED] * 7)
    assert [told(answer) for answer in answers] == [told(answer) for answer in rest]


def test_a_failing_image_is_raised_unless_it_is_asked_for(tiny_qwen, eight):
    with pytest.raises(ImageError) as caught:
        ask(tiny_qwen, eight, [ASKED] * 8)
    assert str(caught.value).startswith(f"{eight[5]}: the image cannot be decoded (")


def test_what_planning_cannot_ask_loses_its_own_answers_only(tiny_qwen, photos, tmp_path):
    images = [photos[0], tmp_path / "nowhere.png", photos[1]]
    questions = [[ASKED, "<|image_pad|>"], ASKED, OTHER]
    answers = ask(tiny_qwen, images, questions, on_error="return")
    assert told(answers[0][0]) == told(ask(tiny_qwen, photos[0]))
    assert answers[0][1].message == (
        "the question '<|image_pad|>' holds the model's image placeholder; reword it or take it out"
    )
    assert answers[1].message == f"there is no file {str(images[1])!r}"
    assert told(answers[2]) == told(ask(tiny_qwen, photos[1], OTHER))


def test_what_the_model_raises_for_one_image_of_a_batch_loses_that_image(tiny_qwen, photos):
    """As a batch that is too large for memory: it is halved until the image stands alone."""
    calls: list[int] = []

    def fail(given, named):
        grids = named.get("grid_thw", given[1] if len(given) > 1 else None)
        calls.append(len(grids))
        height, width = tiny_qwen.processor.image_processor(photos[2], return_tensors="pt")["image_grid_thw"][0, 1:]
        if any((row[1:] == torch.tensor([height, width])).all() for row in grids):
            raise RuntimeError("out of memory")

    with told_before(tiny_qwen.model.model.visual, fail):
        answers = ask(tiny_qwen, photos[:4], [[ASKED, OTHER]] * 4, on_error="return", batch_images=4)
    assert [one.message for one in answers.pop(2)] == ["out of memory"] * 2
    assert calls[0] == 4 and len(calls) > 2
    rest = ask(tiny_qwen, [photos[0], photos[1], photos[3]], [[ASKED, OTHER]] * 3)
    assert [[told(one) for one in pair] for pair in answers] == [[told(one) for one in pair] for pair in rest]


def test_all_layouts_are_planned_before_the_first_image_is_encoded(tiny_next, photos):
    large = max(range(8), key=lambda number: tiny_next.layout_of(photos[number].size).tokens)
    images = [photos[number] for number in range(8) if number != large] + [photos[large]]
    lowest = max(tiny_next.layout_of(image.size).tokens - tiny_next.layout_of(image.size).patches for image in images)
    with heard(tiny_next.model.model.vision_tower) as encoded, pytest.raises(UnreachableBudget) as caught:
        ask(tiny_next, images, [ASKED] * 8, average_tokens=lowest, without_stage2=True, batch_images=1)
    assert not encoded
    assert str(caught.value).startswith("images[") and f"{lowest} tokens before the first cut are out of reach" in str(
        caught.value
    )


# --- streams and progress


def test_a_stream_hands_out_answers_as_they_come(tiny_qwen, photos, tmp_path):
    paths = [saved(photo, tmp_path / f"{number}.png") for number, photo in enumerate(photos[:3])]
    steps: list[tuple[int, int]] = []
    questions = [[ASKED, OTHER], [OTHER], [ASKED]]
    coming = ask(
        tiny_qwen, paths, questions, run=nuwa.stream, batch_images=1, progress=lambda *step: steps.append(step)
    )
    first, second = next(coming), next(coming)
    assert [(one.image, one.question) for one in (first, second)] == [(0, 0), (0, 1)] and steps == [(1, 4), (2, 4)]
    for one, text in ((first, ASKED), (second, OTHER)):
        assert told(one.answer) == told(ask(tiny_qwen, photos[0], text))
    paths[2].unlink()  # which nobody has read yet
    assert next(coming).image == 1
    with pytest.raises(ImageError):
        next(coming)


def test_progress_is_a_bar_on_standard_error(tiny_qwen, photos, capsys):
    ask(tiny_qwen, photos[0], [ASKED, OTHER], progress=True)
    assert "2/2" in capsys.readouterr().err


# --- what an answer tells


def test_why_an_answer_ended_is_what_stock_generate_did(tiny_qwen, photos):
    """Whether the end token was among the tokens that stock ``generate`` made, in each of the places it may stand."""
    model, processor = copy.deepcopy(tiny_qwen.model), tiny_qwen.processor
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": OTHER}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[photos[0]], text=[text], return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    whole = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, prompt:].tolist()
    (new,) = [at for at in (1, 2) if whole[at] not in whole[:at]][:1]
    model.generation_config.eos_token_id = [model.generation_config.eos_token_id, whole[new]]

    ends, finishes = [], []
    for most in (new, new + 1, new + 2):
        made = model.generate(**inputs, max_new_tokens=most, do_sample=False)[0, prompt:].tolist()
        ends.append("stop" if made[-1] in model.generation_config.eos_token_id else "length")
        one = nuwa.generate(model, processor, photos[0], OTHER, method="unpruned", max_new_tokens=most)
        finishes.append(one.finish)
    assert finishes == ends == ["length", "stop", "stop"]


@pytest.mark.parametrize("name", ["tiny_next", "tiny_qwen"])
def test_a_familys_released_preset_is_its_default(request, name, photos):
    vlm = request.getfixturevalue(name)
    options = {"average_tokens": 30, "max_new_tokens": 1}
    usual = ask(vlm, photos[0], **options)
    assert told(usual) == told(ask(vlm, photos[0], preset=RELEASED[vlm.model.config.model_type], **options))
    assert RECIPES["nuwa"].presets[0] == "released"  # what LLaVA-1.5 was released with
    assert usual.schedule != ask(vlm, photos[0], preset="released", **options).schedule


def test_what_there_is_can_be_found():
    assert dir(nuwa) == sorted(["UNPRUNED", "Failure", "Generation", "Options", "generate", "methods", "stream"])
    assert all(hasattr(nuwa, name) for name in dir(nuwa))
    shown = inspect.signature(nuwa.generate).parameters
    assert list(shown)[:6] == ["model", "processor", "images", "questions", "method", "average_tokens"]
    assert shown["max_new_tokens"].default == 128 and shown == inspect.signature(nuwa.stream).parameters
    with pytest.raises(AttributeError) as caught:
        _ = nuwa.generation_of
    assert str(caught.value) == (
        "module 'nuwa' has no attribute 'generation_of'; it has "
        "UNPRUNED, Failure, Generation, Options, generate, methods, stream"
    )
