"""LearnPruner's module on models whose images differ in layout: rightly masked, resumed to the same bytes, better than chance."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from oracles.masked_model import MaskedModel, eager_copy
from PIL import Image

from nuwa.pruner.instructions import read_instructions
from nuwa.pruner.layouts import NO_VIEW, LayoutConversations
from nuwa.pruner.train import build_learner, evaluator, train_pruner
from nuwa.stage1.learnpruner import LearnPruner, check, read_lpm
from nuwa.testbed.instruction import IGNORE
from nuwa.training import PhaseSchedule

torch.set_num_threads(1)
SIZES = [(60, 40), (30, 70), (48, 48), (41, 57)]
ASKED, SAID = "what is on the left ?", ["red", "blue cat", "dog", "sign"]


@pytest.fixture(scope="module", params=["tiny_next", "tiny_qwen"])
def vlm(request):
    vlm = copy.deepcopy(request.getfixturevalue(request.param))
    template = vlm.processor.chat_template
    vlm.processor.chat_template = template.replace("user :", "{{ '' if loop.first else ' ' }}{{ message['role'] }} :")
    return vlm


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four pictures of different shapes, one question each."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(3)
    entries = []
    for number, (size, said) in enumerate(zip(SIZES, SAID, strict=True)):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": said}]
        entries.append({"image": f"{number}.png", "conversations": turns})
    path = folder / "instructions.json"
    path.write_text(json.dumps(entries))
    return path


def conversations(vlm, path, share=1.0) -> LayoutConversations:
    return LayoutConversations(vlm, read_instructions(path, path.parent, 0, share), 10_000)


def test_dropping_is_blocked_attention_in_the_stock_model(vlm, data):
    """Images of four layouts in one batch, newline tokens kept, position ids the stock model's own."""
    batch = conversations(vlm, data).draw(np.random.default_rng(0), 4)
    assert len({int((row != NO_VIEW).sum()) for row in batch["view"]}) > 2
    learner = build_learner(vlm, 0, "topk_ste", 0.4, 10.0)
    twin = eager_copy(vlm.model)
    mask = learner.mask(learner.features(batch), batch).detach().round()
    with torch.no_grad():
        found = learner.answer_logits(batch, learner.features(batch), mask)
    learner.release()

    at = 0
    for row, taught in enumerate(batch["labels"] != IGNORE):
        answer = batch["labels"][row][taught].tolist()
        said = vlm.processor.tokenizer.decode(answer[:-1])
        number = SAID.index(said)
        image = Image.open(data.parent / f"{number}.png").convert("RGB")
        layout, real = vlm.layout_of(image.size), batch["view"][row] != NO_VIEW
        alive = set(layout.fixed.nonzero()[:, 0].tolist())
        alive |= {int(slot) for slot, kept in zip(batch["slot"][row][real], mask[row][real], strict=True) if kept}
        stock = MaskedModel(twin, vlm.processor, image, ASKED, sorted(alive))
        assert len(alive) < layout.tokens
        expected = stock.steps(answer[:-1])
        assert torch.allclose(found[at : at + len(answer)], expected, atol=1e-4, rtol=1e-4)
        at += len(answer)
    assert at == len(found)


def test_every_view_keeps_its_share_and_kept_and_dropped_tokens_teach(vlm, data):
    batch = conversations(vlm, data).draw(np.random.default_rng(1), 3)
    learner = build_learner(vlm, 0, "topk_ste", 0.3, 10.0)
    mask = learner.mask(learner.features(batch), batch)
    for row, views in enumerate(batch["view"]):
        for view in range(int(views.max()) + 1):
            own = views == view
            assert float(mask[row, own].sum().detach()) == round(0.3 * int(own.sum()))
    mask.retain_grad()
    learner.answer_loss(batch, learner.features(batch), mask).backward()
    real = batch["view"] != NO_VIEW
    for chosen in (True, False):
        assert (mask.grad[real & ((mask > 0.5) == chosen)] != 0).float().mean() > 0.9
    assert not mask.grad[~real].any() and all(parameter.grad is None for parameter in vlm.model.parameters())
    learner.release()


SCHEDULE = PhaseSchedule(
    steps=4, batch_size=2, learning_rate=3e-3, warmup=1, checkpoint_every=1, evaluate_every=4, log_every=2
)


class Killed(Exception):
    pass


def train(vlm, path, folder, kill_at=None):
    logged = []

    def log(step, metrics):
        logged.append((step, metrics))
        if step == kill_at:
            raise Killed

    output = folder / "lpm.safetensors"
    learner = build_learner(vlm, 5, "topk_ste", 0.2, 10.0)
    schedule, facts = SCHEDULE, {"steps": SCHEDULE.steps}
    train_pruner(
        learner,
        conversations(vlm, path, 0.75),
        output,
        folder / "kept",
        seed=5,
        schedule=schedule,
        facts=facts,
        log=log,
    )
    return output, logged


def test_a_killed_training_resumes_to_the_same_bytes_and_leaves_the_model_as_it_was(vlm, data, tmp_path):
    before = copy.deepcopy(vlm.model)
    before.requires_grad_(True)
    vlm.model.requires_grad_(True)
    whole, logged = train(vlm, data, tmp_path / "whole")
    with pytest.raises(Killed):
        train(vlm, data, tmp_path / "killed", kill_at=2)
    again, resumed = train(vlm, data, tmp_path / "killed")
    assert resumed[0][0] == 2 and again.read_bytes() == whole.read_bytes()
    assert {"pruner/validation_loss_lpm", "pruner/validation_loss_random"} <= set(logged[-1][1])
    assert read_lpm(whole).encoder == vlm.encoder_fingerprint()
    check(LearnPruner(str(whole)), vlm.encoder_fingerprint())

    assert vlm.language.config._attn_implementation == before.model.language_model.config._attn_implementation
    for one, other in zip(vlm.model.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
    vlm.model.requires_grad_(False)


def test_trained_on_pictures_it_serves_their_answers_better_than_random_tokens(vlm, data):
    """The made task: four answers that hang on what is seen, at a fifth of the tokens."""
    learner = build_learner(vlm, 0, "topk_ste", 0.2, 10.0)
    batch = conversations(vlm, data).draw(np.random.default_rng(2), 4)

    class Same(LayoutConversations):
        def validation(self, seed, size):
            return batch

    measure = evaluator(vlm, Same(vlm, read_instructions(data, data.parent, 0, 1.0), 10_000))
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    start = measure(learner)
    for _ in range(12):
        optimizer.zero_grad()
        learner(batch)["answers"].backward()
        optimizer.step()
    end = measure(learner)
    learner.release()
    assert end["validation_loss_lpm"] < min(start["validation_loss_lpm"], end["validation_loss_random"])


def test_models_that_cannot_be_taught_are_refused_by_name(tiny_qwen3):
    with pytest.raises(ValueError) as caught:
        build_learner(tiny_qwen3, 0, "topk_ste", 0.2, 10.0)
    assert str(caught.value) == (
        "LearnPruner's module is trained for models of family llava, llava_next, qwen2_vl, qwen2_5_vl, not qwen3_vl"
    )
