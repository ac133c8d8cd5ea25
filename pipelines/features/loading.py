"""How a worker and the driver load a model."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nuwa.vlm import Adapter, ImageRules, adapter_class, load_adapter
from nuwa.vlm.folder import check_folder
from nuwa.vlm.processors import load_processor
from pipelines.settings import ClusterSettings, ModelSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig

AS_PUBLISHED = ImageRules()


class Loading(NamedTuple):
    """How a model is loaded. ``spread``: over all GPUs the worker has, by Accelerate."""

    dtype: str = "float32"
    attention: str = "sdpa"
    conversation: str = "template"
    image_aspect_ratio: str = "processor"
    image_rules: ImageRules = AS_PUBLISHED
    spread: bool = False
    text_tower: str | None = None
    pass_tokens: int | None = None

    @classmethod
    def of(cls, model: ModelSettings, cluster: ClusterSettings) -> Loading:
        return cls(
            model.dtype,
            model.attention,
            model.conversation,
            model.image_aspect_ratio,
            model.images,
            spread=cluster.gpus > 1,
            text_tower=model.text_tower,
            pass_tokens=model.pass_tokens,
        )

    @property
    def framing(self) -> dict[str, Any]:
        """How words and images are handed to the model."""
        return {
            "conversation": self.conversation,
            "image_aspect_ratio": self.image_aspect_ratio,
            "image_rules": self.image_rules,
            "text_tower": self.text_tower,
        }

    def here(self, path: str) -> Adapter:
        """The model's shape and processor for the driver, which encodes and answers nothing: no weights are read.

        A folder is looked over first; raises :class:`nuwa.vlm.CheckpointError`.
        """
        from transformers import AutoConfig

        if Path(path).is_dir():
            check_folder(Path(path), adapter_class)
        config = AutoConfig.from_pretrained(path)
        return self._around(config, load_processor(path, self.image_rules.backend))

    def shape(self, path: str, vlm: Adapter) -> Adapter:
        """The shape of the model at ``path`` with the processor of ``vlm``."""
        from transformers import AutoConfig

        return self._around(AutoConfig.from_pretrained(path), vlm.processor)

    def _around(self, config: PretrainedConfig, processor: Any) -> Adapter:
        family = adapter_class(config.model_type)
        with torch.device("meta"):
            model = family.model_class(config).to(getattr(torch, self.dtype))
        return family(model, processor, **self.framing)


FULL_PRECISION = Loading()


@cache  # one model a process, however many workers it hosts in turn
def load_model(path: str, device: str, loading: Loading = FULL_PRECISION) -> Adapter:
    vlm = load_adapter(
        path,
        device,
        getattr(torch, loading.dtype),
        attention=loading.attention,
        device_map="auto" if loading.spread else None,
        **loading.framing,
    )
    vlm.pass_tokens = loading.pass_tokens
    return vlm
