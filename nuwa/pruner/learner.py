"""How the LPM learns: tokens are dropped for real, and the gradient reaches kept and dropped ones alike.

``p_j`` is the keep probability of visual token j and ``h_j`` in {0, 1} the decision. The straight-through mask
``m_j = h_j + p_j - stop(p_j)`` has the value of ``h_j`` and the gradient of ``p_j``. All other tokens have ``m = 1``.
Every layer of the language model attends with

    A_ij = m_j exp(s_ij) / Z_i,    Z_i = sum_k m_k exp(s_ik),    o_i = sum_j A_ij v_j

where ``s_ij`` is the layer's own scaled score and k runs over what i may see. Forward, a token with ``m_j = 0`` has no
influence on any other: it is dropped, and the rest keep their position ids. Backward,

    dL/dm_j = sum_i w_ij dL/do_i . (v_j - o_i),    w_ij = exp(s_ij) / (Z_i + (1 - h_j) exp(s_ij)).

For a kept token that is the derivative. A dropped token has one too, which an additive mask of -inf would deny it, but
its factor ``exp(s_ij) / Z_i`` knows no bound: a token that attention looks for and does not find has 10^8 and more.
``w_ij`` is instead the weight the token would get if it alone came back, at most 1, and the term under the sum is then
exactly what its return would do to ``o_i``. A dropped token still looks at the others in every layer, so that its
``s_ij`` and ``v_j`` are those it would have.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from nuwa.signals import top_indices
from nuwa.stage1.learnpruner import Lpm
from nuwa.testbed.instruction import IGNORE, block_mask

Sparsity = Literal["topk_ste", "ratio_penalty"]
ATTENTION = "attend_to_kept"


class _Return(torch.autograd.Function):
    """Zero, with the gradient to the mask that the module's docstring states."""

    @staticmethod
    def forward(
        ctx: Any,
        kept: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        seen: Tensor,
        visible: Tensor,
        constants: tuple[slice, float],
    ) -> Tensor:
        """``constants``: which columns are visual, and the scale of the scores."""
        ctx.save_for_backward(kept, query, key, value, out, seen, visible)
        ctx.visual, ctx.scaling = constants
        return torch.zeros_like(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, query, key, value, out, seen, visible = ctx.saved_tensors
        scores = (query @ key.transpose(2, 3)).float() * ctx.scaling
        excess = scores[..., ctx.visual] - scores.masked_fill(~seen, -torch.inf).logsumexp(dim=-1, keepdim=True)
        weight = torch.where(kept[:, None, None, :] > 0.5, excess.exp(), excess.sigmoid())
        pull = gradient @ value[:, :, ctx.visual].transpose(2, 3) - (gradient * out).sum(dim=-1, keepdim=True)
        to_kept = (weight * pull).masked_fill(~visible[..., ctx.visual], 0.0).sum(dim=(1, 2))
        return to_kept.to(kept.dtype), *[None] * 7


def attend_to_kept(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    kept: Tensor,
    first: int,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """The module docstring's attention, in the form of transformers' attention functions.

    ``query`` ``(batch, heads, length, head_dim)``, ``key`` and ``value`` with as many heads or fewer;
    ``attention_mask`` ``(batch, 1, length, length)`` bool, what each query may see; ``kept`` ``(batch, tokens)``: m of
    the visual tokens, which stand from column ``first`` on. Returns ``(batch, length, heads, head_dim)``.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    seen = attention_mask.clone()
    seen[..., first : first + kept.shape[1]] &= (kept.detach() > 0.5)[:, None, None, :]

    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    parts = (part.detach() for part in (query, key, value, out))
    constants = (slice(first, first + kept.shape[1]), scaling)
    out = out + _Return.apply(kept, *parts, seen, attention_mask, constants)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend_to_kept)


def best_tokens(scores: Tensor, keep: int) -> Tensor:
    """1 at the ``keep`` highest of ``(batch, tokens)`` scores, else 0; ties go to the lower index."""
    return torch.zeros_like(scores).scatter(1, top_indices(scores, keep), 1.0)


def relative_to_threshold(logits: Tensor, keep: int) -> Tensor:
    """``(batch, tokens)`` logits of an image at mean 0 and deviation 1, then shifted: just the ``keep`` highest are positive.

    With a fixed number of tokens only the order of an image's logits matters. So no gradient may move them all together
    or spread them all: that would change nothing but how flat the sigmoid is, until no token learns any more.
    """
    standard = F.layer_norm(logits, logits.shape[-1:])
    return standard - standard.detach().topk(keep + 1, dim=1).values[:, -2:].mean(dim=1, keepdim=True)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of ``hard`` with the gradient of ``soft``."""
    return hard + (soft - soft.detach())


class PrunerLearner(nn.Module):
    """The LPM in training. The frozen model is no submodule: checkpoints and optimiser hold the LPM alone.

    ``sparsity`` keeps keep-everything from winning. ``topk_ste``: the ``keep_share`` of tokens with the highest keep
    probability stays, in every image; its logits are standardised and shifted first, which moves no rank,
    so that just these have ``p > 1/2`` and ``argmax`` would decide the same. ``ratio_penalty``: ``argmax`` decides, and
    ``penalty_weight * (mean keep - keep_share)²`` joins the loss (mean over the tokens of the batch).

    ``recompute``: what a layer of the language model holds for its gradient is computed again when it is needed. The
    gradient is the same, and memory for one layer does instead of for all.
    """

    def __init__(
        self,
        lpm: Lpm,
        vlm: Any,
        sparsity: Sparsity,
        keep_share: float,
        penalty_weight: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.lpm, self.vlm, self.recompute = lpm, vlm, recompute
        self.sparsity, self.keep_share, self.penalty_weight = sparsity, keep_share, penalty_weight
        self._found = vlm.language.config._attn_implementation, [one.requires_grad for one in vlm.model.parameters()]
        vlm.model.requires_grad_(False)
        vlm.language.set_attn_implementation(ATTENTION)

    def release(self) -> None:
        """Leave the model as it was found; nothing can be learned from then on."""
        attention, learning = self._found
        self.vlm.language.set_attn_implementation(attention)
        for parameter, flag in zip(self.vlm.model.parameters(), learning, strict=True):
            parameter.requires_grad_(flag)

    @property
    def keep(self) -> int:
        """Tokens of an image that ``keep_share`` stands for."""
        tokens = self.vlm.grid.tokens
        return min(max(1, round(self.keep_share * tokens)), tokens - 1)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """Encoder features of the images, ``(batch, tokens, dim)``."""
        return self.vlm.encode(batch["pixels"])["features"].clone()  # inference tensors cannot meet a gradient

    def keep_logit(self, features: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` → log-odds of keeping ``(batch, tokens)``, in float32 whatever the model's dtype."""
        return self.lpm.keep_logit(features.float())

    def best(self, scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """1 at each image's best tokens by ``scores`` ``(batch, tokens)``, as many as ``keep_share`` stands for, else 0."""
        return best_tokens(scores, self.keep)

    def kept_share(self, mask: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """The mean of ``mask`` over all tokens."""
        return mask.mean()

    def mask(self, features: Tensor, batch: dict[str, Tensor] | None = None) -> Tensor:
        """The straight-through mask m of visual tokens, ``(batch, tokens)``."""
        logit = self.keep_logit(features)
        if self.sparsity == "topk_ste":
            hard = best_tokens(logit.detach(), self.keep)
            logit = relative_to_threshold(logit, self.keep)
        else:
            hard = (logit > 0).to(logit.dtype)
        return straight_through(hard, logit.sigmoid())

    def answer_loss(self, batch: dict[str, Tensor], features: Tensor, mask: Tensor) -> Tensor:
        """The language model's mean cross-entropy over answer tokens, where it sees visual tokens as ``mask`` says."""
        logits = self.answer_logits(batch, features, mask)
        return F.cross_entropy(logits.float(), batch["labels"][batch["labels"] != IGNORE])

    def answer_logits(self, batch: dict[str, Tensor], features: Tensor, mask: Tensor) -> Tensor:
        """Logits at labelled places, ``(labelled, vocabulary)``, in raster order of the batch."""
        vlm, language = self.vlm, self.vlm.language
        embeds = language.embed_tokens(batch["input_ids"])
        is_image = batch["input_ids"] == vlm.image_token
        embeds = embeds.masked_scatter(is_image[..., None], vlm.project(features).to(embeds.dtype))
        first = int(is_image[0].nonzero()[0])
        rotary = language.rotary_emb(embeds, position_ids=batch["position_ids"])
        visible = block_mask(batch["blocks"])
        hidden = embeds
        given = {"attention_mask": visible, "position_embeddings": rotary, "kept": mask, "first": first}
        for layer in language.layers:
            if self.recompute:
                hidden = checkpoint(layer, hidden, use_reentrant=False, **given)
            else:
                hidden = layer(hidden, **given)
        return vlm.model.lm_head(language.norm(hidden[batch["labels"] != IGNORE]))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses, and as a reading the share of visual tokens kept."""
        features = self.features(batch)
        mask = self.mask(features, batch)
        share = self.kept_share(mask, batch)
        scalars = {"answers": self.answer_loss(batch, features, mask), "keep_rate": share.detach()}
        if self.sparsity == "ratio_penalty":
            scalars["sparsity"] = self.penalty_weight * (share - self.keep_share) ** 2
        return scalars
