"""Three model families through the stock classes: unpruned is stock ``generate``, pruned is blocked attention."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from listening import heard
from oracles.masked_model import MaskedModel, eager_copy
from oracles.pictures import best_first
from PIL import Image
from safetensors.torch import load_file, save_file

import nuwa
from nuwa.decoder import Trunk
from nuwa.generation import ImageBatch, answer_encoded, plan, select
from nuwa.methods import specify
from nuwa.vlm import EncodedImage, LlavaAdapter, adapt

torch.set_num_threads(1)
MAX_NEW = 8
QUESTIONS = {
    "words": ["what is on the left ?", "how many red", "where is a dog near the blue sign on the right ?"],
    "testbed": ["what digit is blue?", "locate the red 3 on the left", "how many digits are there?"],
}


def questions_for(vlm) -> list[str]:
    return QUESTIONS["testbed" if isinstance(vlm, LlavaAdapter) else "words"]


def pictures_for(vlm, scenes, photos) -> list[Image.Image]:
    return [Image.fromarray(scene.image) for scene in scenes] if isinstance(vlm, LlavaAdapter) else photos


@pytest.fixture(scope="module")
def pictures(family, scenes, photos):
    return pictures_for(family, scenes, photos)


@pytest.fixture(scope="module")
def twin(family):
    return eager_copy(family.model)


def stock_answers(vlm, model, images, questions) -> list[tuple[int, ...]]:
    """One left-padded batch through the stock model's own ``generate``."""
    texts = []
    for question in questions:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        texts.append(vlm.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))
    inputs = vlm.processor(images=[[image] for image in images], text=texts, padding=True, return_tensors="pt")
    if len(images) > 1:
        assert not inputs["attention_mask"].all() and inputs["attention_mask"][:, -1].all(), "padded, at the left"
    out = model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
    end = model.generation_config.eos_token_id
    found = []
    for row in out[:, inputs["input_ids"].shape[1] :].tolist():
        ends = [at for at, token in enumerate(row) if token in (end if isinstance(end, list) else [end])]
        found.append(tuple(row[: ends[0]] if ends else row))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 8])
def test_unpruned_equals_stock_generate(family, twin, pictures, batch, attention):
    vlm = family if attention == "sdpa" else adapt(twin, family.processor)
    asked = [questions_for(vlm)[row % 3] for row in range(batch)]
    found = nuwa.generate(vlm.model, vlm.processor, pictures[:batch], asked, method="unpruned", max_new_tokens=MAX_NEW)
    stock = stock_answers(vlm, vlm.model, pictures[:batch], asked)
    assert [answer.tokens for answer in found] == stock
    assert batch == 1 or len(set(stock)) > 3, "a constant model would prove nothing"


def test_every_end_token_of_the_checkpoint_ends_an_answer(family, pictures):
    """A second one, which the model says in the middle of its usual answers."""
    asked, images = questions_for(family)[:1] * 4, pictures[:4]
    usual = [stock_answers(family, family.model, [image], asked[:1])[0] for image in images]
    model = copy.deepcopy(family.model)
    first = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [first, max(usual, key=len)[1]]
    stock = [stock_answers(family, model, [image], asked[:1])[0] for image in images]
    found = nuwa.generate(model, family.processor, images, asked, method="unpruned", max_new_tokens=MAX_NEW)
    assert [answer.tokens for answer in found] == stock
    assert sum(map(len, stock)) < sum(map(len, usual))


def test_the_checkpoints_repetition_penalty_is_heeded(family, pictures):
    """Qwen2.5-VL's published configuration has one, and stock ``generate`` heeds it in greedy decoding too."""
    model = copy.deepcopy(family.model)
    model.generation_config.repetition_penalty = 1.7
    asked = [questions_for(family)[row % 3] for row in range(4)]
    # One at a time: in a batch stock ``generate`` counts padding as said.
    stock = [stock_answers(family, model, [image], [text])[0] for image, text in zip(pictures[:4], asked, strict=True)]
    found = nuwa.generate(model, family.processor, pictures[:4], asked, method="unpruned", max_new_tokens=MAX_NEW)
    assert [answer.tokens for answer in found] == stock
    usual = nuwa.generate(
        family.model, family.processor, pictures[:4], asked, method="unpruned", max_new_tokens=MAX_NEW
    )
    assert [answer.tokens for answer in usual] != stock


# --- pruned against a stock model with blocked attention, question by question


def run(vlm, spec, images, asked):
    """Selection, scores at every cut and logits at every step of images of one layout."""
    encoded = vlm.encode_images(images)
    layout = encoded[0].layout
    planned = plan(vlm, spec, layout)
    ids = [f"photo {number}" for number in range(len(images))]
    selection = select(vlm, planned, layout, ImageBatch(encoded=encoded, names=ids))
    prompts = [[vlm.encode_prompt(text) for text in texts] for texts in asked]
    trunk = Trunk(vlm, selection, prompts, spec.position, ids, layout)
    limits = [MAX_NEW] * sum(map(len, asked))
    cuts = spec.cuts(planned.schedule)
    with heard(vlm.model.lm_head) as logits:
        if cuts:
            trunk.advance(cuts[0].layer, frozenset({cuts[0].layer - 1}))
            answers = trunk.fork(cuts, limits, spec.seed)
        else:
            answers = trunk.finish(limits)
    return layout, planned.schedule, selection, answers, logits


def stock_embeddings(model, selection, row, plain: MaskedModel) -> torch.Tensor:
    """Language embeddings of a row's tokens by the stock projector; newline tokens are the model's own, words embedded."""
    features = selection.features[row]
    if hasattr(model.model, "visual"):
        return features  # behind Qwen's merger
    if hasattr(model.model, "connector"):  # SmolVLM's
        kept, image = selection.indices[row].tolist(), model.config.image_token_id
        words = torch.tensor([plain.prompt[plain.visual[slot]] != image for slot in kept])
        return torch.where(words[:, None], plain.projected[kept], model.model.connector.modality_projection(features))
    pooled = model.config.model_type == "llava_onevision"  # behind the projector
    embedded = features.clone() if pooled else model.model.multi_modal_projector(features)
    if hasattr(model.model, "image_newline"):
        newline = (plain.projected == model.model.image_newline).all(dim=-1)
        embedded[newline[selection.indices[row]]] = model.model.image_newline
    return embedded


def assert_blocked(vlm, twin, spec, images, asked) -> None:
    _, schedule, selection, answers, heard = run(vlm, spec, images, asked)
    places = [(row, text) for row, texts in enumerate(asked) for text in texts]
    for number, (row, text) in enumerate(places):
        plain = MaskedModel(twin, vlm.processor, images[row], text, [])
        merged = stock_embeddings(twin, selection, row, plain)
        kept = selection.indices[row].tolist()
        reference = MaskedModel(twin, vlm.processor, images[row], text, kept, spec.position, merged)
        untouched = selection.pillars[row]
        assert torch.allclose(merged[untouched], plain.tokens[kept][untouched], atol=1e-4)
        for layer, keep in schedule.cuts:
            reference.cut(layer, keep, reference.scores(layer, spec.stage2.scorer))
        assert list(answers[number].kept) == reference.alive[-1]
        tokens, logits = reference.answer(MAX_NEW, vlm.end_tokens, answers[number].tokens)
        assert list(answers[number].tokens) == tokens
        for step, expected in enumerate(logits):
            active = [at for at, answer in enumerate(answers) if len(answer.tokens) >= step]
            found = heard[step][active.index(number)]
            # 1e-4, and what float32 cannot tell apart in large logits.
            assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5), f"question {number}, step {step}"


SPECS = {
    "stage 1 alone, renumbered": ("random", {"position": "perc"}),
    "stage 1 alone, spread": ("uniform", {"position": "rpme"}),
    "merged tokens and a cut": ("nuwa", {}),
    "a cut by all words, renumbered": (
        "nuwa",
        {"position": "perc", "stage2": {"scorer": "attention_all_text"}, "parameters": {"aggregation": False}},
    ),
    "as released for Qwen2.5-VL": ("nuwa", {"preset": "released_qwen"}),
    "a cut by cosine, spread": ("nuwa", {"position": "rpme", "preset": "paper"}),
    "in the language model only": ("fastv", {}),
    "three cuts, renumbered": ("pyramiddrop", {"position": "perc", "stage2": {"layer": [1, 3, 5]}}),
}
SHARE = {"nuwa": 0.4, "fastv": 0.6, "random": 0.4, "uniform": 0.4, "pyramiddrop": 0.6}


@pytest.mark.parametrize("case", SPECS)
def test_pruned_equals_blocked_attention(family, twin, pictures, case):
    method, options = SPECS[case]
    same_layout = [pictures[0], pictures[5]]
    layout = family.encode_images(same_layout[:1])[0].layout
    spec = specify(method, budget=round(SHARE[method] * layout.tokens), **options)
    first, second, third = questions_for(family)
    assert_blocked(family, twin, spec, same_layout, [[first], [second, third]])


@pytest.mark.parametrize("number", [1, 3, 4, 7])
def test_every_shape_of_image_equals_blocked_attention(family, twin, pictures, number):
    spec = specify("nuwa", budget=24, position="perc")
    assert_blocked(family, twin, spec, [pictures[number]], [questions_for(family)[:1]])


def test_a_cut_keeps_what_the_stock_models_attention_ranks_first(family, twin, pictures):
    text = questions_for(family)[0]
    layout, schedule, _, answers, _ = run(family, specify("fastv", budget=30), [pictures[1]], [[text]])
    ((layer, keep),) = schedule.cuts
    stock = MaskedModel(twin, family.processor, pictures[1], text, list(range(layout.tokens)))
    attention = stock.forward([], attentions=True)[1][layer - 1]
    scores = attention[:, -1, stock.visual].mean(axis=0)
    assert list(answers[0].kept) == sorted(best_first(scores.tolist())[:keep])


def test_a_batch_of_many_shapes_answers_as_each_image_alone(family, pictures):
    asked = [[questions_for(family)[row % 3], questions_for(family)[(row + 1) % 3]] for row in range(8)]
    options = {"method": "nuwa", "retention": 0.3, "position": "rpme", "max_new_tokens": MAX_NEW}
    together = nuwa.generate(family.model, family.processor, pictures, asked, **options)
    for row, picture in enumerate(pictures):
        (alone,) = nuwa.generate(family.model, family.processor, [picture], [asked[row]], **options)
        for one, other in itertools.zip_longest(alone, together[row]):
            assert (one.tokens, one.kept, one.kept_last) == (other.tokens, other.kept, other.kept_last)


@pytest.mark.parametrize("size", [(240, 4), (241, 5), (400, 3)])
def test_a_picture_so_wide_that_only_the_base_crop_is_left_is_answered_as_stock_does(tiny_next, size):
    picture = Image.effect_noise(size, 90).convert("RGB")
    layout = tiny_next.layout_of(picture.size)
    assert [view.grid.tokens for view in layout.views] == [36]
    asked = questions_for(tiny_next)[:1]
    found = nuwa.generate(
        tiny_next.model, tiny_next.processor, [picture], asked, method="unpruned", max_new_tokens=MAX_NEW
    )
    assert [tuple(one.tokens) for one in found] == stock_answers(tiny_next, tiny_next.model, [picture], asked)
    (pruned,) = nuwa.generate(
        tiny_next.model, tiny_next.processor, [picture], asked, method="nuwa", retention=0.5, max_new_tokens=4
    )
    assert pruned.tokens


def test_a_picture_so_tall_that_only_ends_of_lines_are_left_is_refused_for_that(tiny_next):
    with pytest.raises(
        ValueError, match=r"^so tall that no column of its local grid is left without the padding, only"
    ):
        tiny_next.layout_of((4, 240))


# --- families that share their structure with one of the three


def test_a_newer_family_unpruned_equals_stock_generate(newer, photos):
    asked = [QUESTIONS["words"][row % 3] for row in range(8)]
    stock = stock_answers(newer, newer.model, photos, asked)
    found = nuwa.generate(newer.model, newer.processor, photos, asked, method="unpruned", max_new_tokens=MAX_NEW)
    assert [answer.tokens for answer in found] == stock and len(set(stock)) > 3
    (alone,) = stock_answers(newer, newer.model, photos[:1], asked[:1])
    one = nuwa.generate(newer.model, newer.processor, photos[0], asked[0], method="unpruned", max_new_tokens=MAX_NEW)
    assert one.tokens == alone


def test_the_older_class_of_a_family_unpruned_equals_stock_generate(tiny_idefics3, photos):
    """Idefics3, with its processor as it is: nothing of it needs torchvision."""
    asked = [QUESTIONS["words"][row % 3] for row in range(8)]
    vlm = tiny_idefics3
    stock = stock_answers(vlm, vlm.model, photos, asked)
    found = nuwa.generate(vlm.model, vlm.processor, photos, asked, method="unpruned", max_new_tokens=MAX_NEW)
    assert [answer.tokens for answer in found] == stock and len(set(stock)) > 3


@pytest.fixture(scope="module")
def newer_twin(newer):
    return eager_copy(newer.model)


@pytest.mark.parametrize("case", ["as released for Qwen2.5-VL", "three cuts, renumbered", "a cut by cosine, spread"])
def test_a_newer_family_pruned_equals_blocked_attention(newer, newer_twin, photos, case):
    method, options = SPECS[case]
    tokens = newer.layout_of(photos[1].size).tokens
    spec = specify(method, budget=round(SHARE[method] * tokens), **options)
    first, second, _ = QUESTIONS["words"]
    assert_blocked(newer, newer_twin, spec, [photos[1]], [[first, second]])


def test_a_newer_family_answers_from_cached_features_as_from_pixels(newer, photos, tmp_path):
    encoded = newer.encode_images(photos[:3])
    stored = []
    for number, image in enumerate(encoded):
        save_file({name: value.contiguous() for name, value in image.signals.items()}, tmp_path / str(number))
        stored.append(EncodedImage(newer.layout_of(photos[number].size), load_file(tmp_path / str(number))))

    def answered(images):
        batch = ImageBatch(encoded=images, names=list("abc"), questions=[QUESTIONS["words"]] * 3)
        answers = answer_encoded(newer, batch, lambda layout: specify("nuwa", budget=layout.tokens // 3), MAX_NEW)
        return [(one.tokens, one.kept, one.kept_last) for of_image in answers for one in of_image]

    assert answered(stored) == answered(encoded)
