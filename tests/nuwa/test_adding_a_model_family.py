"""The guide's example is a model family: its features are the stock model's, its unpruned answers those of ``generate``."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import nuwa
from benchmarks.gpu.families import TEMPLATE, WORDS, louden, tokenizer
from nuwa.signals import SIGNAL_NAMES
from nuwa.vlm import ADAPTERS, Adapter, adapt
from pipelines.features.stand_in import StandInProcessor

GUIDE = (Path(__file__).parents[2] / "docs" / "adding_a_model_family.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, re.DOTALL))
QUESTION = "what is on the left?"


@pytest.fixture
def family(monkeypatch) -> type[Adapter]:
    """The guide's adapter, known by the guide's line."""
    name = "nuwa.vlm.vip_llava"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(FILES["nuwa/vlm/vip_llava.py"], name, "exec"), vars(module))
    monkeypatch.setattr(ADAPTERS, "_entries", dict(ADAPTERS))
    exec(FILES["nuwa/vlm/__init__.py"], {"ADAPTERS": ADAPTERS, "VipLlavaAdapter": module.VipLlavaAdapter})
    return module.VipLlavaAdapter


@pytest.fixture(scope="module")
def model() -> VipLlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=5 + len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layers=[-2, -3, 1],
        image_token_index=4,
        image_seq_length=16,
    )
    model = VipLlavaForConditionalGeneration(config).eval()
    louden(model)
    return model


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return LlavaProcessor(
        CLIPImageProcessorPil(**sizes), tokenizer("<image>"), patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=TEMPLATE.replace("IMAGE", "<image> "),
    )  # fmt: skip


@pytest.fixture(scope="module")
def image() -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    return Image.fromarray(torch.randint(0, 256, (40, 56, 3), generator=generator).byte().numpy())


def test_the_guide_touches_two_files():
    assert list(FILES) == ["nuwa/vlm/vip_llava.py", "nuwa/vlm/__init__.py"] and "two files" in GUIDE
    assert len(FILES["nuwa/vlm/__init__.py"].splitlines()) == 1 and "vipllava" not in ADAPTERS


def test_its_features_are_the_stock_models(family, model, processor, image):
    vlm = adapt(model, processor)
    assert type(vlm) is family
    (encoded,) = vlm.encode_images([image])
    assert encoded.layout == vlm.layout_for(model.config, processor.image_processor, image.size)
    widths = {name: 1 if signal.ndim == 1 else signal.shape[1] for name, signal in encoded.signals.items()}
    declared = vlm.signal_widths(model.config)
    assert widths == {name: declared[name] for name in SIGNAL_NAMES} and widths["features"] == 48

    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        stock = model.get_image_features(pixel_values=pixels, output_hidden_states=True,
                                         vision_feature_layer=model.config.vision_feature_layer)  # fmt: skip
    ours = vlm.project(encoded.signals["features"][None])
    torch.testing.assert_close(ours[0], stock.pooler_output[0], rtol=1e-5, atol=1e-5)


def test_unpruned_it_answers_as_stock_generate_and_pruned_by_any_method(family, model, processor, image):
    (answer,) = nuwa.generate(model, processor, [image], [QUESTION], method="unpruned", max_new_tokens=6)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[image], text=[prompt], return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(answer.tokens) == [token for token in made if token != 2]

    (pruned,) = nuwa.generate(model, processor, [image], [QUESTION], method="nuwa", average_tokens=6, max_new_tokens=2)
    assert pruned.schedule.average_tokens == pytest.approx(6, abs=0.5)
    with pytest.raises(ValueError, match="ViP-LLaVA's CLIP tower chooses sizes by itself"):
        nuwa.generate(model, processor, [image], [QUESTION], method="downsample", average_tokens=4)


def test_it_is_planned_without_files(family, model):
    stand_in = StandInProcessor(model.config)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "why?"}]}]
    assert stand_in.apply_chat_template(turn) == "<s>###Human: <image>\nwhy?###Assistant:"
    layout = family.layout_for(model.config, stand_in.image_processor, (640, 480))
    assert [view.grid.tokens for view in layout.views] == [16]
    assert family.seen_size(model.config, stand_in.image_processor, (640, 480)) == (640, 480)
