"""Several images in one sequence, and several turns: unpruned is stock ``generate``, pruned is blocked attention."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles.inside_model import InsideModel
from oracles.masked_model import MaskedModel, eager_copy
from PIL import Image

import nuwa
from nuwa.decoder import Trunk
from nuwa.generation import ImageBatch, plan_interleaved, select
from nuwa.layout import InterleavedLayout, interleave
from nuwa.library.conversations import encode_question, read_question
from nuwa.methods import RECIPES, specify
from nuwa.schedule import joined
from nuwa.vlm import EncodedPrompt, LlavaAdapter

torch.set_num_threads(1)
MAX_NEW = 6
WORDS = {
    "words": ["where is a dog", "on the left ?", "how many red"],
    "testbed": ["what digit", "is blue?", "how many digits"],
}


# Of the other families what they do not share: Qwen3-VL's features that enter early layers, InternVL3's tiles,
# LLaVA-OneVision's images that look otherwise beside others, SmolVLM's texts between tiles.
@pytest.fixture(
    scope="module",
    params=[
        "tiny_vlm",
        "tiny_next",
        "tiny_onevision",
        "tiny_qwen",
        "tiny_qwen3",
        "tiny_internvl",
        "tiny_smolvlm",
        "tiny_idefics3",
    ],
)
def family(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def twin(family):
    return eager_copy(family.model)


@pytest.fixture(scope="module")
def pictures(family, scenes, photos):
    return [Image.fromarray(scene.image) for scene in scenes] if isinstance(family, LlavaAdapter) else photos


def said(role: str, *parts) -> dict:
    """A message; ``None`` stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def conversations(vlm) -> list[list[dict]]:
    """Three images in one message, with words between and without; two turns with two and one; one image in the last."""
    first, second, third = WORDS["testbed" if isinstance(vlm, LlavaAdapter) else "words"]
    return [
        [said("user", None, first, None, None, second)],
        [said("user", None, None, first), said("assistant", third), said("user", None, second)],
        [said("user", None, None, None, f"{third} {second}")],
        [said("user", first, None), said("assistant", second), said("user", None, third, None, second)],
    ]


def stock_answers(vlm, images, asked) -> list[tuple[int, ...]]:
    """One left-padded batch through the stock model's own ``generate``; ``images``: those of each row."""
    texts = [vlm.processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in asked]
    inputs = vlm.processor(images=[list(row) for row in images], text=texts, padding=True, return_tensors="pt")
    if len(asked) > 1:
        assert not inputs["attention_mask"].all() and inputs["attention_mask"][:, -1].all(), "padded, at the left"
    out = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
    end = vlm.model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    rows = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [tuple(row[: next((at for at, token in enumerate(row) if token in ends), len(row))]) for row in rows]


FAMILIES = [
    "tiny_vlm",
    "tiny_next",
    "tiny_onevision",
    "tiny_qwen",
    "tiny_qwen2",
    "tiny_qwen3",
    "tiny_internvl",
    "tiny_smolvlm",
    "tiny_idefics3",
]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_unpruned_equals_stock_generate(family, pictures, batch):
    images = [[pictures[(row + step) % len(pictures)] for step in (0, 3, 5)] for row in range(batch)]
    asked = [conversations(family)[row % 4] for row in range(batch)]
    found = nuwa.generate(family.model, family.processor, images, asked, method="unpruned", max_new_tokens=MAX_NEW)
    stock = stock_answers(family, images, asked)
    assert [answer.tokens for answer in found] == stock
    assert batch == 1 or len(set(stock)) > 3, "a constant model would prove nothing"
    assert [set(answer.kept.images) for answer in found] == [{0, 1, 2}] * batch


def test_an_image_that_looks_otherwise_among_others_is_both_in_one_call(tiny_onevision, photos):
    """An image of every turn, all in one message, and one alone: each row as stock ``generate`` answers it."""
    first, second, third = WORDS["words"]
    shown = [photos[1:3], photos[1:4], photos[1:2], [photos[1]] * 2]
    asked = [
        [said("user", None, first), said("assistant", third), said("user", None, second)],
        [said("user", None, None, first, None)],
        [said("user", None, first), said("assistant", third), said("user", second)],
        [said("user", None, None, second)],
    ]
    vlm = tiny_onevision
    found = nuwa.generate(vlm.model, vlm.processor, shown, asked, method="unpruned", max_new_tokens=MAX_NEW)
    stock = stock_answers(vlm, shown, asked)
    assert [answer.tokens for answer in found] == stock and len(set(stock)) == 4

    together, _, alone, _ = (answer.kept for answer in found)
    ends = [at for at, role in enumerate(together.roles) if role == "newline"]
    assert [(together.images[at], together.places[at]) for at in ends] == [(0, (0, 5, 6)), (1, (0, 5, 6))]
    assert len(together.slots) == 2 * (36 + 1) and len(alone.slots) == vlm.layout_of(photos[1].size).tokens


CASES = {
    "stage 1 alone, renumbered": ("random", {"position": "perc"}),
    "merged tokens and a cut": ("nuwa", {}),
    "a cut, spread": ("nuwa", {"position": "rpme", "preset": "paper"}),
    "three cuts, renumbered": ("pyramiddrop", {"position": "perc", "stage2": {"layer": [1, 3, 5]}}),
}
SHARE = {"nuwa": 0.4, "random": 0.4, "pyramiddrop": 0.5}


@pytest.mark.parametrize("case", CASES)
def test_pruned_equals_blocked_attention(family, twin, pictures, case):
    """Two rows of three images in other orders, of which the second is asked two questions of unlike length."""
    method, options = CASES[case]
    images = [[pictures[number] for number in (0, 3, 0)], [pictures[number] for number in (5, 3, 5)]]
    longer = conversations(family)[0]
    *shown, last = longer[0]["content"]
    shorter = [{"role": "user", "content": [*shown, {**last, "text": last["text"].split()[0]}]}]
    asked = [(0, longer), (1, shorter), (1, longer)]
    prompts = [
        [encode_question(family, read_question(one)) for row, one in asked if row == of_row] for of_row in (0, 1)
    ]

    encoded = [family.encode_among(row) for row in images]
    layout = InterleavedLayout.of([one.layout for one in encoded[0]], [len(text) for text in prompts[0][0].between])
    plans = plan_interleaved(
        family, lambda image: specify(method, budget=round(SHARE[method] * image.tokens), **options), layout
    )
    spec, schedule = plans[0].spec, joined([one.schedule for one in plans])
    names = ["first row", "second row"]
    columns = [ImageBatch(encoded=list(of_rows), names=names) for of_rows in zip(*encoded, strict=True)]
    selections = [
        select(family, planned, image, column)
        for planned, image, column in zip(plans, layout.images, columns, strict=True)
    ]
    trunk = Trunk(family, interleave(layout, selections), prompts, spec.position, names, layout)
    heard: list[torch.Tensor] = []
    listener = family.model.lm_head.register_forward_hook(lambda _module, _inputs, out: heard.append(out.clone()))
    try:
        answers = trunk.answer(spec.cuts(schedule), [MAX_NEW] * 3, spec.seed)
    finally:
        listener.remove()

    for number, (row, messages) in enumerate(asked):
        reference = MaskedModel(twin, family.processor, images[row], messages, trunk.slots[row].tolist(), spec.position)
        entered, ours = (reference.projected, *reference.deep), (trunk.projected, *trunk.deep)
        entered = [part.clone() for part in entered]
        for part, own in zip(entered, ours, strict=True):
            part[trunk.slots[row]] = own[row]
        reference.projected, *reference.deep = entered
        for layer, keep in schedule.cuts:
            reference.cut(layer, keep, reference.scores(layer, spec.stage2.scorer))
        assert list(answers[number].kept) == reference.alive[-1]
        tokens, logits = reference.answer(MAX_NEW, family.end_tokens, answers[number].tokens)
        assert list(answers[number].tokens) == tokens
        for step, expected in enumerate(logits):
            active = [at for at, answer in enumerate(answers) if len(answer.tokens) >= step]
            found = heard[step][active.index(number)]
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5), f"question {number}, step {step}"


def test_stage_1_keeps_of_every_image_what_it_keeps_of_it_by_itself(family, pictures):
    """Alone; where images look otherwise among others, beside another one."""
    images = [pictures[0], pictures[3], pictures[5]]
    options = {"method": "nuwa", "retention": 0.4, "without_stage2": True, "max_new_tokens": 1}
    (together,) = nuwa.generate(family.model, family.processor, [images], [conversations(family)[2]], **options)
    kept = list(zip(together.kept.images, together.kept.places, together.kept.roles, strict=True))
    for number, image in enumerate(images):
        shown = [image] if family.alike else [image, pictures[1]]
        (alone,) = nuwa.generate(family.model, family.processor, [shown], ["a ?"], **options)
        expected = zip(alone.kept.images, alone.kept.places, alone.kept.roles, strict=True)
        own = [(place, role) for image, place, role in kept if image == number]
        assert own == [(place, role) for image, place, role in expected if image == 0]


@pytest.mark.parametrize("method", ["ivc_prune", "feather", "dart", "fastv_without_rope", "vtw"])
@pytest.mark.parametrize("family", ["tiny_vlm", "tiny_qwen"], indirect=True)
def test_methods_inside_the_model_answer_about_several_images_as_in_any_batch(family, pictures, method):
    """Alone and beside rows of another layout; what is kept is counted over all images."""
    rows = [[pictures[number] for number in (0, 3, 5)], [pictures[number] for number in (5, 1, 0)]]
    options = {"method": method, "retention": 0.6, "max_new_tokens": MAX_NEW}
    asked = conversations(family)[2:]
    together = nuwa.generate(family.model, family.processor, rows, asked, **options)
    for row, one, answer in zip(rows, asked, together, strict=True):
        (alone,) = nuwa.generate(family.model, family.processor, [row], [one], **options)
        assert (alone.tokens, alone.kept, alone.kept_last) == (answer.tokens, answer.kept, answer.kept_last)
        assert len(answer.kept_last) == answer.schedule.entering[-1]


INSIDE = {
    "ivc_prune": {},
    "ivc_prune, among visual tokens": {"parameters": {"affinity": "visual"}},
    "feather": {},
    "fastv_without_rope": {},
    "dart": {},
    "fastv, by the next layer's projections": {"stage2": {"scorer": "attention_last_token_next_layer"}},
    "fastv, by the next layer's without rope": {"stage2": {"scorer": "attention_last_token_next_layer_without_rope"}},
    "pyramiddrop, without rope": {
        "stage2": {"layer": [1, 3, 5], "scorer": "attention_last_token_next_layer_without_rope"},
        "position": "perc",
    },
}


# Of families whose layouts differ in what stands between patches, the methods that read places and texts before.
CHOOSING = [
    *itertools.product(["tiny_vlm", "tiny_next", "tiny_qwen"], INSIDE),
    *itertools.product(["tiny_onevision", "tiny_smolvlm"], ["feather", "ivc_prune"]),
]


@pytest.mark.parametrize(("family", "case"), CHOOSING, indirect=["family"])
def test_methods_inside_the_model_choose_by_all_that_is_seen(request, family, twin, pictures, case):
    """As a masked stock model, from whose layers the methods choose: texts between images are seen like any other.

    In one message or over two turns, in turn by family and by case.
    """
    number = FAMILIES.index(request.node.callspec.params["family"]) + list(INSIDE).index(case)
    images, method = [pictures[number] for number in (0, 3, 5)], case.split(",")[0]
    options = {"preset": RECIPES[method].presets[0]} | INSIDE[case]
    messages = conversations(family)[number % 2]
    (answer,) = nuwa.generate(
        family.model, family.processor, [images], [messages],
        method=method, retention=0.6, max_new_tokens=MAX_NEW, **options,
    )  # fmt: skip
    layouts = [family.layout_among(image.size) for image in images]
    places = [
        None if column in (-3, -2, -1, view.grid.width) else (row, column)
        for layout in layouts
        for view in layout.views
        for row in range(view.grid.height)
        for column in [
            *range(-view.leading if row == 0 else 0, view.grid.width),
            *[view.grid.width] * (view.newline or (view.closing and row == view.grid.height - 1)),
        ]
    ]
    spec = specify(method, budget=0.6 * layouts[0].tokens, **options).on(layouts[0], family.layers).spec
    reference = InsideModel(
        twin, family.processor, images, messages, list(range(len(places))), spec.position,
        places=places, trims=spec.stage2.trims,
    )  # fmt: skip
    for cut in spec.cuts(answer.schedule):
        reference.choose(cut.layer, cut.keep, cut.scorer.name, cut.scorer.parameters)
    assert list(answer.kept_last) == reference.alive[-1]
    assert list(answer.tokens) == reference.answer(MAX_NEW, family.end_tokens, answer.tokens)[0]


def test_a_text_stands_behind_all_images(family, pictures):
    images, text = pictures[:3], WORDS["testbed" if isinstance(family, LlavaAdapter) else "words"][2]
    options = {"method": "nuwa", "retention": 0.5, "max_new_tokens": MAX_NEW}
    (one,) = nuwa.generate(family.model, family.processor, [images], [text], **options)
    held = {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }
    other = nuwa.generate(family.model, family.processor, None, [held], **options)
    assert (one.tokens, one.kept) == (other.tokens, other.kept)


def test_sizes_that_lead_to_unlike_cuts_are_refused_by_name(tiny_qwen, photos):
    with pytest.raises(ValueError, match=r"images in one sequence are cut together; give images of one size") as caught:
        nuwa.generate(tiny_qwen.model, tiny_qwen.processor, [photos[6:]], ["a ?"], method="vtw", average_tokens=12)
    assert "before different layers" in str(caught.value)


def test_questions_of_a_row_agree_on_what_stands_between_its_images(tiny_vlm, scenes):
    encoded = tiny_vlm.encode_images([Image.fromarray(scenes[0].image)])
    layout = InterleavedLayout.of([encoded[0].layout] * 2, [2])
    planned, _ = plan_interleaved(tiny_vlm, lambda _: specify("random", budget=9), layout)
    selection = select(tiny_vlm, planned, encoded[0].layout, ImageBatch(encoded=encoded, names=["a"]))
    prompts = [[EncodedPrompt((1,), (5,), ((3, 4),)), EncodedPrompt((1,), (6,), ((4, 3),))]]
    with pytest.raises(ValueError) as caught:
        Trunk(tiny_vlm, interleave(layout, [selection, selection]), prompts, "pesp", ["a"], layout)
    assert str(caught.value).startswith(
        "the questions of a row must agree on the texts between images, of [2] tokens; found 2"
    )
