"""However few tokens pass the layers at once, answers in float32 are the same, and no pass is larger than that."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nuwa
from nuwa.decoder import Trunk
from nuwa.decoder.trunk import HELD_PASSES, usual_pass_tokens
from nuwa.stage1 import get_method
from nuwa.stage2 import Cut, Recycling, get_scorer

MAX_NEW = 4
WORDS = ("what digit is blue?", "how many digits are there?", "locate the red 3 on the left", "is there a green 7?")
# Questions of two images, which begin alike in part and differ in length.
ASKED = [[*WORDS, *(f"{text} {text}" for text in WORDS)], list(WORDS[:3])]
LAST, COSINE = get_scorer("attention_last_token"), get_scorer("cosine_mean_text")
CUTS = {
    "none": [],
    "one": [Cut(4, 12, get_scorer("attention_all_text"))],
    "recycling, then another": [Cut(2, 30, COSINE, recycling=Recycling()), Cut(6, 9, LAST)],
    "of caches too": [Cut(3, 20, LAST, trims=True)],
    "ahead": [Cut(1, 16, get_scorer("attention_last_token_next_layer"))],
}


@pytest.fixture(scope="module")
def asked(tiny_vlm, scenes):
    """Everything a trunk is made of, but for how many tokens pass at once."""
    from PIL import Image

    names = ("scene 0", "scene 1")
    signals = tiny_vlm.signals(
        tiny_vlm.encode(tiny_vlm.pixels([Image.fromarray(one.image) for one in scenes[:2]])), names
    )
    method = get_method("uniform")
    selection = method.select(signals, 60, method.configure(), 0)
    prompts = [[tiny_vlm.encode_prompt(text) for text in of_image] for of_image in ASKED]
    return tiny_vlm, selection, prompts, "rpme", names


def answers(asked, cuts, pass_tokens):
    trunk = Trunk(*asked, pass_tokens=pass_tokens)
    return trunk.answer(cuts, [MAX_NEW] * len(trunk.prompts))


@pytest.fixture(scope="module")
def at_once(asked):
    found = {name: answers(asked, cuts, 10**6) for name, cuts in CUTS.items()}
    assert all(len(set(of_cuts)) > 2 for of_cuts in found.values()), "a constant model would prove nothing"
    return found


@pytest.mark.parametrize("name", CUTS)
@settings(max_examples=3, deadline=None)
@given(pass_tokens=st.integers(8, 200))
def test_answers_do_not_depend_on_how_many_tokens_pass_at_once(asked, at_once, name, pass_tokens):
    assert answers(asked, CUTS[name], pass_tokens) == at_once[name]


def test_features_of_early_layers_and_sequences_of_own_layouts_pass_in_runs_too(tiny_qwen3, photos):
    """Qwen3-VL adds to visual tokens behind its first layers; the library is told of it by a keyword."""

    def ask(**options):
        told = nuwa.generate(
            tiny_qwen3.model,
            tiny_qwen3.processor,
            photos[:2],
            [list(WORDS)] * 2,
            method="fastv",
            retention=0.6,
            max_new_tokens=MAX_NEW,
            **options,
        )
        return [(one.tokens, one.kept_last) for of_image in told for one in of_image]

    found = ask()
    assert ask(pass_tokens=11) == found and len(set(found)) > 2


@pytest.mark.parametrize("name", ["none", "one", "of caches too"])
def test_no_pass_is_larger_and_no_more_rows_are_held(asked, name):
    vlm, passed = asked[0], []
    hook = vlm.language.layers[5].register_forward_pre_hook(lambda layer, given: passed.append(given[0].shape[:2]))
    try:
        answers(asked, CUTS[name], 16)
    finally:
        hook.remove()

    assert passed and max(rows * columns for rows, columns in passed) <= 16 * (1 if name == "none" else 2)
    decoded = [rows for rows, columns in passed if columns == 1]
    row = 12 if name == "one" else 20
    assert name == "none" or (decoded and max(decoded) <= HELD_PASSES * 16 // row)


def test_tokens_before_the_image_pass_every_layer_once_and_as_if_no_other_fork_had_been(asked):
    """They go on from where the trunk stands; an earlier fork below must not move their last bits."""
    trunk, alone = Trunk(*asked), Trunk(*asked)
    width, limits, passed = len(trunk.before), [1] * len(trunk.prompts), []
    assert width
    layers = asked[0].language.layers
    hooks = [
        layer.register_forward_pre_hook(lambda layer, given, number=number: passed.append((number, given[0].shape)))
        for number, layer in enumerate(layers)
    ]
    try:
        trunk.answer([Cut(2, 20, LAST)], limits)
    finally:
        for hook in hooks:
            hook.remove()
    prefix = [number for number, (rows, columns, _) in passed if (rows, columns) == (1, width)]
    assert prefix == list(range(2, len(layers)))

    trunk.answer([Cut(4, 20, LAST)], limits)
    alone.answer([Cut(4, 20, LAST)], limits)
    assert trunk.prefix.held.keys() == alone.prefix.held.keys() == set(range(4, len(layers)))
    for number, pair in trunk.prefix.held.items():
        assert all(map(torch.equal, pair, alone.prefix.held[number]))


def test_forks_of_a_trunk_in_portions_read_the_scores_of_the_whole(asked):
    """Cuts that keep different numbers have portions of different sizes, and one set of scores."""
    read = []

    def score(evidence):
        read.extend(evidence.identity)
        return COSINE.score(evidence)

    counted = dataclasses.replace(COSINE, score=score)
    trunk = Trunk(*asked, pass_tokens=8)
    limits = [MAX_NEW] * len(trunk.prompts)
    for keep in (5, 30):
        cuts = [Cut(2, keep, counted)]
        assert len(list(trunk.portions(cuts))) > 1
        plain = answers(asked, [Cut(2, keep, COSINE)], 10**6)
        assert trunk.answer(cuts, limits) == plain
    assert len(read) == len(trunk.prompts)


@pytest.mark.parametrize(("device", "width", "tokens"), [("cpu", 256, 2048), ("cpu", 4096, 512), ("meta", 4096, 4096)])
def test_what_passes_at_once_follows_from_device_and_width(tiny_vlm, monkeypatch, device, width, tokens):
    monkeypatch.setattr(type(tiny_vlm), "device", torch.device(device))
    monkeypatch.setattr(tiny_vlm.language.config, "hidden_size", width)
    assert usual_pass_tokens(tiny_vlm) == tokens
