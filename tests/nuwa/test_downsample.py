"""Downsampling: the stock tower on a smaller image, at the places of pooling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import nuwa
from nuwa.generation import ImageBatch, answer_encoded, image_id, plan
from nuwa.grid import PatchGrid
from nuwa.methods import specify
from nuwa.stage1 import get_method


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(64)]


def chosen(vlm, images, keep):
    encoded = vlm.encode(vlm.pixels(images))
    names = tuple(image_id(image) for image in images)
    signals = vlm.signals(encoded, names, lambda grid: vlm.encode_resized(images, grid))
    method = get_method("downsample")
    return method.select(signals, keep, method.configure(), 0), get_method("pooling").select(signals, keep, None, 0)


@pytest.mark.parametrize(("keep", "height", "width"), [(1, 1, 1), (16, 4, 4), (20, 4, 4), (48, 6, 7), (143, 11, 12)])
def test_features_are_the_stock_towers_on_the_smaller_image(tiny_vlm, images, keep, height, width):
    found, pooled = chosen(tiny_vlm, images[:3], keep)
    patch = tiny_vlm.model.config.vision_config.patch_size
    pixels = tiny_vlm.processor.image_processor(images[:3], return_tensors="pt")["pixel_values"]
    small = F.interpolate(pixels, (height * patch, width * patch), mode="bicubic", antialias=True)
    with torch.no_grad():
        out = tiny_vlm.tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
    expected = out.hidden_states[tiny_vlm.model.config.vision_feature_layer][:, 1:]
    assert torch.equal(found.features, expected)
    assert found.kept == height * width == get_method("downsample").kept(tiny_vlm.grid, keep)
    assert torch.equal(found.indices, pooled.indices)
    assert found.pillars.all()


def test_at_full_size_nothing_changes(tiny_vlm, images):
    found, _ = chosen(tiny_vlm, images[:2], tiny_vlm.grid.tokens)
    usual = tiny_vlm.encode(tiny_vlm.pixels(images[:2]))["features"]
    assert torch.equal(found.features, usual)
    assert found.indices[0].tolist() == list(range(tiny_vlm.grid.tokens))


@pytest.mark.parametrize("size", [1, 8])
def test_images_of_any_batch_are_the_same(tiny_vlm, images, size):
    together, _ = chosen(tiny_vlm, images, 16)
    for start in (0, 24, 64 - size):
        rows = slice(start, start + size)
        found, _ = chosen(tiny_vlm, images[rows], 16)
        assert torch.equal(found.indices, together.indices[rows])
        torch.testing.assert_close(found.features, together.features[rows], rtol=1e-5, atol=1e-5)


def test_the_library_call_has_the_images(tiny_vlm, images):
    asked = [["is there a red 3 in this image?", "what digit is blue?"]] * 2
    found = nuwa.generate(
        tiny_vlm.model, tiny_vlm.processor, images[:2], asked, method="downsample", average_tokens=16, max_new_tokens=4
    )
    assert all(one.schedule.average_tokens == 16 and len(one.kept.slots) == 16 for mine in found for one in mine)
    with pytest.raises(ValueError) as raised:
        answer_encoded(
            tiny_vlm,
            ImageBatch(encoded=tiny_vlm.encode_images(images[:1]), names=["x"], questions=[["what digit is blue?"]]),
            lambda layout: specify("downsample", budget=16),
            4,
        )
    assert str(raised.value) == ("downsample encodes smaller images; give the images, cached features do not hold them")


def test_a_model_that_chooses_its_own_sizes_refuses_it(family):
    layout = family.encode_images([Image.new("RGB", (70, 50))])[0].layout
    spec = specify("downsample", budget=layout.tokens)
    if family.resizes:
        assert plan(family, spec, layout).keeps == (layout.tokens,)
        return
    with pytest.raises(ValueError) as raised:
        plan(family, spec, layout)
    assert str(raised.value) == (
        f"method 'downsample' makes images smaller before the encoder, and {family.encoder} chooses sizes by itself; "
        "it can be asked of LLaVA-1.5"
    )
    with pytest.raises(NotImplementedError, match="at their own size only"):
        family.encode_resized([], PatchGrid(2, 2))
