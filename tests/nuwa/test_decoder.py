"""The schedule-aware decoder against stock ``generate`` and against a slow masked reference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nuwa.decoder import Trunk, share_beginnings
from nuwa.stage1 import get_method
from nuwa.stage2 import get_scorer

QUESTIONS = [
    "locate the red 3 on the left",
    "what digit is blue?",
    "is there a green 7 in this image?",
    "how many digits are there?",
    "locate the digit that is red and looks like a 3",
]
MAX_NEW = 12


def encode(vlm, scenes):
    images = [Image.fromarray(scene.image) for scene in scenes]
    ids = tuple(f"scene-{i}" for i in range(len(scenes)))
    pixels = vlm.pixels(images)
    return images, pixels, vlm.signals(vlm.encode(pixels), ids)


def questions_of(count):
    """A different number of questions for every image, so that rows are padded."""
    return [[QUESTIONS[(row + j) % len(QUESTIONS)] for j in range(1 + row % 3)] for row in range(count)]


def stock_answers(vlm, images, asked):
    answers = []
    for image, texts in zip(images, asked, strict=True):
        for text in texts:
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
            prompt = vlm.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
            inputs = vlm.processor(images=[image], text=[prompt], return_tensors="pt")
            out = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
            new = out[0, inputs.input_ids.shape[1] :].tolist()
            answers.append(tuple(new[: new.index(vlm.end_tokens[0])] if vlm.end_tokens[0] in new else new))
    return answers


def run(vlm, signals, asked, method="unpruned", keep=144, strategy="pesp", cuts=(), seed=0, **parameters):
    chosen = get_method(method)
    selection = chosen.select(signals, keep, chosen.configure(**parameters), seed)
    prompts = [[vlm.encode_prompt(text) for text in texts] for texts in asked]
    trunk = Trunk(vlm, selection, prompts, strategy, signals.image_ids)
    limits = [MAX_NEW] * sum(map(len, asked))
    if not cuts:
        return trunk.finish(limits)
    cuts = [(layer, k, get_scorer(scorer)) for layer, k, scorer in cuts]
    trunk.advance(cuts[0][0], frozenset({cuts[0][0] - 1}))
    return trunk.fork(cuts, limits, seed)


@pytest.mark.parametrize("batch", [1, 8])
def test_unpruned_equals_stock_generate(tiny_vlm, scenes, batch):
    images, _, signals = encode(tiny_vlm, scenes[:batch])
    asked = questions_of(batch)
    ours = [answer.tokens for answer in run(tiny_vlm, signals, asked)]
    stock = stock_answers(tiny_vlm, images, asked)
    assert ours == stock
    assert len(set(stock)) > 1 or batch == 1, "a constant model would prove nothing"


@pytest.fixture(scope="module")
def of_three(tiny_vlm, scenes):
    """Three images' signals, questions about them, and what the unpruned model says."""
    _, _, signals = encode(tiny_vlm, scenes[:3])
    asked = questions_of(3)
    return signals, asked, run(tiny_vlm, signals, asked)


@pytest.mark.parametrize("method", ["random", "uniform", "pooling", "visionzip", "nuwa"])
@pytest.mark.parametrize("strategy", ["perc", "pesp", "rpme"])
def test_full_budget_equals_unpruned(tiny_vlm, of_three, method, strategy):
    signals, asked, unpruned = of_three
    parameters = {"pillar_quantile": 0.0} if method == "nuwa" else {}
    full = [("attention_last_token"), ("cosine_mean_text")]
    assert run(tiny_vlm, signals, asked, method, 144, strategy, **parameters) == unpruned
    cuts = [(3, 144, full[0]), (5, 144, full[1])]
    assert run(tiny_vlm, signals, asked, method, 144, strategy, cuts, **parameters) == unpruned


texts_of_an_image = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple), min_size=1, max_size=8)


@given(texts_of_an_image)
def test_shared_beginnings_show_every_question_its_own_tokens_in_order(texts):
    shared = share_beginnings(texts)
    assert sorted(shared.ranks) == list(range(len(texts)))
    for text, rank, columns in zip(texts, shared.ranks, shared.columns, strict=True):
        seen = [column for column, (low, high) in enumerate(shared.spans) if low <= rank < high]
        assert seen == columns
        assert tuple(shared.ids[column] for column in seen) == text
        assert [shared.depth[column] for column in seen] == list(range(len(text)))
        assert shared.spans[columns[-1]] == (rank, rank + 1), "what is generated follows a token of its own"


@given(texts_of_an_image)
def test_every_common_beginning_stands_once(texts):
    beginnings = {text[:size] for text in texts for size in range(1, len(text))}
    assert len(share_beginnings(texts).ids) == len(beginnings) + len(texts)
