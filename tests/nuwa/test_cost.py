"""Costs of schedules: the paper's figures, loops over layers by hand, sizes read off configurations, every convention."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

from nuwa.cost import (
    APPENDIX_C,
    AS_COMPUTED,
    Accounting,
    LlmShape,
    VisionShape,
    attention_score_flops,
    cost_columns,
    kv_cache_bytes,
    norm_flops,
    pairwise_cosine_flops,
    prefill,
)
from nuwa.grid import PatchGrid
from nuwa.methods import specify
from nuwa.schedule import TokenSchedule

LLAVA = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    ),
    text_config=LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    ),
)  # fmt: skip
LLM = LlmShape.from_config(LLAVA)
EVERYTHING = TokenSchedule(576, 32, 576)
NUWA_64 = specify("nuwa", budget=64).schedule(PatchGrid(24, 24), 32)


def by_hand(lengths: list[int], hidden: int, intermediate: int, matrices: int, unit: int) -> int:
    """Appendix C layer by layer: multiply-accumulates of q, k, v, o; scores and their sums; FFN; times the unit."""
    total = 0
    for length in lengths:
        for _projection in range(4):
            total += length * hidden * hidden
        total += length * length * hidden  # scores
        total += length * length * hidden  # weighted sums
        for _matrix in range(matrices):
            total += length * hidden * intermediate
    return total * unit


def test_table_4_is_appendix_c_of_the_visual_tokens_entering_each_layer():
    # 5.972152 T: the paper prints 5.973. 0.647601 T: it prints 0.6476.
    unpruned, pruned = prefill(EVERYTHING, LLM, APPENDIX_C), prefill(NUWA_64, LLM, APPENDIX_C)
    assert unpruned == by_hand([576] * 32, 4096, 11008, 2, 2) == 5_972_152_025_088
    assert pruned == by_hand([112] * 16 + [16] * 16, 4096, 11008, 2, 2) == 647_600_537_600
    assert unpruned / 1e12 == pytest.approx(5.973, rel=2e-4)
    assert round(pruned / 1e12, 4) == 0.6476
    assert APPENDIX_C.label(LLM) == "FLOP, 2-matrix FFN, visual tokens entering each layer, language model only"


def test_no_other_convention_comes_near_table_4():
    near = []
    for unit in ("FLOP", "MAC"):
        for matrices in (2, 3):
            for counted in ("entering", "leaving"):
                for text in (0, 1, 35, 64):  # 35 system tokens stand before LLaVA's image
                    for vision in (None, VisionShape.from_config(LLAVA)):
                        rule = Accounting(unit, matrices, counted, text, vision)
                        figures = [prefill(schedule, LLM, rule) / 1e12 for schedule in (EVERYTHING, NUWA_64)]
                        if figures == pytest.approx([5.973, 0.6476], rel=0.005):
                            near.append(rule)
    assert near == [APPENDIX_C]


@pytest.mark.parametrize("unit", ["FLOP", "MAC"])
@pytest.mark.parametrize("matrices", [None, 2, 3])
@pytest.mark.parametrize("counted", ["entering", "leaving"])
@pytest.mark.parametrize("text", [0, 60])
def test_every_convention_is_the_sum_over_layers(unit, matrices, counted, text):
    schedule = TokenSchedule(576, 32, 300, ((2, 200), (6, 90), (15, 17)))
    entering = [300] * 2 + [200] * 4 + [90] * 9 + [17] * 17
    lengths = [count + text for count in (entering if counted == "entering" else [*entering[1:], 17])]
    rule = Accounting(unit, matrices, counted, text)
    found = prefill(schedule, LLM, rule)
    assert found == by_hand(lengths, 4096, 11008, matrices or 3, {"MAC": 1, "FLOP": 2}[unit])
    for word in (unit, f"{matrices or 3}-matrix", counted, *([f"{text} of text"] if text else [])):
        assert word in rule.label(LLM)


def test_the_vision_encoder_is_added_once():
    tower = VisionShape.from_config(LLAVA)
    assert (tower.patches, tower.positions, tower.patch_values) == (576, 577, 3 * 14 * 14)
    layers = by_hand([577] * 24, 1024, 4096, 2, 1)
    expected = layers + 576 * 588 * 1024 + 576 * 1024 * 4096 + 576 * 4096 * 4096
    assert tower.macs() == expected
    both = Accounting(vision=tower)
    assert prefill(NUWA_64, LLM, both) - prefill(NUWA_64, LLM, AS_COMPUTED) == 2 * expected
    assert both.label(LLM).endswith("language model and vision encoder")


def test_grouped_queries_are_counted_as_they_are():
    shape = LlmShape.from_config(Qwen2_5_VLConfig(text_config={
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }))  # fmt: skip
    assert (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim) == (28, 3584, 28, 4, 128)
    schedule = TokenSchedule(400, 28, 100, ((14, 50),))
    macs = 0
    for length in [100] * 14 + [50] * 14:
        macs += length * 3584 * 3584 * 2 + length * 3584 * 512 * 2  # q and o, k and v
        macs += 2 * length * length * 3584 + 3 * length * 3584 * 18944
    assert prefill(schedule, shape, Accounting("MAC")) == macs
    assert kv_cache_bytes(schedule, shape, 2) == (14 * 100 + 14 * 50) * 2 * 4 * 128 * 2


def test_the_cache_of_llava_is_half_a_mebibyte_a_token():
    assert kv_cache_bytes(EVERYTHING, LLM, 2) == 576 * 2**19
    assert kv_cache_bytes(NUWA_64, LLM, 2) == 64 * 2**19, "the average tokens are what the cache holds"
    assert kv_cache_bytes(NUWA_64, LLM, 4, text_tokens=36) == 100 * 2**20


def test_towers_of_another_kind_are_refused():
    with pytest.raises(ValueError) as caught:
        VisionShape.from_config(Qwen2_5_VLConfig())
    assert str(caught.value).startswith("vision_config of qwen2_5_vl has no ")
    assert str(caught.value).endswith(": not a CLIP-like tower")


def test_the_overhead_of_metrics_is_appendix_cs():
    assert attention_score_flops(1, 112, 4096) == 2 * 1 * 112 * 4096
    assert pairwise_cosine_flops(576, 1024) == 576**2 * 1024
    assert norm_flops(576, 1024) == 2 * 576 * 1024


def test_columns_of_a_trial(tiny_vlm):
    shape = LlmShape.from_config(tiny_vlm.model.config)
    layer = tiny_vlm.language.layers[0]
    assert shape.kv_heads * shape.head_dim == layer.self_attn.k_proj.out_features
    assert shape.heads * shape.head_dim == layer.self_attn.q_proj.out_features
    assert (shape.hidden, shape.intermediate) == (layer.mlp.up_proj.in_features, layer.mlp.up_proj.out_features)
    schedule = TokenSchedule(144, 8, 10)
    columns = cost_columns(schedule, shape, 4)
    # Every weight of a layer but its norms meets every token once; attention meets every pair of tokens twice.
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim > 1)
    attention = 2 * 10 * 10 * layer.self_attn.q_proj.out_features
    assert columns["flops"] == 2 * 8 * (10 * weights + attention)
    assert columns["kv_bytes"] == 8 * 10 * 2 * layer.self_attn.k_proj.out_features * 4
    assert columns["flops_convention"] == AS_COMPUTED.label(shape)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_keeping_more_never_costs_less(data):
    first = data.draw(st.integers(1, 576))
    second = data.draw(st.integers(1, first))
    layer = data.draw(st.integers(1, 31))
    less, more = TokenSchedule(576, 32, first, ((layer, second),)), TokenSchedule(576, 32, first)
    for rule in (APPENDIX_C, AS_COMPUTED, Accounting("MAC", counted="leaving")):
        assert prefill(less, LLM, rule) <= prefill(more, LLM, rule) <= prefill(EVERYTHING, LLM, rule)
    assert less.average_leaving <= less.average_tokens
    assert math.isclose(less.average_tokens - less.average_leaving, (first - second) / 32, abs_tol=1e-9)
