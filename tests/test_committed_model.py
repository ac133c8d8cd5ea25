"""The committed testbed model: it answers, place travels through position ids, and a full budget changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nuwa.benchmarks import get_benchmark
from nuwa.decoder import Trunk
from nuwa.methods import specify
from nuwa.stage1 import get_method
from nuwa.testbed.questions import GENERATORS, draw_question
from nuwa.testbed.scenes import IMAGE_SIZE, draw_scene
from nuwa.vlm import LlavaAdapter

FOLDER = Path(__file__).parents[1] / "models/testbed"
SCENES = 24
MAX_NEW = 16


@pytest.fixture(scope="module")
def vlm() -> LlavaAdapter:
    return LlavaAdapter.load(FOLDER)


@pytest.fixture(scope="module")
def world(vlm):
    """Fresh test scenes (not those of the default run), one question of every task each."""
    rng = np.random.default_rng(99)
    scenes = [draw_scene(rng, "test") for _ in range(SCENES)]
    questions = []
    for scene in scenes:
        mine = []
        for task in GENERATORS:
            try:
                mine.append(draw_question(rng, scene.objects, task))
            except ValueError:  # this scene offers none
                continue
        questions.append(mine)
    images = [Image.fromarray(scene.image) for scene in scenes]
    signals = vlm.signals(vlm.encode(vlm.pixels(images)), tuple(f"scene {i}" for i in range(SCENES)))
    return images, questions, signals


def prompt_of(question) -> str:
    return question.text if question.target is None else f"locate {question.text}"


def answer(vlm, world, spec, rows=slice(None)):
    _, questions, signals = world
    signals, asked = signals[rows], questions[rows]
    schedule = spec.schedule(vlm.grid, vlm.layers)
    selection = get_method(spec.stage1).select(signals, schedule.stage1_keep, spec.config, spec.seed)
    prompts = [[vlm.encode_prompt(prompt_of(question)) for question in mine] for mine in asked]
    trunk = Trunk(vlm, selection, prompts, spec.position, signals.image_ids)
    limits = [MAX_NEW] * sum(map(len, asked))
    if not schedule.cuts:
        return [a.tokens for a in trunk.finish(limits)]
    cuts = spec.cuts(schedule)
    trunk.advance(cuts[0][0], frozenset({cuts[0][0] - 1}))
    return [a.tokens for a in trunk.fork(cuts, limits, spec.seed)]


def accuracy(vlm, world, spec) -> dict[str, float]:
    asked = [question for mine in world[1] for question in mine]
    right = {"grounding": [], "vqa": []}
    for question, tokens in zip(asked, answer(vlm, world, spec), strict=True):
        text = vlm.decode_text(list(tokens))
        if question.target is None:
            right["vqa"].append(text == question.answer)
        else:
            x, y, w, h = (value / IMAGE_SIZE for value in question.target.bbox)
            scores = get_benchmark("refcoco").score(text, {"box": [x, y, x + w, y + h]})
            right["grounding"].append(scores["acc@0.5"])
    return {family: float(np.mean(values)) for family, values in right.items()}


@pytest.fixture(scope="module", params=[1, 8])
def unpruned(request, vlm, world):
    """The first images of the world, and what the unpruned model says of them."""
    rows = slice(0, request.param)
    return rows, answer(vlm, world, specify("unpruned"), rows)


def test_unpruned_is_stock_generate_token_for_token(vlm, world, unpruned):
    images, questions, _ = world
    rows, whole = unpruned
    ours = iter(whole)
    for image, mine in zip(images[rows], questions[rows], strict=True):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt_of(question)}]}
            for question in mine
        ]
        texts = [vlm.processor.apply_chat_template([t], add_generation_prompt=True, tokenize=False) for t in turns]
        inputs = vlm.processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
        out = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
        for row in out[:, inputs.input_ids.shape[1] :].tolist():
            ends = [at for at, token in enumerate(row) if token in vlm.end_tokens]
            assert tuple(row[: ends[0]] if ends else row) == next(ours)


@pytest.mark.parametrize("method", ["random", "uniform", "pooling", "visionzip", "fastv", "nuwa"])
def test_a_full_budget_is_the_unpruned_model(vlm, world, unpruned, method):
    rows, whole = unpruned
    parameters = {"pillar_quantile": 0.0} if method == "nuwa" else {}
    spec = specify(method, budget=144, position="perc", parameters=parameters)
    assert answer(vlm, world, spec, rows) == whole


def test_it_answers_and_place_travels_through_position_ids(vlm, world):
    """24 scenes, 140 questions: bounds far below the measured values, so that chance does not decide."""
    whole = accuracy(vlm, world, specify("unpruned"))
    assert whole["grounding"] >= 0.75 and whole["vqa"] >= 0.8, json.dumps(whole)
    kept = accuracy(vlm, world, specify("uniform", budget=48))
    renumbered = accuracy(vlm, world, specify("uniform", budget=48, position="perc"))
    assert kept["grounding"] >= 3 * renumbered["grounding"], "renumbering wrecks grounding"
    assert renumbered["vqa"] >= 0.6 * whole["vqa"], "and leaves question answering standing"
