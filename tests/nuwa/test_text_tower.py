"""CLIP's text half beside a model: relevance as CLIP's own forward pass gives it, question by question."""

from __future__ import annotations

import gc
import os
import shutil
import weakref

import pytest
import torch
from oracles.masked_model import eager_copy
from transformers import CLIPModel

from benchmarks.gpu.families import write_text_tower
from nuwa import generate
from nuwa.benchmarks.answers import SINGLE_WORD
from nuwa.library import identity
from nuwa.vlm import CheckpointError, adapt, view_signals
from nuwa.vlm.text_tower import REQUEST, TextTower, TextTowerError

QUESTIONS = ["what is red?", "where is the dog, on the left or near the blue sign?", "a cat"]


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def seen(request, tiny_vlm, tiny_next, photos, tmp_path_factory):
    """A model with its text tower, and views of two images of one layout."""
    plain = {"llava": tiny_vlm, "llava_next": tiny_next}[request.param]
    folder = write_text_tower(plain, tmp_path_factory.mktemp("clip"))
    vlm = adapt(plain.model, plain.processor, text_tower=folder)
    encoded = vlm.encode_images([photos[0], photos[5]])
    together = {name: torch.stack([image.signals[name] for image in encoded]) for name in encoded[0].signals}
    return vlm, folder, view_signals(encoded[0].layout, together, ("one", "two"), project=vlm.project)


def test_relevance_is_the_cosine_in_clips_own_space(seen):
    vlm, folder, views = seen
    clip = CLIPModel.from_pretrained(folder).eval()
    tower = vlm.text_tower
    asked = [QUESTIONS[:2], QUESTIONS[2:]]
    rows = vlm.read_questions(views, asked)
    for view, found in zip(views, rows, strict=True):
        for row, (image, question) in enumerate(zip([0, 0, 1], QUESTIONS, strict=True)):
            patches = clip.visual_projection(clip.vision_model.post_layernorm(view.features[image]))
            parts = []
            for ids in tower.segments(question):
                own = ids[ids > 0][None]
                states = clip.text_model(input_ids=own, attention_mask=torch.ones_like(own)).last_hidden_state
                parts.append(clip.text_projection(states[0, own[0].argmax()]))
            expected = torch.stack([torch.cosine_similarity(patches, part[None], dim=1) for part in parts]).mean(dim=0)
            assert torch.allclose(found.relevance[row], expected, atol=1e-5)
        assert torch.equal(found.features, view.features[[0, 0, 1]])
        (alone,) = [one for one in vlm.read_questions([view[1:]], [QUESTIONS[2:]])]
        assert torch.equal(alone.relevance[0], found.relevance[2]), "a question's numbers depend on no other"


def test_a_long_question_is_cut_into_segments(seen):
    tower = seen[0].text_tower.loaded(seen[0].tower.state_dict(), torch.device("cpu"))
    first, *middle, last = tower.segments(QUESTIONS[1]).tolist()
    begin, end = 59, 60
    assert first[0] == begin and end not in first and end in last and begin not in last
    assert all(begin not in row and end not in row and 0 not in row for row in middle)
    assert last[last.index(end) + 1 :] == [0] * (11 - last.index(end))
    assert REQUEST == SINGLE_WORD
    assert torch.equal(tower.segments("what?" + SINGLE_WORD), tower.segments("what?"))


def test_cdpruner_answers_each_question_as_if_asked_alone(seen, photos):
    vlm, folder, _ = seen
    options = {"method": "cdpruner", "retention": 0.3, "max_new_tokens": 4, "text_tower": folder}
    together = generate(vlm.model, vlm.processor, photos[:2], [QUESTIONS[:2], QUESTIONS[2:]], **options)
    flat = [answer for answers in together for answer in answers]
    assert [len(answers) for answers in together] == [2, 1]
    for (image, question), answer in zip([(0, 0), (0, 1), (1, 2)], flat, strict=True):
        (alone,) = generate(vlm.model, vlm.processor, [photos[image]], [QUESTIONS[question]], **options)
        assert (alone.tokens, alone.kept) == (answer.tokens, answer.kept)
    assert flat[0].kept != flat[1].kept, "another question keeps other tokens"


def test_a_tower_of_another_encoder_is_refused_by_name(seen, tmp_path):
    vlm, folder, views = seen
    twin = eager_copy(vlm.model)
    with torch.no_grad():
        twin.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1
    other = adapt(twin, vlm.processor, text_tower=folder)
    with pytest.raises(TextTowerError) as caught:
        other.read_questions(views, [QUESTIONS[:1], QUESTIONS[:1]])
    assert str(caught.value) == (
        f"text_tower {str(folder)!r}: its vision half is not the model's encoder (tensor "
        "encoder.layers.0.mlp.fc1.bias differs); name the CLIP model that the encoder was taken from, or set relevance: none"
    )
    with pytest.raises(TextTowerError, match="no readable config"):
        TextTower(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        TextTower(tmp_path).check({})


def test_encoders_without_a_text_half_are_refused_by_name(tiny_qwen, photos):
    with pytest.raises(ValueError) as caught:
        generate(tiny_qwen.model, tiny_qwen.processor, photos[:1], ["a"], method="cdpruner", retention=0.5)
    assert str(caught.value) == (
        "method 'cdpruner' reads the relevance of tokens to the question, which takes CLIP's text tower, and "
        f"{tiny_qwen.encoder} is no half of a CLIP model: set relevance: none"
    )


def test_a_tower_is_read_once_a_model_and_again_when_its_files_or_the_encoder_changed(seen, photos, tmp_path):
    vlm, folder, _ = seen
    own = shutil.copytree(folder, tmp_path / "clip")
    twin = eager_copy(vlm.model)

    def answer(model):
        options = {"method": "cdpruner", "retention": 0.3, "max_new_tokens": 2, "text_tower": str(own)}
        told = generate(model, vlm.processor, photos[0], QUESTIONS[0], **options)
        return told.kept, identity._TOWERS[model][1]

    kept, tower = answer(twin)
    assert answer(twin) == (kept, tower), "the same object"
    os.utime(own / "config.json")
    again, fresh = answer(twin)
    assert again == kept and fresh is not tower
    with torch.no_grad():
        twin.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1
    with pytest.raises(TextTowerError, match="is not the model's encoder"):
        answer(twin)

    held = weakref.ref(identity._TOWERS[twin][1])
    del twin, tower, fresh
    gc.collect()
    assert held() is None, "released with the model"
