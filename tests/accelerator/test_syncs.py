"""Waits of the host in decoding: a GPU idles meanwhile, so that there must be few, whatever is asked of what model."""

from __future__ import annotations

import copy

import pytest
from pretended_device import SYNCS, Accelerator, on_device

from nuwa.generation import answer_encoded
from nuwa.methods import specify
from nuwa.vlm import Adapter, adapt

ASKED = ["what is on the left ?", "what is red", "where is the cat ?", "how many", "is the dog near", "a sign ?"]
SHORT, LONG = 2, 6

SPECS = {
    "unpruned": lambda layout: specify("unpruned"),
    "nuwa": lambda layout: specify("nuwa", budget=0.7 * layout.tokens),
}


def with_layers(vlm: Adapter, layers: int):
    model = copy.deepcopy(vlm.model)
    del model.model.language_model.layers[layers:]
    model.config.text_config.num_hidden_layers = layers
    return model


@pytest.mark.parametrize("method", SPECS)
def test_syncs_per_token_grow_with_neither_questions_nor_layers(method, tiny_next, photos, record_property):
    found = {}
    for questions, layers in [(1, 2), (6, 2), (1, 6), (6, 6)]:
        vlm = adapt(on_device(with_layers(tiny_next, layers)), tiny_next.processor)
        vlm.end_tokens = ()  # every answer has its full length
        waits = []
        with Accelerator():
            encoded = vlm.encode_images(photos[:1])
            for tokens in (SHORT, LONG):
                SYNCS.clear()
                answer_encoded(vlm, encoded, ["one"], [ASKED[:questions]], SPECS[method], tokens)
                waits.append(SYNCS.total())
        found[questions, layers] = (waits[1] - waits[0]) / (LONG - SHORT)
        where = dict(SYNCS)
    record_property("syncs per token", found)
    print(f"{method}: {found}\n{where}")
    assert len(set(found.values())) == 1 and found[1, 2] > 0, f"by questions and layers: {found}; where: {where}"
