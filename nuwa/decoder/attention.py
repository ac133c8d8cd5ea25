"""Queries, keys and values as a model's own layer makes them.

A layer is run up to its attention kernel, in whose place an attention interface of ours hands out what the kernel would
have got. Norms, projections, biases, rotary embedding, scaling and soft-capping are thereby the model's, whatever its
family does. Nothing of the model is changed: the layer that runs is a shallow copy which shares all weights.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nuwa.stage2.projections import Projections
from nuwa.vlm.adapter import Adapter

PROJECTIONS, GROUPED = "nuwa_projections", "nuwa_grouped_sdpa"  # attention interfaces of ours


class _AtKernel(BaseException):
    """Leaves a layer at its attention kernel with what the kernel was to get; no error, so nobody catches it as one."""

    def __init__(self, projections: Projections) -> None:
        self.projections = projections


def _leave(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    raise _AtKernel(Projections(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap))


def _grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention in which query heads that share a key head stand behind each other as queries.

    Stock attention repeats the cache for each of them where there is a mask. ``attention_mask`` ``(rows, 1, queries,
    columns)``, additive.
    """
    rows, heads, tokens, head_dim = query.shape
    groups = heads // key.shape[1]

    mask = attention_mask.expand(-1, groups, -1, -1).flatten(1, 2)[:, None]
    packed = query.reshape(rows, key.shape[1], groups * tokens, head_dim)
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous(), None


@functools.cache
def _register_interfaces() -> None:
    """Make them known to transformers, which is imported when a layer is first run: planning runs none."""
    from transformers import AttentionInterface

    AttentionInterface.register(PROJECTIONS, _leave)
    AttentionInterface.register(GROUPED, _grouped_sdpa)


def project(vlm: Adapter, number: int, hidden: Tensor, positions: Tensor, rotated: bool = True) -> Projections:
    """Queries, keys and values that layer ``number`` makes of ``hidden`` ``(rows, tokens, dim)`` entering it.

    ``positions`` ``(axes, rows, tokens)``. ``rotated``: with the rotary embedding, or as they are before it.
    """
    layer = _with_interface(vlm.language.layers[number], PROJECTIONS)
    hidden = hidden.to(execution_device(vlm.language.layers[number]))
    cos, sin = (table.to(hidden.device) for table in vlm.text.rotations(hidden, positions)[vlm.text.kinds[number]])
    if not rotated:
        cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
    try:
        type(layer).forward(layer, hidden, attention_mask=None, position_embeddings=(cos, sin))
    except _AtKernel as reached:
        return reached.projections
    raise RuntimeError(f"layer {number} of {type(layer).__name__} called no attention interface")


def grouped_layers(vlm: Adapter, numbers: range) -> list[nn.Module]:
    """Layers for decoding: where the stock ones would repeat the cache for every head that shares it, copies that do not.

    The copies share all weights. Layers that Accelerate moves between devices stay the stock ones.
    """
    layers = [vlm.language.layers[number] for number in numbers]
    config = vlm.language.config
    grouped = config.num_attention_heads > (config.num_key_value_heads or config.num_attention_heads)
    hooked = any(hasattr(module, "_hf_hook") for layer in layers for module in layer.modules())
    if config._attn_implementation != "sdpa" or not grouped or hooked:
        return layers
    return [_with_interface(layer, GROUPED) for layer in layers]


def _with_interface(layer: Any, interface: str) -> nn.Module:
    """A shallow copy of a decoder layer that shares its weights and calls another attention interface."""
    _register_interfaces()
    attention = _bare_copy(layer.self_attn)
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation = interface
    twin = _bare_copy(layer)
    twin._modules = {**layer._modules, "self_attn": attention}
    return twin


def _bare_copy(module: Any) -> Any:
    """The module without what Accelerate wraps around its ``forward``, which would call the original."""
    twin = copy.copy(module)
    for name in ("forward", "_hf_hook", "_old_forward"):
        twin.__dict__.pop(name, None)
    return twin


def execution_device(layer: nn.Module) -> torch.device:
    """Where a layer computes. Weights that Accelerate offloads are nowhere until then; its hooks say where to."""
    for module in layer.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(layer.parameters()).device
