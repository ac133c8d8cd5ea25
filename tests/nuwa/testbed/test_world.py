"""The testbed's benchmark: seeded, unambiguous, unseen handwriting, published schemas."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from nuwa.benchmarks import check_schema, get_benchmark
from nuwa.testbed.benchmark import make_testbed_benchmark
from nuwa.testbed.language import build_tokenizer, format_box
from nuwa.testbed.questions import GENERATORS, RELATIONS, Description, draw_question
from nuwa.testbed.scenes import (
    IMAGE_SIZE,
    MAX_OBJECTS,
    MAX_SIDE,
    MIN_OBJECTS,
    MIN_SIDE,
    draw_scene,
    handwriting,
)

QUESTIONS = {"refcoco": 2, "refcocoplus": 2, "refcocog": 2, "pope": 3, "gqa": 2, "textvqa": 1}


def test_made_twice_is_byte_identical(tmp_path):
    for name in ("one", "two"):
        make_testbed_benchmark(tmp_path / name, 6, QUESTIONS, seed=4)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 7, "GQA is published as two tables"
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_seed_is_another_world(tmp_path):
    for seed in (1, 2):
        make_testbed_benchmark(tmp_path / str(seed), 3, {"pope": 2}, seed)
    assert (tmp_path / "1/pope.parquet").read_bytes() != (tmp_path / "2/pope.parquet").read_bytes()


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != "gqa"])
def test_schemas_are_the_published_ones(tmp_path, name):
    make_testbed_benchmark(tmp_path, 3, {name: 2}, seed=4)
    check_schema(pq.read_schema(tmp_path / f"{name}.parquet"), get_benchmark(name), name)


def test_the_default_split_is_as_large_as_promised(tmp_path):
    make_testbed_benchmark(tmp_path, 20, QUESTIONS, seed=2602)
    rows = sum(
        len(row["answer"]) if name.startswith("refcoco") else 1
        for name in ("refcoco", "refcocoplus", "refcocog", "pope", "textvqa", "gqa_instructions")
        for row in pq.read_table(tmp_path / f"{name}.parquet")
        .drop_columns([c for c in ("image",) if name != "gqa_instructions"])
        .to_pylist()
    )
    assert rows >= 200, "20 images ask for at least 10 questions each, so that 400 ask for 4,000"


def test_handwriting_is_split_by_sample():
    seen = [{bytes(ink) for digit in handwriting(split) for ink in digit} for split in ("train", "validation", "test")]
    total = sum(len(digit) for split in ("train", "validation", "test") for digit in handwriting(split))
    assert total == 1797
    assert not seen[0] & seen[2] and not seen[0] & seen[1] and not seen[1] & seen[2]
    with pytest.raises(ValueError, match="split 'dev' is unknown; allowed: train, validation, test"):
        handwriting("dev")


def test_scenes_hold_what_they_promise():
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        scene = draw_scene(rng, "test")
        counts.add(len(scene.objects))
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), int)
        for item in scene.objects:
            assert MIN_SIDE <= item.side <= MAX_SIDE
            covered[item.top : item.top + item.side, item.left : item.left + item.side] += 1
        assert covered.sum() == sum(item.side**2 for item in scene.objects), "boxes lie inside the image"
        assert covered.max() == 1, "and do not overlap"
        assert len({(item.digit, item.color) for item in scene.objects}) == len(scene.objects)
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
    assert counts == set(range(MIN_OBJECTS, MAX_OBJECTS + 1))


def fits(words: str, item) -> bool:
    """An independent reading of a description such as ``red 3`` or ``digit``."""
    return all(word in ("digit", "the", item.color, str(item.digit)) for word in words.split())


def holds(item, other, relation: str) -> bool:
    (x, y), (u, v) = item.center, other.center
    return {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[relation]


def meant(text: str, objects) -> list:
    """All objects an expression may mean, read without the generator's code."""
    if " that is " in text:
        color, digit = text.split(" that is ")[1].split(" and looks like a ")
        return [item for item in objects if fits(f"{color} {digit}", item)]
    if " on the " in text:
        words, side = text.split(" on the ")
        key = {"left": lambda i: i.center[0], "right": lambda i: -i.center[0]}
        key |= {"top": lambda i: i.center[1], "bottom": lambda i: -i.center[1]}
        group = sorted((item for item in objects if fits(words, item)), key=key[side])
        return group[:1]
    for relation in RELATIONS:
        if f" {relation} " in text:
            words, anchor = text.split(f" {relation} ")
            anchors = [item for item in objects if fits(anchor, item)]
            assert len(anchors) == 1
            return [i for i in objects if i is not anchors[0] and fits(words, i) and holds(i, anchors[0], relation)]
    return [item for item in objects if fits(text, item)]


@pytest.mark.parametrize("task", GENERATORS)
def test_every_question_has_exactly_the_answer_it_claims(task):
    rng = np.random.default_rng(3)
    categories = set()
    for _ in range(150):
        objects = draw_scene(rng, "test").objects
        try:
            question = draw_question(rng, objects, task)
        except ValueError:
            continue
        categories.add(question.category)
        if question.target is not None:
            assert meant(question.text, objects) == [question.target]
        elif task == "pope":
            asked = question.text.removeprefix("is there a ").removesuffix(" in this image?")
            assert question.answer == ("yes" if any(fits(asked, item) for item in objects) else "no")
        elif question.category == "count":
            words = question.text.removeprefix("how many ").removesuffix(" are there?").removesuffix("s")
            assert question.answer == str(sum(fits(words, item) for item in objects))
        elif question.category == "relation":
            relation = next(name for name in RELATIONS if f" {name} " in question.text)
            first, second = question.text.removeprefix("is ").removesuffix("?").split(f" {relation} ")
            (one,), (other,) = ([item for item in objects if fits(words, item)] for words in (first, second))
            assert question.answer == ("yes" if holds(one, other, relation) else "no")
        elif task == "gqa":
            digit = question.text.removeprefix("what color is the ").removesuffix("?")
            assert [item.color for item in objects if fits(digit, item)] == [question.answer]
        else:
            words = question.text.removeprefix("what digit is ").removesuffix("?")
            (item,) = meant(f"digit {words}", objects) if words.startswith("on ") else meant(f"{words} digit", objects)
            assert question.answer == str(item.digit)
    assert len(categories) >= {"refcocoplus": 1, "refcocog": 3, "gqa": 3}.get(task, 2)


def test_adversarial_negatives_are_made_of_what_is_there():
    rng = np.random.default_rng(0)
    for _ in range(40):
        objects = draw_scene(rng, "test").objects
        question = GENERATORS["pope"](rng, objects, category="adversarial", answer="no")
        if question is None:
            continue
        color, digit = question.text.removeprefix("is there a ").removesuffix(" in this image?").split()
        assert any(item.color == color for item in objects) and any(str(item.digit) == digit for item in objects)
        assert not Description(int(digit), color).matches(objects)


def test_words_and_boxes_survive_the_tokenizer():
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(9)
    for task in GENERATORS:
        for _ in range(40):
            question = draw_question(rng, draw_scene(rng, "test").objects, task)
            ids = tokenizer(question.text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == question.text
    box = format_box([12, 30, 22, 25], 100, 100)
    assert box == "[0.12, 0.30, 0.34, 0.55]"
    assert tokenizer.decode(tokenizer(box).input_ids, skip_special_tokens=True) == box
