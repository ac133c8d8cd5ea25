"""Every allowed language model inside LLaVA, tiny and random: unpruned as stock ``generate``, pruned as a masked stock model.

Each has what sets its family apart switched on: windows shorter than the sequence, layers without positions, normalised
queries and keys, soft-capping, multipliers, interleaved rotary embedding.
"""

from __future__ import annotations

import copy

import pytest
import torch
from oracles.masked_model import MaskedModel, eager_copy
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.gpu.families import TEMPLATE, louden, tokenizer
from nuwa.decoder import Trunk
from nuwa.decoder.attention import project
from nuwa.decoder.finite import NotFinite
from nuwa.stage1 import get_method
from nuwa.stage2 import Cut, CutEvidence, Scorer, get_scorer
from nuwa.vlm import LlavaAdapter
from nuwa.vlm.language import TEXT_FAMILIES, UnsupportedModel

SIDE, PATCH, LAYERS, MAX_NEW = 24, 4, 4, 5
QUESTIONS = ["what is on the left ?", "what is red", "where is the cat near the blue sign ?"]
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SPECIAL = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "layer_types": ALTERNATING},
    "qwen3": {"head_dim": 12, "use_sliding_window": True, "sliding_window": 20, "layer_types": ALTERNATING},
    "gemma": {"head_dim": 12},
    "gemma2": {
        "head_dim": 12,
        "sliding_window": 20,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
        "layer_types": ALTERNATING,
    },
    "gemma3_text": {"head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 7, "layer_types": ALTERNATING},
    "phi3": {"sliding_window": 20},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "olmo2": {},
    "smollm3": {
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 20,
        "layer_types": ALTERNATING,
    },
    "cohere": {"use_qk_norm": True},
    "cohere2": {"sliding_window": 20, "layer_types": ALTERNATING},
}
EAGER = {"gemma2"}  # soft-caps attention, which sdpa cannot


def build(name: str, **options) -> LlavaAdapter:
    torch.manual_seed(21)
    words = tokenizer("<image>")
    text = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            projection_dim=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=AutoConfig.for_model(name, **{**text, **SPECIAL.get(name, {}), **options}),
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    config._attn_implementation = "eager" if name in EAGER else "sdpa"
    model = LlavaForConditionalGeneration(config)
    louden(model)
    for (
        weight
    ) in model.model.language_model.layers.parameters():  # louder still, so that not the last word alone decides
        weight.data.mul_(2.5 if weight.ndim > 1 else 1.0)
    model.model.multi_modal_projector.linear_2.weight.data.mul_(3.0)
    if name.startswith("gemma"):  # scales word embeddings
        model.model.language_model.embed_tokens.weight.data.mul_(0.2)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image> "),
    )
    return LlavaAdapter(model.requires_grad_(False), processor)


@pytest.fixture(scope="module", params=SPECIAL)
def vlm(request) -> LlavaAdapter:
    return build(request.param)


def trunk_of(vlm: LlavaAdapter, photos, keep: int, method: str = "uniform") -> tuple[Trunk, list[list[int]]]:
    ids = tuple(f"photo {number}" for number in range(len(photos)))
    signals = vlm.signals(vlm.encode(vlm.pixels(photos)), ids)
    chosen = get_method(method)
    selection = chosen.select(signals, keep, chosen.configure(), 0)
    prompts = [[vlm.encode_prompt(text) for text in QUESTIONS] for _ in photos]
    return Trunk(vlm, selection, prompts, "pesp", ids), selection.indices.tolist()


def stock_answers(vlm: LlavaAdapter, photos) -> list[tuple[int, ...]]:
    texts = [
        vlm.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for text in QUESTIONS
    ]
    answers = []
    for photo in photos:
        inputs = vlm.processor(images=[photo] * len(texts), text=texts, return_tensors="pt", padding=True)
        out = vlm.model.generate(**inputs, max_new_tokens=MAX_NEW, do_sample=False)
        for new in out[:, inputs.input_ids.shape[1] :].tolist():
            answers.append(tuple(new[: new.index(2)] if 2 in new else new))
    return answers


def test_every_allowed_model_is_tested():
    assert set(SPECIAL) == set(TEXT_FAMILIES) - {"qwen2_5_vl_text", "qwen2_vl_text", "qwen3_vl_text"}, (
        "these have families"
    )


def test_unpruned_equals_stock_generate_in_a_left_padded_batch(vlm, photos):
    trunk, _ = trunk_of(vlm, photos[:2], 36, "unpruned")
    answers = [answer.tokens for answer in trunk.finish([MAX_NEW] * 6)]
    assert answers == stock_answers(vlm, photos[:2])
    assert len(set(answers)) > 2, "a constant model would prove nothing"


def test_pruned_equals_a_masked_stock_model(vlm, photos):
    """Scores at two cuts and the logits of every step, with windows counted in original positions."""
    trunk, kept = trunk_of(vlm, photos[:1], 24)
    cuts = [(1, 16, "attention_all_text"), (3, 7, "attention_last_token_next_layer")]
    scores, logits = [], []

    def overheard(name: str) -> Scorer:
        def score(evidence: CutEvidence) -> torch.Tensor:
            scores.append(get_scorer(name).score(evidence))
            return scores[-1]

        return Scorer(name, score, reads_attention=True)

    listener = vlm.model.lm_head.register_forward_hook(lambda _module, _inputs, out: logits.append(out))
    trunk.advance(1, frozenset({0}))
    answers = trunk.fork([Cut(layer, keep, overheard(name)) for layer, keep, name in cuts], [MAX_NEW] * 3)
    listener.remove()

    twin = eager_copy(vlm.model)
    for number, text in enumerate(QUESTIONS):
        reference = MaskedModel(twin, vlm.processor, photos[0], text, kept[0])
        for at, (layer, keep, name) in enumerate(cuts):
            expected = reference.scores(layer, name)
            assert scores[at][number].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
            reference.cut(layer, keep, expected)
        assert list(answers[number].kept) == reference.alive[-1]
        tokens, expected = reference.answer(MAX_NEW, vlm.end_tokens, answers[number].tokens)
        assert list(answers[number].tokens) == tokens
        assert torch.allclose(logits[0][number], expected[0], atol=1e-4, rtol=1e-5)


def test_sequences_that_pass_in_runs_are_answered_alike(vlm, photos):
    """Windows, soft-capping and layers without positions look at the runs before as at columns of their own."""
    cuts = [Cut(2, 9, get_scorer("attention_last_token"))]
    for asked in ([], cuts):
        found = []
        for pass_tokens in (10**6, 11):
            trunk, _ = trunk_of(vlm, photos[:2], 24)
            trunk.pass_tokens = pass_tokens
            found.append(trunk.answer(asked, [4] * len(trunk.prompts)))
        assert found[0] == found[1]


def test_projections_without_rotary_embedding_do_not_depend_on_positions(vlm):
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    here, there = torch.arange(5).expand(1, 2, 5), torch.arange(5).expand(1, 2, 5) + 9
    for number, positioned in enumerate(getattr(vlm.language.config, "no_rope_layers", [1] * LAYERS)):
        bare, moved = (project(vlm, number, hidden, at, rotated=False) for at in (here, there))
        assert torch.equal(bare.query, moved.query) and torch.equal(bare.key, moved.key)
        turned = project(vlm, number, hidden, there)
        if positioned and vlm.text.family != TEXT_FAMILIES["cohere2"]:
            assert not torch.allclose(turned.key, bare.key)
        assert torch.allclose(turned.key.norm(dim=-1), bare.key.norm(dim=-1), rtol=1e-4), "a rotation keeps lengths"
        assert torch.equal(turned.value, bare.value)


def test_a_cut_shows_what_its_layer_makes_of_every_token(vlm, photos):
    """Against the stock layer's own projections, overheard at the kernel's door; unrotated keys and queries besides."""
    seen = {}

    def look(evidence: CutEvidence) -> torch.Tensor:
        rotated, bare = (evidence.projections("visual", turned, False) for turned in (True, False))
        seen.update(states=evidence.states, positions=evidence.positions, rotated=rotated, bare=bare)
        seen["text"] = evidence.projections("text", True, False)
        seen["ahead"] = evidence.projections("visual", True, True)
        return get_scorer("random").score(evidence)

    trunk, kept = trunk_of(vlm, photos[:1], 24)
    trunk.advance(2, frozenset({1}))
    trunk.fork([Cut(2, 9, Scorer("look", look, reads_attention=True))], [2] * 3)
    start = len(trunk.before)
    assert seen["positions"].tolist() == [[[start + slot for slot in kept[0]]] * 3]
    held = trunk.stretch.keys.held[1]
    for number in range(3):
        assert torch.allclose(seen["rotated"].key[number], held[0][0, :, start : start + 24], atol=1e-5)
        assert torch.allclose(seen["rotated"].value[number], held[1][0, :, start : start + 24], atol=1e-5)
        assert torch.equal(seen["states"][number], trunk.stretch.hidden[0, start : start + 24])
    twin = project(vlm, 1, trunk.stretch.inputs[1], trunk.stretch.positions, rotated=False)
    assert torch.allclose(seen["bare"].key[0], twin.key[0, :, start : start + 24], atol=1e-5)
    ahead = project(vlm, 2, trunk.stretch.hidden, trunk.stretch.positions)
    assert torch.allclose(seen["ahead"].query[0], ahead.query[0, :, start : start + 24], atol=1e-5)
    assert seen["text"].query.shape[2] == max(len(prompt.after) for prompt in trunk.prompts)


def test_looking_at_projections_leaves_the_model_as_it_was(vlm):
    before = copy.copy(vlm.language.config._attn_implementation)
    state = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    project(vlm, 1, torch.randn(1, 3, 32), torch.arange(3)[None, None])
    assert vlm.language.config._attn_implementation == before
    assert vlm.language.layers[1].self_attn.config is vlm.language.config
    assert all(torch.equal(state[name], value) for name, value in vlm.model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("phi", {}, "language model (text_config.model_type) 'phi' is unknown; allowed: cohere, cohere2, gemma, "),
        ("stablelm", {}, "language model (text_config.model_type) 'stablelm' is unknown; allowed: cohere, cohere2, "),
        ("gemma3_text", {"use_bidirectional_attention": True}, "text_config.model_type = gemma3_text with use_bidi"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "text_config.model_type = llama with rope_type dynamic: its rotary tables depend on the longest sequence",
        ),
    ],
)
def test_other_models_are_refused_by_name_when_they_are_loaded(name, options, line):
    with pytest.raises(ValueError) as caught:
        build(name, **options)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("cuts", [[], [(2, 9)], [(3, 9)]])
def test_numbers_that_are_not_finite_are_refused_with_layer_and_dtype(photos, cuts):
    vlm = build("llama")
    vlm.language.layers[1].mlp.down_proj.weight.data.fill_(torch.inf)
    trunk, _ = trunk_of(vlm, photos[:1], 24)
    with pytest.raises(NotFinite) as caught:
        if cuts:
            trunk.advance(cuts[0][0], frozenset({cuts[0][0] - 1}))
            trunk.fork([Cut(*cut, get_scorer("random")) for cut in cuts], [MAX_NEW] * 3)
        else:
            trunk.finish([MAX_NEW] * 3)
    assert str(caught.value) == (
        "model.dtype float32: layer 1 of the language model gave numbers that are not finite; set it to bfloat16 or "
        "float32, or look at the model's weights"
    )


def test_a_kernel_that_cannot_do_what_the_model_needs_is_refused():
    model = build("gemma2")
    model.language.config._attn_implementation = "sdpa"
    with pytest.raises(UnsupportedModel) as caught:
        LlavaAdapter(model.model, model.processor)
    assert str(caught.value) == (
        "text_config.model_type = gemma2 with model.attention sdpa: that kernel cannot soft-cap attention; allowed: "
        "eager, flash_attention_2"
    )
    model = build("mistral")
    model.language.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel) as caught:
        LlavaAdapter(model.model, model.processor)
    assert str(caught.value) == (
        "text_config.model_type = mistral with model.attention flash_attention_2: its kernels count a sliding window in "
        "kept tokens, not in positions; allowed: sdpa, eager"
    )
