"""Training of the LPM: dropping is real, gradients are what the equations say, both sparsities hold their share."""

from __future__ import annotations

import copy
import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import dropping as oracle

from nuwa.pruner.conversations import Scenes, draw_batch, draw_conversation, draw_subset, pack_for
from nuwa.pruner.learner import attend_to_kept, best_tokens, relative_to_threshold, straight_through
from nuwa.pruner.train import build_learner, evaluator
from nuwa.testbed.instruction import IGNORE, pack
from nuwa.training import step_rng

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def own_vlm(tiny_vlm):
    """A copy, because a learner takes over its model's attention."""
    return copy.deepcopy(tiny_vlm)


@pytest.fixture(scope="module")
def batch(own_vlm):
    return draw_batch(own_vlm, 0, "train", np.arange(2))


def learner_of(vlm, sparsity="topk_ste", keep_share=0.25, penalty_weight=10.0):
    return build_learner(vlm, 0, sparsity, keep_share, penalty_weight)


# --- dropping


def test_masking_is_dropping_with_the_original_position_ids(tiny_vlm, own_vlm, batch):
    """The reference is the stock model on sequences from which the dropped tokens are gone, one question at a time."""
    learner = learner_of(own_vlm)
    features = learner.features(batch)
    mask = learner.mask(features)
    assert mask.sum(dim=1).tolist() == [36, 36]
    with torch.no_grad():
        found = learner.answer_logits(batch, features, mask)
        projected = tiny_vlm.project(features)
    at = 0
    for row in range(2):
        ids, blocks, labels = (batch[name][row] for name in ("input_ids", "blocks", "labels"))
        image = ids == tiny_vlm.image_token
        gone = image.clone()
        gone[image] = mask[row].detach() == 0
        for block in range(1, int(blocks.max()) + 1):
            columns = (((blocks == 0) & ~gone) | (blocks == block)).nonzero()[:, 0]
            embeds = tiny_vlm.language.embed_tokens(ids)
            embeds[image] = projected[row]
            with torch.no_grad():
                hidden = tiny_vlm.language(
                    inputs_embeds=embeds[None, columns], position_ids=batch["position_ids"][row][None, columns]
                ).last_hidden_state
                expected = tiny_vlm.model.lm_head(hidden[0, labels[columns] != IGNORE])
            mine = found[at : at + len(expected)]
            at += len(expected)
            assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()
    assert at == len(found)


def test_a_dropped_token_cannot_be_felt(own_vlm, batch):
    learner = learner_of(own_vlm)
    features = learner.features(batch)
    mask = learner.mask(features).detach()
    with torch.no_grad():
        before = learner.answer_logits(batch, features, mask)
        dropped = learner.answer_logits(batch, features + 9 * (mask == 0)[..., None], mask)
        kept = learner.answer_logits(batch, features + 9 * (mask == 1)[..., None], mask)
    assert torch.equal(dropped, before)
    assert (kept - before).abs().max() > 1e-2


# --- gradients


def draw_attention(seed: int, heads: int = 4, held: int = 2, tokens: int = 6, loud: float = 1.0):
    """Two rows of 1 + ``tokens`` + 3 columns; the visual tokens stand from column 1 on, half of them are dropped."""
    rng = torch.Generator().manual_seed(seed)
    length = tokens + 4
    query = loud * torch.randn(2, heads, length, 8, generator=rng)
    key, value = (loud * torch.randn(2, held, length, 8, generator=rng) for _ in range(2))
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    kept = best_tokens(torch.rand(2, tokens, generator=rng), tokens // 2).requires_grad_()
    return query, key, value, visible, kept


def attend(query, key, value, visible, kept):
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    return attend_to_kept(module, query, key, value, visible, scaling=0.3, kept=kept, first=1)[0].transpose(1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_masks_gradient_is_the_stated_one(seed):
    query, key, value, visible, kept = draw_attention(seed)
    out = attend(query, key, value, visible, kept)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 100))
    out.backward(upstream)
    for row in range(2):
        hard = np.ones(key.shape[2])
        hard[1:7] = kept[row].detach().numpy()
        expected = sum(
            oracle.mask_gradient(
                query[row, head].numpy(), key[row, head // 2].numpy(), value[row, head // 2].numpy(), hard,
                upstream[row, head].numpy(), visible[row, 0].numpy(), 0.3,
            )
            for head in range(query.shape[1])
        )[1:7]  # fmt: skip
        np.testing.assert_allclose(kept.grad[row].numpy(), expected, rtol=2e-4, atol=2e-5)
        assert (np.abs(expected[hard[1:7] == 0]) > 1e-4).all(), "dropped tokens have a gradient too"


def test_a_token_that_attention_misses_badly_has_a_bounded_gradient():
    """Its derivative would be e^60: the weight it would get by coming back is 1."""
    query, key, value, visible, kept = draw_attention(5)
    missed = int((kept[0] == 0).nonzero()[0]) + 1
    key[0, :, missed] = 0
    query[0], key[0, :, missed, 0] = 0, 100
    query[0, :, :, 0] = 2
    out = attend(query, key, value, visible, kept)
    out.sum().backward()
    assert torch.isfinite(kept.grad).all()
    change = (value[0, :, missed] - 0).abs().sum() * 2 + out[0].abs().sum()
    assert 1e-3 < kept.grad[0, missed - 1].abs() < change * out.shape[2]


def test_queries_keys_and_values_get_the_gradient_of_plain_masked_attention():
    query, key, value, visible, kept = draw_attention(7)
    leaves = [part.requires_grad_() for part in (query, key, value)]
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(attend(*leaves, visible, kept), leaves, upstream)
    seen = visible.clone()
    seen[..., 1:7] &= (kept.detach() > 0)[:, None, None]
    wide = [part.repeat_interleave(2, dim=1) for part in (key, value)]
    scores = (query @ wide[0].transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    theirs = torch.autograd.grad(scores.softmax(-1) @ wide[1], leaves, upstream)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 1e-5


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other():
    soft = torch.tensor([0.2, 0.7], requires_grad=True)
    mask = straight_through(torch.tensor([1.0, 0.0]), soft)
    assert mask.tolist() == [1.0, 0.0]
    (mask * torch.tensor([3.0, 5.0])).sum().backward()
    assert soft.grad.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("sparsity", ["topk_ste", "ratio_penalty"])
def test_kept_and_dropped_tokens_both_teach_the_module_and_nothing_else_learns(own_vlm, batch, sparsity):
    learner = learner_of(own_vlm, sparsity)
    features = learner.features(batch)
    mask = learner.mask(features)
    mask.retain_grad()
    learner.answer_loss(batch, features, mask).backward()
    hard = mask.detach() > 0.5
    assert 0 < hard.float().mean() < 1
    for group in (hard, ~hard):
        assert (mask.grad[group] != 0).float().mean() > 0.99
    assert all((parameter.grad != 0).any() for parameter in learner.lpm.parameters())
    assert all(parameter.grad is None for parameter in own_vlm.model.parameters())
    assert {name.partition(".")[0] for name, _ in learner.named_parameters()} == {"lpm"}


def test_computing_layers_again_gives_the_same_gradient_from_less_memory(own_vlm, batch):
    outcomes = []
    for recompute in (False, True):
        learner = build_learner(own_vlm, 0, "topk_ste", 0.25, 10.0, recompute)
        held = []

        def count(tensor, held=held):
            held.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = learner(batch)["answers"]
        loss.backward()
        outcomes.append((loss.detach(), [parameter.grad for parameter in learner.lpm.parameters()], sum(held)))
    (loss, gradients, memory), (again, same, less) = outcomes
    assert torch.equal(loss, again)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same, strict=True))
    assert less < memory / 4


# --- sparsity


def test_topk_keeps_exactly_its_share_and_the_threshold_moves_no_rank(own_vlm, batch):
    learner = learner_of(own_vlm, keep_share=0.3)
    features = learner.features(batch)
    assert learner.keep == 43
    assert learner.mask(features).sum(dim=1).tolist() == [43.0, 43.0]
    assert float(learner(batch)["keep_rate"]) == pytest.approx(43 / 144)
    logit = learner.lpm.keep_logit(features).detach()
    shifted = relative_to_threshold(logit, 43)
    assert torch.equal((shifted > 0).float(), learner.mask(features).detach())
    assert torch.equal(shifted.argsort(dim=1), logit.argsort(dim=1))


def test_no_gradient_moves_or_spreads_all_logits_of_an_image_together():
    logits = torch.randn(3, 9, requires_grad=True)
    (relative_to_threshold(logits, 4).sigmoid() * torch.randn(3, 9)).sum().backward()
    assert logits.grad.abs().max() > 1e-2
    assert logits.grad.sum(dim=1).abs().max() < 1e-6
    assert (logits.grad * logits).sum(dim=1).abs().max() < 1e-3


def test_top_tokens_break_ties_to_the_lower_index():
    assert best_tokens(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), 2).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_the_ratio_penalty_is_the_squared_distance_from_the_share(own_vlm, batch):
    learner = learner_of(own_vlm, "ratio_penalty", keep_share=0.25, penalty_weight=7.0)
    scalars = learner(batch)
    rate = float((learner.lpm.keep_logit(learner.features(batch)) > 0).float().mean())
    assert float(scalars["keep_rate"]) == pytest.approx(rate)
    assert float(scalars["sparsity"].detach()) == pytest.approx(7 * (rate - 0.25) ** 2, rel=1e-4)
    assert not scalars["keep_rate"].requires_grad, "a reading, not a loss"


def test_the_ratio_penalty_brings_the_keep_rate_to_its_share(own_vlm, batch):
    learner = learner_of(own_vlm, "ratio_penalty", keep_share=0.25, penalty_weight=1000.0)
    features = learner.features(batch)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    start = float(learner.mask(features).detach().mean())
    assert abs(start - 0.25) > 0.1
    for _ in range(60):
        optimizer.zero_grad()
        (learner.penalty_weight * (learner.mask(features).mean() - learner.keep_share) ** 2).backward()
        optimizer.step()
    assert float(learner.mask(features).detach().mean()) == pytest.approx(0.25, abs=0.05)


def test_training_on_an_image_lowers_its_loss(own_vlm, batch):
    learner = learner_of(own_vlm, keep_share=0.2)
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = learner(batch)["answers"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-4:]) < losses[0] - 0.1, losses


# --- data


def test_prompts_are_the_models_own_and_pack_as_the_testbeds_do(tiny_vlm):
    _, questions = draw_conversation(3, "train", 5)
    mine, theirs = pack_for(tiny_vlm, questions), pack(tiny_vlm.processor.tokenizer, questions)
    for name in ("input_ids", "position_ids", "blocks", "labels"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_a_share_is_fixed_and_larger_shares_contain_smaller_ones():
    tenth, half = draw_subset(3, 1000, 0.1), draw_subset(3, 1000, 0.5)
    assert len(tenth) == 100 and len(half) == 500 and len(set(half)) == 500
    assert set(tenth) < set(half) <= set(range(1000))
    assert np.array_equal(tenth, draw_subset(3, 1000, 0.1))
    assert not np.array_equal(tenth, draw_subset(4, 1000, 0.1))


def test_an_image_has_the_same_content_in_any_batch(tiny_vlm):
    alone, among = draw_batch(tiny_vlm, 0, "train", np.array([7])), draw_batch(tiny_vlm, 0, "train", np.array([3, 7]))
    assert torch.equal(alone["pixels"][0], among["pixels"][1])
    length = alone["input_ids"].shape[1]
    assert torch.equal(alone["labels"][0], among["labels"][1, :length])
    scene, _ = draw_conversation(0, "train", 7)
    other, _ = draw_conversation(0, "validation", 7)
    assert scene.objects != other.objects


def test_the_default_recipe_draws_the_scenes_it_always_drew(tiny_vlm):
    """The digest is of the first two batches of the recipe that made the committed weights, pixels rounded to 1/64."""
    scenes, digest = Scenes(tiny_vlm, 0, 20_000, 0.1), hashlib.sha256()
    for step in range(2):
        batch = scenes.draw(step_rng(0, "pruner", step, 0), 4)
        for name in ("input_ids", "position_ids", "blocks", "labels"):
            digest.update(batch[name].numpy().astype("<i8").tobytes())
        digest.update((batch["pixels"] * 64).round().numpy().astype("<i2").tobytes())
    assert digest.hexdigest() == "8268a576eccce1c8d672436cc38f1984ccf4f6e40c7a441bcfb90db736934fe4"


# --- validation


def test_validation_compares_with_random_tokens_and_with_all(own_vlm, monkeypatch):
    monkeypatch.setattr("nuwa.pruner.train.VALIDATION_IMAGES", 2)
    learner = learner_of(own_vlm, keep_share=0.2)
    metrics = evaluator(own_vlm, Scenes(own_vlm, 0, 20, 0.1))(learner)
    batch = draw_batch(own_vlm, 13, "validation", np.arange(2))
    features = learner.features(batch)
    with torch.no_grad():
        whole = learner.answer_loss(batch, features, torch.ones(2, 144))
        mine = learner.answer_loss(batch, features, learner.mask(features))
    assert metrics["validation_loss_all"] == pytest.approx(float(whole), rel=1e-6)
    assert metrics["validation_loss_lpm"] == pytest.approx(float(mine), rel=1e-6)
    assert metrics["validation_loss_random"] not in (metrics["validation_loss_lpm"], metrics["validation_loss_all"])
    assert 0 <= metrics["validation_argmax_share"] <= 1
