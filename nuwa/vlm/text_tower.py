"""CLIP's text half beside a model whose encoder is CLIP's other half: how much a patch has to do with a question.

The vision half must be the model's own, weight by weight; then the patches' features, which are at hand, and the
question's words meet in CLIP's common space. Nothing is encoded or cached for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nuwa.errors import UserError, in_one_line
from nuwa.signals import cosine_similarity, directions
from nuwa.vlm.checkpoint import CheckpointError, read_checkpoint

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizerFast

REQUEST = "\nAnswer the question using a single word or phrase."  # which a benchmark adds and nobody asks about


class TextTowerError(UserError, ValueError):
    """A folder that holds no CLIP model, or one whose vision half is not the model's encoder."""


class TextTower:
    """The CLIP model in ``folder``; its weights are read when the first question is.

    Raises :class:`TextTowerError` where there is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            kind = json.loads((self.folder / "config.json").read_text()).get("model_type")
        except (OSError, ValueError, AttributeError):
            kind = None
        if kind != "clip":
            fault = "no readable config.json there" if kind is None else f"model_type {kind!r} there"
            raise TextTowerError(
                f"text_tower {str(folder)!r}: {fault}; name a folder that holds a whole CLIP model "
                "(for LLaVA: openai/clip-vit-large-patch14-336)"
            )

    @functools.cached_property
    def identity(self) -> str:
        """Digest of weights, configuration and tokenizer."""
        parts = read_checkpoint(self.folder)
        return hashlib.sha256(json.dumps([parts.encoder, parts.language], sort_keys=True).encode()).hexdigest()

    def check(self, vision: Mapping[str, Tensor]) -> None:
        """Refuse it where its vision half is not the encoder with the weights ``vision``, as they round to its dtype."""
        own = self._clip.vision_model.state_dict()
        for name, theirs in vision.items():
            ours = own.get(name)
            same = ours is not None and ours.shape == theirs.shape
            if not same or not torch.equal(ours.to(theirs.dtype), theirs.cpu()):
                raise TextTowerError(
                    f"text_tower {str(self.folder)!r}: its vision half is not the model's encoder (tensor {name} "
                    "differs); name the CLIP model that the encoder was taken from, or set relevance: none"
                )

    def loaded(self, vision: Mapping[str, Tensor], device: torch.device) -> TextTower:
        """Itself, on ``device``, checked once against the encoder's weights ``vision``."""
        if not self._checked:
            self.check(vision)
            del self._clip.vision_model.encoder, self._clip.vision_model.embeddings  # the model has them
            self._clip.to(device)
            self._checked = True
        return self

    _checked = False

    @functools.cached_property
    def _clip(self) -> CLIPModel:
        from transformers import CLIPModel

        try:
            return CLIPModel.from_pretrained(self.folder, dtype=torch.float32).eval().requires_grad_(False)
        except (OSError, ValueError, RuntimeError) as error:
            reason = in_one_line(error)
            raise CheckpointError(
                f"text_tower {str(self.folder)!r} cannot be loaded ({reason}); fetch it again"
            ) from None

    @functools.cached_property
    def _tokenizer(self) -> CLIPTokenizerFast:
        from transformers import CLIPTokenizerFast

        return CLIPTokenizerFast.from_pretrained(self.folder)

    def patches(self, features: Tensor) -> Tensor:
        """Encoder features ``(batch, tokens, dim)`` in the common space, at length 1, float64."""
        norm, project = self._clip.vision_model.post_layernorm, self._clip.visual_projection.weight
        values = features.to(project.device, torch.float64)
        weight, bias = norm.weight.double(), norm.bias.double()
        normed = torch.nn.functional.layer_norm(values, norm.normalized_shape, weight, bias, norm.eps)
        return directions(normed @ project.double().T)

    def segments(self, question: str) -> Tensor:
        """Token ids of a question, ``(segments, longest)``: cut where the text tower ends, the last filled with zeros.

        Only the first has the token of the beginning, only the last that of the end.
        """
        config: CLIPConfig = self._clip.config
        longest = config.text_config.max_position_embeddings
        ids = self._tokenizer(question.removesuffix(REQUEST), verbose=False).input_ids
        rows = [ids[start : start + longest] for start in range(0, len(ids), longest)]
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])

    @torch.inference_mode()
    def words(self, question: str) -> Tensor:
        """A question in the common space, a row a segment, at length 1: ``(segments, dim)`` float64.

        A segment is read at its highest token id: the end token, where it has one.
        """
        ids = self.segments(question)
        lengths = torch.full((len(ids),), ids.shape[1])
        lengths[-1] = int(ids[-1].count_nonzero())
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        device = self._clip.text_projection.weight.device
        states = self._clip.text_model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        pooled = states[torch.arange(len(ids)), ids.argmax(dim=1)]
        return directions(self._clip.text_projection(pooled))

    def relevance(self, patches: Tensor, questions: Sequence[str]) -> Tensor:
        """Cosine of every patch with a question, mean over its segments: ``(questions, tokens)`` float32.

        ``patches``: of each question's image, ``(questions, tokens, dim)``. A question's numbers depend on no other.
        """
        rows = [
            cosine_similarity(own[None], self.words(question)[None])[0].double().mean(dim=1)
            for own, question in zip(patches, questions, strict=True)
        ]
        return torch.stack(rows).float()
