"""LearnPruner's stage 1 against a slow oracle, and its weights file: tied to one encoder, whole or refused."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import learnpruner as oracle
from oracles.pictures import KINDS, SHAPES, Picture, draw_picture
from PIL import Image

from nuwa.generation import plan
from nuwa.grid import PatchGrid
from nuwa.methods import specify
from nuwa.signals import VisionSignals
from nuwa.stage1 import get_method
from nuwa.stage1.learnpruner import (
    LearnPruner,
    Lpm,
    WeightsError,
    add_diverse,
    diversity_count,
    read_lpm,
    save_lpm,
    select,
)

torch.set_num_threads(1)
ENCODER = "a" * 64
DIM = 8


def signals_of(*pictures: Picture, encoder: str = ENCODER) -> VisionSignals:
    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(picture, name) for picture in pictures]))

    return VisionSignals(
        grid=PatchGrid(pictures[0].height, pictures[0].width),
        features=stack("features"),
        cls_attention=stack("attention"),
        keys=stack("keys"),
        similarity=stack("similarity"),
        image_ids=tuple(picture.name for picture in pictures),
        encoder=encoder,
    )


def loud_lpm(seed: int, dim: int = DIM) -> Lpm:
    """Random weights under which keep probabilities range from 0 to 1."""
    torch.manual_seed(seed)
    lpm = Lpm(dim)
    with torch.no_grad():
        for parameter in lpm.parameters():
            parameter.normal_(0, 0.7)
    return lpm


def network_of(lpm: Lpm) -> oracle.Network:
    return oracle.Network(*(parameter.detach().numpy().astype(np.float64) for parameter in lpm.parameters()))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lpm") / "lpm.safetensors"
    save_lpm(loud_lpm(1), path, ENCODER, {"steps": 3})
    return path


def picture_of(seed: int, height: int, width: int, kind: str) -> Picture:
    """A picture of an oracle's kind; the awkward ones are made awkward in the features, which is all that is read."""
    picture = draw_picture(seed, height, width, kind, dim=DIM)
    features = picture.features
    if kind == "ties":
        features = np.sign(features) * (np.arange(DIM) % 2 == 0)
    elif kind == "equal":
        features = np.ones_like(features)
    elif kind == "zero_vectors":
        features = features.copy()
        features[::3] = 0
    return dataclasses.replace(picture, features=features.astype(picture.features.dtype))


# --- selection


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_is_the_oracles(weights, shape, kind):
    """Every shape of every kind, and each of both with every share; all three at once below, as they are drawn."""
    share = [0.0, 0.1, 0.34, 0.99][(SHAPES.index(shape) + KINDS.index(kind)) % 4]
    picture = picture_of(3, *shape, kind)
    network = network_of(read_lpm(weights).lpm)
    for keep in sorted({1, -(-picture.tokens // 3), picture.tokens - 1, picture.tokens} - {0}):
        selection = select(signals_of(picture), keep, LearnPruner(str(weights), diversity_share=share))
        expected = oracle.select(picture, network, keep, share)
        assert selection.indices[0].tolist() == expected.kept
        assert selection.indices.dtype == torch.int64 and selection.pillars.all()
        assert np.array_equal(selection.features[0].numpy(), expected.features), "tokens leave as they came"
        assert selection.features.numpy().dtype == picture.features.dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    share=st.floats(0, 0.999),
    data=st.data(),
)
def test_any_selection_is_the_oracles(weights, seed, shape, kind, share, data):
    picture = picture_of(seed, *shape, kind)
    keep = data.draw(st.integers(1, picture.tokens))
    selection = select(signals_of(picture), keep, LearnPruner(str(weights), diversity_share=share))
    expected = oracle.select(picture, network_of(read_lpm(weights).lpm), keep, share)
    assert selection.indices[0].tolist() == expected.kept


@functools.cache
def album_of(kind: str) -> list[Picture]:
    return [draw_picture(seed, 12, 12, kind, dim=48) for seed in range(64)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [16, 48])
def test_batch_and_order_change_nothing(tmp_path, kind, keep):
    path = tmp_path / "lpm.safetensors"
    save_lpm(loud_lpm(2, 48), path, ENCODER, {})
    config = LearnPruner(str(path), diversity_share=0.3)
    album = album_of(kind)
    alone = [select(signals_of(picture), keep, config).indices[0] for picture in album]
    order = np.random.default_rng(0).permutation(64)
    for size in (8, 64):
        for start in range(0, 64, size):
            rows = order[start : start + size]
            together = select(signals_of(*[album[row] for row in rows]), keep, config).indices
            assert torch.equal(together, torch.stack([alone[row] for row in rows]))


def test_ties_of_probability_and_of_similarity_go_to_the_lower_index(weights):
    picture = dataclasses.replace(draw_picture(1, 3, 3, dim=DIM), features=np.ones((9, DIM), np.float32))
    selection = select(signals_of(picture), 5, LearnPruner(str(weights), diversity_share=0.4))
    assert selection.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_diversity_goes_where_nothing_is_chosen_yet():
    """Seeded with (1, 0): the opposite is taken before the orthogonal one, and both before near copies."""
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    assert add_diverse(features, torch.tensor([[0]]), 2).tolist() == [[0, 2, 3]]
    assert add_diverse(features, torch.tensor([[0]]), 4).tolist() == [[0, 2, 3, 1, 4]]


def test_probabilities_that_round_to_one_still_rank():
    """Keep odds of e^40 and e^60: both probabilities are 1 in floating point."""
    lpm = Lpm(2).requires_grad_(False)
    for parameter in lpm.parameters():
        parameter.zero_()
    lpm.hidden.weight[0, 0] = 1.0
    lpm.decide.weight[1, 0] = 1.0
    features = torch.tensor([[40.0, 0.0], [60.0, 0.0]])
    assert lpm(features).double().softmax(-1)[:, 1].tolist() == [1.0, 1.0]
    assert lpm.keep_logit(features).tolist() == [40.0, 60.0]


@pytest.mark.parametrize(
    ("keep", "share", "count"), [(219, 0.1, 22), (55, 0.1, 6), (1, 0.9, 0), (2, 0.99, 1), (9, 0, 0)]
)
def test_a_tenth_of_the_tokens_is_for_diversity(keep, share, count):
    assert diversity_count(keep, share) == count


# --- the module and its file


def test_the_module_has_the_papers_size_at_clip_l_width():
    assert sum(parameter.numel() for parameter in Lpm(1024).parameters()) == 525_826


def test_a_file_gives_back_what_was_saved_and_equal_content_gives_equal_bytes(tmp_path):
    lpm, facts = loud_lpm(4), {"steps": 7, "model": "m", "share": 0.1}
    for name in ("one", "two"):
        save_lpm(lpm, tmp_path / name, ENCODER, dict(sorted(facts.items(), reverse=name == "two")))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    file = read_lpm(tmp_path / "one")
    assert file.encoder == ENCODER and file.training == facts
    for name, value in lpm.state_dict().items():
        assert torch.equal(file.lpm.state_dict()[name], value)
    assert not list(tmp_path.glob("*.tmp"))


def test_weights_of_another_encoder_are_refused_by_both_names(weights):
    config = LearnPruner(str(weights))
    expected = (
        f"learnpruner.weights {str(weights)!r} were trained on encoder aaaaaaaaaaaa, the signals come from encoder "
        "bbbbbbbbbbbb; `make pruner` trains weights for model.path"
    )
    with pytest.raises(WeightsError) as caught:
        select(signals_of(draw_picture(1, 3, 3, dim=DIM), encoder="b" * 64), 2, config)
    assert str(caught.value) == expected
    with pytest.raises(WeightsError) as caught:
        get_method("learnpruner").check(config, "b" * 64)
    assert str(caught.value) == expected
    get_method("learnpruner").check(config, ENCODER)


def test_missing_weights_are_named(tmp_path):
    path = tmp_path / "none.safetensors"
    config = LearnPruner(str(path))
    assert config.digest is None, "a plan can be made before the weights exist"
    with pytest.raises(WeightsError) as caught:
        get_method("learnpruner").check(config, ENCODER)
    assert str(caught.value) == f"learnpruner.weights {str(path)!r}: no such file; `make pruner` trains it"


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "no metadata", "other tensors", "wrong shape", "bad json"])
def test_damaged_weights_are_refused(weights, tmp_path, damage):
    from safetensors.torch import save_file

    path = tmp_path / "lpm.safetensors"
    state = {name: value.clone() for name, value in loud_lpm(1).state_dict().items()}
    facts = {"lpm": '{"encoder": "a", "training": {}}'}
    if damage in ("cut", "empty", "text"):
        whole = weights.read_bytes()
        path.write_bytes({"cut": whole[:-1], "empty": b"", "text": b"not weights at all"}[damage])
    elif damage == "no metadata":
        save_file(state, path)
    elif damage == "bad json":
        save_file(state, path, {"lpm": "{"})
    elif damage == "other tensors":
        save_file({"weight": state["hidden.weight"]}, path, facts)
    else:
        save_file(state | {"decide.weight": torch.zeros(3, DIM // 2)}, path, facts)
    with pytest.raises(WeightsError) as caught:
        get_method("learnpruner").check(LearnPruner(str(path)), ENCODER)
    assert str(caught.value).startswith(f"learnpruner.weights {str(path)!r} are no LPM weights (")
    assert str(caught.value).endswith("); `make pruner` trains them again")


def test_weights_that_changed_since_the_plan_are_refused(tmp_path):
    path = tmp_path / "lpm.safetensors"
    save_lpm(loud_lpm(1), path, ENCODER, {})
    planned = LearnPruner(str(path))
    save_lpm(loud_lpm(2), path, ENCODER, {})
    with pytest.raises(WeightsError) as caught:
        select(signals_of(draw_picture(1, 3, 3, dim=DIM)), 2, planned)
    now = LearnPruner(str(path)).digest
    assert str(caught.value) == (
        f"learnpruner.weights {str(path)!r} hold {now[:12]}, but {planned.digest[:12]} was asked for; "
        "they were trained anew in between: run the same command again"
    )


def test_new_weights_are_used_without_a_new_process(tmp_path):
    path, signals = tmp_path / "lpm.safetensors", signals_of(*[draw_picture(seed, 6, 6, dim=DIM) for seed in range(4)])
    outcomes = []
    for seed in (1, 2):
        save_lpm(loud_lpm(seed), path, ENCODER, {})
        outcomes.append(select(signals, 9, LearnPruner(str(path))).indices)
    assert not torch.equal(*outcomes)


def test_identity_is_the_weights_content_and_not_their_place(tmp_path):
    method = get_method("learnpruner")
    for name, seed in (("one", 1), ("copy", 1), ("other", 2)):
        save_lpm(loud_lpm(seed), tmp_path / name, ENCODER, {})
    one, copy, other = (method.identity(LearnPruner(str(tmp_path / name))) for name in ("one", "copy", "other"))
    assert one == copy and one != other
    assert set(one) == {"digest", "diversity_share"}


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_diversity_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError) as caught:
        LearnPruner(diversity_share=share)
    assert str(caught.value) == f"learnpruner.diversity_share {share} must lie in [0, 1)"


# --- the whole method


@pytest.mark.parametrize(("average", "first", "second"), [(128, 219, 73), (64, 109, 37), (32, 55, 18)])
def test_the_recipe_has_the_papers_schedule(average, first, second):
    """Cut at 12 of 32, K1 : K2 = 3 : 1: 219/73, 109/37 and 55/18 tokens on LLaVA-1.5."""
    spec = specify("learnpruner", budget=average)
    schedule = spec.schedule(PatchGrid(24, 24), 32)
    assert spec.stage2.scorer == "attention_all_text"
    assert schedule.cuts[0][0] == 12
    assert abs(schedule.average_tokens - average) <= 0.5
    assert abs(schedule.stage1_keep - first) <= 1 and abs(schedule.cuts[0][1] - second) <= 1


def test_signals_of_an_unknown_encoder_are_taken_as_they_are(weights):
    signals = signals_of(draw_picture(1, 3, 3, dim=DIM))
    unknown = dataclasses.replace(signals, encoder=None)
    config = LearnPruner(str(weights))
    assert torch.equal(select(unknown, 3, config).indices, select(signals, 3, config).indices)


def test_signals_of_an_adapter_name_its_encoder_and_generation_refuses_foreign_weights(weights, tiny_vlm, scenes):
    images = [Image.fromarray(scenes[0].image)]
    signals = tiny_vlm.signals(tiny_vlm.encode(tiny_vlm.pixels(images)), ("scene",))
    assert signals.encoder == signals[:1].encoder == tiny_vlm.encoder_fingerprint()
    spec = specify("learnpruner", budget=16, parameters={"weights": str(weights)})
    with pytest.raises(WeightsError, match="were trained on encoder aaaaaaaaaaaa"):
        plan(tiny_vlm, spec, tiny_vlm.layout)
