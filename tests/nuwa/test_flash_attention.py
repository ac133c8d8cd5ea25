"""Flash-attention without a GPU: transformers' own path up to the kernels, and slow kernels of the same contract.

The kernels' contract (flash-attn 2): sequences without padding, causal from the last key backwards, grouped heads. What
a layer hands them, how padding is taken out and put back, is transformers' code, which runs here as on a GPU.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

import nuwa
from nuwa.vlm import LlavaAdapter, adapt

torch.set_num_threads(1)
MAX_NEW = 6
QUESTIONS = ["what is on the left ?", "how many red", "where is the blue sign ?"]


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """``(queries, heads, dim)``, ``(keys, groups, dim)`` twice → ``(queries, heads, dim)``, query by query."""
    heads, groups = query.shape[1], key.shape[1]
    out = torch.empty_like(query)
    for number, head in itertools.product(range(len(query)), range(heads)):
        last = len(key) - len(query) + number + 1 if causal else len(key)
        mine = head * groups // heads
        weights = (key[:last, mine] @ query[number, head] * scale).softmax(dim=0)
        out[number, head] = weights @ value[:last, mine]
    return out


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return torch.stack([attend(*one, causal, softmax_scale) for one in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    ends = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
    return torch.cat(
        [attend(q[mine], k[seen], v[seen], causal, softmax_scale) for mine, seen in (_slices(*one) for one in ends)]
    )


def _slices(queries: tuple[int, int], keys: tuple[int, int]) -> tuple[slice, slice]:
    return slice(*queries), slice(*keys)


@pytest.fixture
def by_flash(family, monkeypatch):
    """The family's model with its language model on flash-attention's path, as ``from_pretrained`` leaves it on a GPU."""
    kernels = {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_attn_varlen_func),
    }
    for name, value in kernels.items():
        monkeypatch.setattr(flash, name, value, raising=False)
    model = copy.deepcopy(family.model)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    return adapt(model, family.processor)


@pytest.fixture
def pictures(family, scenes, photos):
    return [Image.fromarray(scene.image) for scene in scenes[:2]] if isinstance(family, LlavaAdapter) else photos[:2]


@pytest.mark.parametrize("method", ["unpruned", "nuwa", "sparsevlm"])
def test_answers_are_those_of_sdpa(family, by_flash, pictures, method):
    """Shared prefixes become a row a question; several cuts, recycled tokens and questions of unlike length among them."""
    assert by_flash.flash_attention and not family.flash_attention
    options = {"method": method, "max_new_tokens": MAX_NEW}
    options |= {} if method == "unpruned" else {"retention": 0.65}
    options |= {"stage2": {"layer": [2, 3, 4]}} if method == "sparsevlm" else {}
    asked = [QUESTIONS, QUESTIONS[1:]]
    expected = nuwa.generate(family.model, family.processor, pictures, asked, **options)
    found = nuwa.generate(by_flash.model, family.processor, pictures, asked, **options)
    for one, other in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (one.tokens, one.kept_last) == (other.tokens, other.kept_last)


def test_padding_reaches_the_kernels_as_padding(by_flash, pictures, monkeypatch):
    """The kernels get no padded key: what they are handed adds up to the tokens there are."""
    handed = []

    def counting(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest, **options):
        handed.append((len(q), cu_seqlens_q[-1].item(), len(k), cu_seqlens_k[-1].item()))
        return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *rest, **options)

    monkeypatch.setattr(flash, "_flash_varlen_fn", counting)
    image = pictures[0]
    nuwa.generate(by_flash.model, by_flash.processor, [image], [QUESTIONS], method="unpruned", max_new_tokens=1)
    layout = by_flash.encode_images([image])[0].layout
    prompts = [by_flash.encode_prompt(question) for question in QUESTIONS]
    tokens = sum(len(one.before) + layout.tokens + len(one.after) for one in prompts)
    assert len({len(one.after) for one in prompts}) > 1
    assert handed == [(tokens, tokens, tokens, tokens)] * by_flash.layers
