"""Methods inside the language model on three families: a stock model with blocked attention, question by question.

The stock model's own layers give what a method reads; what it chooses follows the equations, number by number.
"""

from __future__ import annotations

import pytest
import torch
from listening import heard
from oracles.inside_model import InsideModel
from oracles.masked_model import eager_copy
from PIL import Image

from nuwa.decoder import Trunk
from nuwa.generation import ImageBatch, plan, select
from nuwa.methods import specify
from nuwa.vlm import LlavaAdapter

torch.set_num_threads(1)
MAX_NEW = 5
QUESTIONS = {
    "words": ["what is on the left ?", "how many red", "where is a dog near the blue sign on the right ?"],
    "testbed": ["what digit is blue?", "locate the red 3 on the left", "how many digits are there?"],
}
# Method, the share of the tokens that is its budget, and what is asked beside.
CASES = {
    "dart": ("dart", 0.5, {"stage2": {"layer": 2}}),
    "dart as released": ("dart", 0.6, {"preset": "released", "stage2": {"layer": 1}}),
    "dart by other norms": ("dart", 0.6, {"parameters": {"pivot_norm": "l2", "pivot_rope": False, "image_pivots": 7}}),
    "feather": ("feather", 0.55, {"parameters": {"stride": 4}}),
    "fastv without rope": ("fastv_without_rope", 0.4, {}),
    "fastv among visual tokens": ("fastv", 0.4, {"stage2": {"scorer": "attention_last_token_among_visual"}}),
    "ivc-prune": ("ivc_prune", 0.7, {}),
    "ivc-prune for qwen, renumbered": ("ivc_prune", 0.8, {"preset": "released_qwen", "position": "perc"}),
    "vtw": ("vtw", 0.5, {}),
    "vtw, renumbered": ("vtw", 1 / 3, {"position": "perc"}),
    "vtw, spread": ("vtw", 1 / 3, {"position": "rpme"}),
    "sparsevlm 2": ("sparsevlm_v2", 0.5, {"stage2": {"layer": [1, 3, 5]}, "parameters": {"priority_heads": 2}}),
    "vscan's second stage": ("fastv", 0.6, {"stage2": {"layer": 3, "scorer": "attention_last_token_next_layer"}}),
    "vscan's second stage on qwen": (
        "fastv",
        0.6,
        {"stage2": {"layer": 3, "scorer": "attention_last_token_next_layer_without_rope"}},
    ),
    "all tokens without rope": (
        "pyramiddrop",
        0.5,
        {"stage2": {"layer": [1, 4], "scorer": "attention_last_token_next_layer_without_rope"}},
    ),
}


@pytest.fixture(scope="module")
def twin(family):
    return eager_copy(family.model)


@pytest.fixture(scope="module")
def pictures(family, scenes, photos):
    return [Image.fromarray(scene.image) for scene in scenes] if isinstance(family, LlavaAdapter) else photos


def questions_for(vlm) -> list[str]:
    return QUESTIONS["testbed" if isinstance(vlm, LlavaAdapter) else "words"]


def spec_for(vlm, layout, case):
    method, share, options = CASES[case]
    return specify(method, budget=round(share * layout.tokens), **options)


def places_of(layout) -> list[tuple[int, int] | None]:
    return [
        (row, column) if column < view.grid.width else None
        for view in layout.views
        for row in range(view.grid.height)
        for column in range(view.grid.width + view.newline)
    ]


def decode(vlm, spec, images, asked):
    """Answers, and logits at every step, of images of one layout."""
    encoded = vlm.encode_images(images)
    layout = encoded[0].layout
    planned = plan(vlm, spec, layout)
    names = [f"photo {number}" for number in range(len(images))]
    selection = select(vlm, planned, layout, ImageBatch(encoded=encoded, names=names))
    prompts = [[vlm.encode_prompt(text) for text in texts] for texts in asked]
    trunk = Trunk(vlm, selection, prompts, spec.position, names, layout)
    cuts = spec.cuts(planned.schedule)
    with heard(vlm.model.lm_head) as logits:
        trunk.advance(cuts[0].layer, frozenset({cuts[0].layer - 1}))
        answers = trunk.fork(cuts, [MAX_NEW] * sum(map(len, asked)), spec.seed)
    return layout, planned.schedule, cuts, answers, logits


@pytest.mark.parametrize("case", CASES)
def test_pruned_equals_a_masked_stock_model_at_every_step(family, twin, pictures, case):
    images = [pictures[0], pictures[5]]  # of one layout
    first, second, third = questions_for(family)
    asked = [[first], [second, third]]
    spec = spec_for(family, family.encode_images(images[:1])[0].layout, case)
    layout, schedule, cuts, answers, heard = decode(family, spec, images, asked)
    places = [(row, text) for row, texts in enumerate(asked) for text in texts]
    for number, (row, text) in enumerate(places):
        everything = list(range(layout.tokens))
        reference = InsideModel(
            twin,
            family.processor,
            images[row],
            text,
            everything,
            spec.position,
            places=places_of(layout),
            trims=spec.stage2.trims,
        )
        for cut in cuts:
            reference.choose(cut.layer, cut.keep, cut.scorer.name, cut.scorer.parameters)
        assert list(answers[number].kept) == reference.alive[-1]
        assert len(answers[number].kept) == schedule.cuts[-1][1]
        tokens, logits = reference.answer(MAX_NEW, family.end_tokens, answers[number].tokens)
        assert list(answers[number].tokens) == tokens
        for step, expected in enumerate(logits):
            active = [at for at, answer in enumerate(answers) if len(answer.tokens) >= step]
            found = heard[step][active.index(number)]
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5), f"question {number}, step {step}"


INSIDE = {
    "dart": (0.5, {}),
    "feather": (0.55, {"parameters": {"stride": 4}}),
    "fastv_without_rope": (0.4, {}),
    "ivc_prune": (0.7, {}),
    "vtw": (0.5, {}),
    "sparsevlm_v2": (0.5, {"stage2": {"layer": [1, 3, 5]}, "parameters": {"priority_heads": 2}}),
    "vscan": (0.3, {}),
}


@pytest.mark.parametrize("method", INSIDE)
def test_batches_of_1_8_and_64_give_the_same_answers(tiny_vlm, scenes, method):
    """Eight questions about each of eight images: together, image by image, one alone."""
    images = [Image.fromarray(scene.image) for scene in scenes[:8]]
    share, options = INSIDE[method]
    words = ["red", "blue", "green", "yellow", "red or blue", "left", "right of the red 3", "how many"]
    layout = tiny_vlm.layout
    encoded = tiny_vlm.encode_images(images, ("early_attention",))
    spec = specify(method, budget=round(share * layout.tokens), **options)
    planned = plan(tiny_vlm, spec, layout)

    def told(asked):
        """``asked``: questions by image."""
        rows = list(asked)
        names = [f"photo {row}" for row in rows]
        selection = select(tiny_vlm, planned, layout, ImageBatch(encoded=[encoded[row] for row in rows], names=names))
        prompts = [[tiny_vlm.encode_prompt(text) for text in texts] for texts in asked.values()]
        trunk = Trunk(tiny_vlm, selection, prompts, spec.position, names, layout)
        found = trunk.answer(spec.running_cuts(planned.schedule), [3] * sum(map(len, prompts)), spec.seed)
        return dict(zip([(row, text) for row in rows for text in asked[row]], found, strict=True))

    of_64 = told({row: words for row in range(8)})
    assert len(of_64) == 64 and len({(answer.kept, answer.tokens) for answer in of_64.values()}) > 8
    for row in (0, 5):
        of_8 = told({row: words})
        assert of_8 == {key: of_64[key] for key in of_8}
        assert told({row: [words[row]]}) == {(row, words[row]): of_64[row, words[row]]}
