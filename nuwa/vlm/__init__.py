"""Adapters over stock transformers models: what the encoder offers, and the parts a schedule-aware decoder needs."""

from nuwa.vlm.llava import LlavaAdapter

__all__ = ["LlavaAdapter"]
