"""Waits of the host in decoding: a GPU idles meanwhile, so that there must be few, whatever is asked of what model."""

from __future__ import annotations

import copy

import pytest
from pretended_device import SYNCS, UPLOADS, Accelerator, on_device

from nuwa.generation import ImageBatch, answer_encoded
from nuwa.methods import specify
from nuwa.vlm import Adapter, adapt

ASKED = ["what is on the left ?", "what is red", "where is the cat ?", "how many", "is the dog near", "a sign ?"]
SHORT, LONG = 2, 14

SPECS = {
    "unpruned": lambda layout: specify("unpruned"),
    "nuwa": lambda layout: specify("nuwa", budget=0.7 * layout.tokens),
}


def with_layers(vlm: Adapter, layers: int):
    model = copy.deepcopy(vlm.model)
    del model.model.language_model.layers[layers:]
    model.config.text_config.num_hidden_layers = layers
    return model


@pytest.mark.parametrize(("method", "penalty"), [("unpruned", 1.3), ("nuwa", 1.0)])
def test_waits_per_token_are_few_and_grow_with_neither_questions_nor_layers(
    method, penalty, tiny_next, photos, record_property
):
    found = {}
    for questions, layers in [(1, 2), (6, 2), (1, 6)]:
        vlm = adapt(on_device(with_layers(tiny_next, layers)), tiny_next.processor)
        vlm.end_tokens, vlm.repetition_penalty = (), penalty  # every answer has its full length
        waits, uploads = [], []
        with Accelerator():
            encoded = vlm.encode_images(photos[:1])
            batch = ImageBatch(encoded=encoded, names=["one"], questions=[ASKED[:questions]])
            for tokens in (SHORT, LONG):
                SYNCS.clear()
                UPLOADS.clear()
                answer_encoded(vlm, batch, SPECS[method], tokens)
                waits.append(SYNCS.total())
                uploads.append(UPLOADS.total())
        found[questions, layers] = tuple((many - few) / (LONG - SHORT) for few, many in (waits, uploads))
        where = dict(SYNCS), dict(UPLOADS)
    record_property("waits and uploads per token", found)
    print(f"{method}: {found}\n{where}")
    assert len(set(found.values())) == 1, f"by questions and layers: {found}; where: {where}"
    waits, uploads = found[1, 2]
    assert 0 < waits <= 0.5 and uploads <= 1, f"where: {where}"
