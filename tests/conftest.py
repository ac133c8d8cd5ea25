from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_families import family, photos, tiny_next, tiny_qwen  # noqa: F401  (fixtures for all tests)

from nuwa.testbed.architecture import build_model, model_config
from nuwa.testbed.language import build_processor
from nuwa.vlm import LlavaAdapter

torch.set_num_threads(1)
collect_ignore = ["accelerator"]  # changes torch: tests/nuwa/test_device_placement.py gives it a process of its own


@pytest.fixture(scope="session")
def tiny_vlm() -> LlavaAdapter:
    """The testbed's architecture with random weights, loud enough that answers depend on what is seen."""
    torch.manual_seed(3)
    processor = build_processor()
    tokenizer = processor.tokenizer
    config = model_config(
        len(tokenizer), processor.image_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    config.text_config.num_key_value_heads = 2
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.12 if "embed" not in name else 0.5)
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.15)
    return LlavaAdapter(model.requires_grad_(False), processor)


@pytest.fixture(scope="session")
def scenes():
    from nuwa.testbed.scenes import draw_scene

    rng = np.random.default_rng(5)
    return [draw_scene(rng, "test") for _ in range(8)]
