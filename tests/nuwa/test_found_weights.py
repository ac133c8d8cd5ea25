"""LearnPruner's weights are found by the encoder that they were trained for, wherever one stands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import nuwa
from nuwa.stage1.found_weights import SHIPPED, user_store, weight_places, weights_for
from nuwa.stage1.learnpruner import Lpm, WeightsError, read_lpm, save_lpm
from nuwa.vlm import LlavaAdapter

OURS, THEIRS = "a" * 64, "b" * 64
TESTBED = SHIPPED.parent / "testbed"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The user's own folder, in place of the one in their home."""
    monkeypatch.setenv("NUWA_PRUNER", str(tmp_path / "store"))
    return tmp_path / "store"


def weights(path: Path, encoder: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_lpm(Lpm(8), path, encoder, {})
    return path


def refusal(*folders: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        weights_for(OURS, folders)
    return str(caught.value)


def test_the_places_and_their_order(tmp_path, monkeypatch):
    (tmp_path / "llava").mkdir()
    monkeypatch.setenv("NUWA_PRUNER", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weight_places(tmp_path / "llava") == (tmp_path / "pruner", tmp_path / "home/mine", SHIPPED)
    assert (
        weight_places("llava-hf/llava-1.5-7b-hf")
        == weight_places(None)
        == weight_places("")
        == (tmp_path / "home/mine", SHIPPED)
    )
    assert weight_places(TESTBED) == (SHIPPED, tmp_path / "home/mine"), "no place twice"
    monkeypatch.delenv("NUWA_PRUNER")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_store() == tmp_path / "home/.cache/nuwa/pruner"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_store() == tmp_path / "cache/nuwa/pruner"


def test_the_first_place_that_has_weights_of_the_encoder_decides_whatever_they_are_called(tmp_path):
    one, other, last = (tmp_path / name for name in ("one", "other", "last"))
    weights(one / "lpm.safetensors", THEIRS)
    found = weights(other / "of_my_model.safetensors", OURS, seed=1)
    weights(last / "lpm.safetensors", OURS, seed=2)
    held = weights_for(OURS, [tmp_path / "nowhere", one, other, last])
    assert held["weights"] == str(found) and held["digest"] != weights_for(OURS, [last])["digest"]
    shutil.copy(found, other / "copy.safetensors")
    assert weights_for(OURS, [other])["digest"] == held["digest"], "the same content under two names is one"


def test_weights_of_another_encoder_are_never_used_and_the_line_says_all(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    weights(one / "lpm.safetensors", THEIRS)
    (one / "torn.safetensors").write_bytes(b"no weights")
    other.mkdir()
    assert refusal(tmp_path / "gone", one, other) == (
        f"learnpruner has no weights for the model's encoder aaaaaaaaaaaa; looked in {tmp_path}/gone (no such folder), "
        f"{one} (lpm.safetensors is of encoder bbbbbbbbbbbb, torn.safetensors names no encoder), "
        f"{other} (no *.safetensors there); train them with `make pruner` on that model (docs/models.md), or name their "
        "file as learnpruner.weights"
    )
    weights(other / "a.safetensors", OURS, seed=1)
    weights(other / "b.safetensors", OURS, seed=2)
    assert refusal(one, other) == (
        f"{other} holds several weights for encoder aaaaaaaaaaaa: a.safetensors, b.safetensors; name one of them as "
        "learnpruner.weights"
    )


@pytest.fixture(scope="module")
def testbed():
    return LlavaAdapter.load(TESTBED)


def ask(vlm, picture, **options):
    asked = {"method": "learnpruner", "average_tokens": 16, "max_new_tokens": 3, **options}
    return nuwa.generate(vlm.model, vlm.processor, picture, "what digit is blue?", **asked)


def test_a_call_finds_the_testbeds_weights_from_any_folder(testbed, scenes, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = scenes[0].image
    named = ask(testbed, picture, parameters={"weights": str(SHIPPED / "lpm.safetensors")})
    assert ask(testbed, picture).kept == named.kept
    share = {"diversity_share": 0.5}
    assert ask(testbed, picture, parameters=share).kept != named.kept, "other hyper-parameters stay as they are given"

    # Beside the checkpoint and in the user's store, before what is shipped.
    encoder = testbed.encoder_identity
    torch.manual_seed(0)
    width = testbed.signal_widths(testbed.model.config)["features"]
    save_lpm(Lpm(width), store / "mine.safetensors", encoder, {})
    moved = shutil.copytree(TESTBED, tmp_path / "checkpoints/testbed")
    far = LlavaAdapter.load(moved)
    own = ask(far, picture)
    assert own.kept != named.kept
    assert own.kept == ask(far, picture, parameters={"weights": str(store / "mine.safetensors")}).kept
    shutil.copytree(SHIPPED, tmp_path / "checkpoints/pruner")
    assert ask(far, picture).kept == named.kept


def test_a_call_on_another_encoder_is_refused_in_one_line(tiny_vlm, photos, store, tmp_path, monkeypatch):
    monkeypatch.chdir(SHIPPED.parents[1])  # where weights of another encoder lie under the usual name
    with pytest.raises(WeightsError) as caught:
        ask(tiny_vlm, photos[0])
    shipped = read_lpm(SHIPPED / "lpm.safetensors").encoder[:12]
    assert str(caught.value) == (
        f"learnpruner has no weights for the model's encoder {tiny_vlm.encoder_identity[:12]}; looked in {store} (no such "
        f"folder), {SHIPPED} (lpm.safetensors is of encoder {shipped}); train them with `make pruner` on that model "
        "(docs/models.md), or name their file as learnpruner.weights"
    )
