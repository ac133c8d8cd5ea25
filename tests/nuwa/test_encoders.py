"""What the encoders of LLaVA-NeXT and Qwen2.5-VL say of an image, against slow loops over the stock models' own tensors."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from oracles.masked_model import eager_copy
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from nuwa.generation import ImageBatch, plan, select
from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout, layout_from_json, layout_to_json, place
from nuwa.methods import check_encoder, specify
from nuwa.schedule import UnreachableBudget
from nuwa.schedule import shares as shares_of
from nuwa.selection import Selection
from nuwa.vlm import CheckpointError, EncodedImage, adapter_class, usual_image_processor, view_signals
from nuwa.vlm.adapter import UnavailableSignal
from nuwa.vlm.shapes import SHAPES

NAMES = ("features", "cls_attention", "keys", "similarity")
FURTHER = ("early_attention", "received_middle", "received_late")


def views(image: EncodedImage) -> list[dict[str, torch.Tensor]]:
    """The signals of each view of one image."""
    found = view_signals(image.layout, {name: value[None] for name, value in image.signals.items()}, ("image",))
    return [{name: getattr(signals, name)[0] for name in NAMES} for signals in found]


# --- LLaVA-NeXT


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[range, range]:
    """Rows and columns of the stitched grid that show the image and no padding, on a ``rows x columns`` patch grid."""
    width, height = size
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        skip = (rows - shown) // 2
        return range(skip, rows - skip), range(columns)
    shown = int(round(width * (rows / height), 7))
    skip = (columns - shown) // 2
    return range(rows), range(skip, columns - skip)


@pytest.mark.parametrize("number", range(8))
def test_the_local_grid_is_stitched_from_the_crops(tiny_next, photos, number):
    image = photos[number]
    inputs = tiny_next.processor.image_processor([image], return_tensors="pt")
    tower = eager_copy(tiny_next.model).model.vision_tower
    keys = []
    listener = tower.encoder.layers[-2].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out))
    with torch.inference_mode():
        out = tower(inputs["pixel_values"][0], output_hidden_states=True, output_attentions=True)
    listener.remove()
    late = out.hidden_states[4:]  # 16 ... 24 of CLIP-L's 24 layers, 4 ... 6 of six
    stock = {
        "features": out.hidden_states[-2][:, 1:],
        "cls_attention": out.attentions[-2].mean(dim=1)[:, 0, 1:],
        "keys": keys[0][:, 1:],
        "similarity": (sum(late) / len(late))[:, 1:],
    }
    (found,) = tiny_next.encode_images([image])
    base, local = found.layout.views
    assert (base.grid, base.crops, base.newline) == (PatchGrid(6, 6), 1, False)
    crop_rows, crop_columns = tiny_next.crops_of((image.height, image.width))
    rows, columns = unpadded(image.size, 6 * crop_rows, 6 * crop_columns)
    assert (local.grid, local.crops) == (PatchGrid(len(rows), len(columns)), crop_rows * crop_columns)
    for name in NAMES:
        assert torch.allclose(views(found)[0][name], stock[name][0], atol=1e-5)
        at = 0
        for row in rows:
            for column in columns:
                crop = 1 + (row // 6) * crop_columns + column // 6
                patch = (row % 6) * 6 + column % 6
                assert torch.allclose(views(found)[1][name][at], stock[name][crop, patch], atol=1e-5), name
                at += 1
        assert at == local.grid.tokens


def test_the_slots_are_the_stock_models_sequence(tiny_next, photos):
    """Every token kept: what enters the language model is what the stock model would have put there."""
    for image, found in zip(photos, tiny_next.encode_images(photos), strict=True):
        inputs = tiny_next.processor.image_processor([image], return_tensors="pt")
        stock = tiny_next.model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        everything = []
        for view, signals in zip(found.layout.views, views(found), strict=True):
            indices = torch.arange(view.grid.tokens)[None]
            everything.append(Selection(indices, signals["features"][None], torch.ones_like(indices).bool()))
        placed = place(found.layout, everything)
        assert placed.indices[0].tolist() == list(range(len(stock)))
        assert torch.allclose(tiny_next.embed_visual(placed, found.layout)[0], stock, atol=1e-5)
        newline = (stock == tiny_next.model.model.image_newline).all(dim=-1)
        assert torch.equal(found.layout.fixed, newline)
        assert int(newline.sum()) == found.layout.views[1].grid.height


def next_layout() -> VisualLayout:
    return VisualLayout((View(PatchGrid(4, 4)), View(PatchGrid(5, 8), crops=4, newline=True)))


@pytest.mark.parametrize(
    ("keep", "shares"),
    [
        (7, [1, 1]),  # 5 newlines, one token a view
        (25, [4, 16]),  # 20 tokens over five crops
        (29, [4, 20]),  # 24: 4 a crop, the rest goes to the local grid
        (51, [9, 37]),
        (58, [13, 40]),  # the local grid is full
        (61, [16, 40]),  # everything
    ],
)
def test_a_budget_is_dealt_out_by_crops(keep, shares):
    assert next_layout().tokens == 61
    assert shares_of(next_layout(), keep) == shares


@pytest.mark.parametrize("keep", [6, 62])
def test_a_budget_out_of_reach_is_named_with_the_range(keep):
    with pytest.raises(UnreachableBudget) as caught:
        shares_of(next_layout(), keep)
    assert str(caught.value) == (
        f"{keep} tokens before the first cut are out of reach on this image: allowed 7..61, 5 of them newline tokens"
    )


def test_newlines_are_put_back_at_every_row_end_by_hand():
    # A base of 1x2 and a local grid of 2x2: slots 0 1 | 2 3 newline, 5 6 newline.
    layout = VisualLayout((View(PatchGrid(1, 2)), View(PatchGrid(2, 2), crops=1, newline=True)))
    assert layout.fixed.nonzero()[:, 0].tolist() == [4, 7]
    base = Selection(torch.tensor([[1]]), torch.tensor([[[10.0]]]), torch.tensor([[True]]))
    local = Selection(torch.tensor([[0, 3]]), torch.tensor([[[20.0], [30.0]]]), torch.tensor([[False, True]]))
    placed = place(layout, [base, local])
    assert placed.indices.tolist() == [[1, 2, 4, 6, 7]]
    assert placed.features[0, :, 0].tolist() == [10, 20, 0, 30, 0]
    assert placed.pillars.tolist() == [[True, False, True, True, True]]


def test_a_newline_may_end_the_grid_as_a_whole():
    layout = VisualLayout((View(PatchGrid(2, 2), closing=True), View(PatchGrid(1, 2), newline=True)))
    assert layout.fixed.nonzero()[:, 0].tolist() == [4, 7]
    assert layout.views[0].places == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert [slots.tolist() for slots in layout.slots] == [[0, 1, 2, 3], [5, 6]]
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


# --- Qwen2.5-VL


def qwen_oracle(model, processor, image) -> dict[str, np.ndarray]:
    """Signals from the stock tower's tensors: windows undone by the stock index, attention summed token by token."""
    inputs = processor.image_processor([image], return_tensors="pt")
    visual, thw = model.model.visual, inputs["image_grid_thw"]
    last = visual.blocks[-1].attn
    heard = {}
    listeners = [
        last.qkv.register_forward_hook(lambda _m, _i, out: heard.update(qkv=out)),
        last.register_forward_pre_hook(
            lambda _m, _a, named: heard.update(rotary=named["position_embeddings"], ends=named["cu_seqlens"]),
            with_kwargs=True,
        ),
    ]
    with torch.inference_mode():
        out = visual(inputs["pixel_values"], grid_thw=thw, output_hidden_states=True)
        for listener in listeners:
            listener.remove()
        raster = torch.arange(len(out.pooler_output))
        if hasattr(visual, "window_size"):
            index, _ = get_vision_window_index(thw, 2, visual.window_size, visual.patch_size)
            raster = index.argsort()
        # Blocks 7 ... 23 of 32 are 1 ... 4 of five, and 1 ... 3 of four; state n + 1 is what block n put out.
        read = range(1, len(visual.blocks))
        mean = sum(out.hidden_states[block + 1] for block in read) / len(read)
        similarity = visual.merger(mean)[raster]
        query, key, _ = heard["qkv"].view(len(mean), 3, last.num_heads, -1).unbind(1)
        keys = key.flatten(1).view(-1, 4, last.dim).mean(dim=1)[raster]
        query, key = apply_rotary_pos_emb_vision(query, key, *heard["rotary"])
    received = np.zeros(len(mean))
    ends = heard["ends"].tolist()
    for begin, end in itertools.pairwise(ends):
        for head in range(last.num_heads):
            for asking in range(begin, end):
                logits = (key[begin:end, head] @ query[asking, head]).double().numpy() * last.scaling
                weights = np.exp(logits - logits.max())
                received[begin:end] += weights / weights.sum() / last.num_heads / (end - begin)
    merged = received.reshape(-1, 4).mean(axis=1)[raster.numpy()]
    return {
        "features": torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], dim=-1).numpy(),
        "cls_attention": merged,
        "keys": keys.numpy(),
        "similarity": similarity.numpy(),
    }


@pytest.mark.parametrize("full_blocks", [[2, 4], [1, 2]])
def test_signals_are_in_raster_order_and_salience_is_attention_received(tiny_qwen, photos, monkeypatch, full_blocks):
    """Whether the last block looks at the whole image, as in the published models, or at windows."""
    monkeypatch.setattr(tiny_qwen.visual, "fullatt_block_indexes", full_blocks)
    for image, found in zip(photos, tiny_qwen.encode_images(photos), strict=True):
        expected = qwen_oracle(tiny_qwen.model, tiny_qwen.processor, image)
        for name in NAMES:
            assert np.allclose(found.signals[name].numpy(), expected[name], atol=2e-5), name
        if full_blocks[-1] == 4:
            total = found.signals["cls_attention"].sum().item()
            assert total == pytest.approx(1 / 4, rel=1e-5), "every query spends its attention once"


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_qwen3"])
def test_signals_of_its_relatives_are_the_stock_towers(request, photos, name):
    vlm = request.getfixturevalue(name)
    for image, found in zip(photos[:4], vlm.encode_images(photos[:4]), strict=True):
        expected = qwen_oracle(vlm.model, vlm.processor, image)
        assert {name: signal.shape[1:] for name, signal in found.signals.items()} == {
            name: signal.shape[1:] for name, signal in expected.items()
        }
        for name in NAMES:
            assert np.allclose(found.signals[name].numpy(), expected[name], atol=2e-5), name


@pytest.mark.parametrize("method", ["divprune", "nuwa", "vscan", "holov", "pooling"])
def test_what_enters_later_layers_compares_with_nothing_and_follows_its_token(tiny_qwen3, photos, method):
    """Other deep vectors choose no other tokens, and are merged with the weights of their tokens."""
    (image,) = tiny_qwen3.encode_images([photos[0]], FURTHER)
    dim = tiny_qwen3.model.config.text_config.hidden_size
    spec = specify(method, budget=8, parameters={"pillar_signal": "feature_norm"} if method == "nuwa" else None)
    planned = plan(tiny_qwen3, spec, image.layout)

    def selected(features: torch.Tensor) -> Selection:
        encoded = EncodedImage(image.layout, image.signals | {"features": features})
        return select(tiny_qwen3, planned, image.layout, ImageBatch(encoded=[encoded], names=["photo"]))

    features = image.signals["features"]
    assert image.layout.deep == 2 and features.shape[1] == 3 * dim
    one = selected(features)
    twice = selected(torch.cat([features[:, :dim]] * 3, dim=1))
    assert torch.equal(one.indices, twice.indices) and torch.equal(one.pillars, twice.pillars)
    first, *deep = twice.features.chunk(3, dim=-1)
    assert torch.equal(one.features[..., :dim], first) and all(torch.allclose(part, first, atol=1e-6) for part in deep)
    assert not torch.allclose(one.features, twice.features)


# --- InternVL3


@pytest.mark.parametrize("layer", [-1, -2])
def test_internvls_signals_are_means_over_a_tokens_patches_tile_by_tile(tiny_internvl, photos, monkeypatch, layer):
    """Against the stock model's own features, and slow loops over its eager tower's attention and keys."""
    vlm = tiny_internvl
    monkeypatch.setattr(vlm.model.config, "vision_feature_layer", layer)
    (found,) = vlm.encode_images([photos[0]], FURTHER)
    assert found.layout == vlm.layout_of(photos[0].size) and len(found.layout.views) == 5, "four tiles and a thumbnail"
    pixels = vlm.processor.image_processor([photos[0]], crop_to_patches=True, return_tensors="pt")["pixel_values"]
    tower, keys = eager_copy(vlm.model).model.vision_tower, []
    number = layer % 6 - 1
    listener = tower.encoder.layer[number].attention.k_norm.register_forward_hook(lambda _m, _i, out: keys.append(out))
    with torch.inference_mode():
        stock = vlm.model.get_image_features(pixels).pooler_output
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
        projected = vlm.project(found.signals["features"])
    listener.remove()
    assert torch.allclose(projected, stock.flatten(0, 1), atol=1e-4)

    late = out.hidden_states[3:]  # 3 ... 5 of five layers
    whole, early, middle = (out.attentions[at] for at in (number, 0, 1))  # a quarter of five layers is the first
    patches = {
        "cls_attention": whole.mean(dim=1)[:, 0, 1:],
        "keys": keys[0][:, 1:],
        "similarity": (sum(late) / len(late))[:, 1:],
        "early_attention": early.mean(dim=1)[:, 0, 1:],
        "received_middle": torch.tensor([summed(tile) for tile in middle]),
        "received_late": torch.tensor([summed(tile) for tile in whole]),
    }
    for name, expected in patches.items():
        for tile, row, column in itertools.product(range(5), range(3), range(3)):
            four = [6 * (2 * row + down) + 2 * column + across for down in (0, 1) for across in (0, 1)]
            token = found.signals[name][9 * tile + 3 * row + column]
            assert torch.allclose(token, expected[tile, four].mean(dim=0).to(token), atol=1e-5), name


def test_internvls_tiles_lie_row_by_row_on_the_image_and_the_thumbnail_on_all_of_it(tiny_internvl):
    config = tiny_internvl.model.config
    wide, tall, small = (tiny_internvl.layout_of(size) for size in ((120, 40), (40, 80), (24, 24)))
    thirds = [(0, 0, 1 / 3, 1), (1 / 3, 0, 1 / 3, 1), (2 / 3, 0, 1 / 3, 1)]
    assert tiny_internvl.view_frames(config, wide, (120, 40)) == (*thirds, (0, 0, 1, 1))
    assert tiny_internvl.view_frames(config, tall, (40, 80)) == ((0, 0, 1, 0.5), (0, 0.5, 1, 0.5), (0, 0, 1, 1))
    assert tiny_internvl.view_frames(config, small, (24, 24)) == ((0, 0, 1, 1),)


# --- SmolVLM and Idefics3


@pytest.mark.parametrize("name", ["tiny_smolvlm", "tiny_idefics3"])
def test_smolvlms_signals_are_means_over_a_tokens_patches_tile_by_tile(name, request, photos):
    """Against the stock model's own features, and slow loops over its eager tower's attention and keys."""
    vlm = request.getfixturevalue(name)
    (found,) = vlm.encode_images([photos[0]], FURTHER)
    assert found.layout == vlm.layout_of(photos[0].size) and len(found.layout.views) == 5, "four tiles and the whole"
    (pixels,) = vlm.processor.image_processor([photos[0]], return_tensors="pt")["pixel_values"]
    tower, keys = eager_copy(vlm.model).model.vision_model, []
    listener = tower.encoder.layers[-1].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out))
    with torch.inference_mode():
        (stock,) = vlm.model.model.get_image_features(pixels[None]).pooler_output
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
        projected = vlm.project(found.signals["features"])
    listener.remove()
    assert torch.allclose(projected, stock, atol=1e-4)

    late = out.hidden_states[3:]  # 3 ... 5 of five layers
    received = {at: torch.tensor([summed(tile, first=0) for tile in out.attentions[at]]) for at in (0, 1, 4)}
    patches = {
        "cls_attention": received[4],
        "keys": keys[0],
        "similarity": sum(late) / len(late),
        "early_attention": received[0],  # a quarter of five layers is the first
        "received_middle": received[1],
        "received_late": received[4],
    }
    for signal, expected in patches.items():
        for tile, row, column in itertools.product(range(5), range(3), range(3)):
            four = [6 * (2 * row + down) + 2 * column + across for down in (0, 1) for across in (0, 1)]
            token = found.signals[signal][9 * tile + 3 * row + column]
            assert torch.allclose(token, expected[tile, four].mean(dim=0).to(token), atol=1e-5), signal


@pytest.mark.parametrize("name", ["tiny_smolvlm", "tiny_idefics3"])
def test_smolvlms_tiles_are_named_as_the_stock_processor_names_them(name, request):
    """Word by word for every arrangement, and with splitting turned off; a kept image has all its names."""
    vlm = request.getfixturevalue(name)
    split = vlm.processor.image_processor
    whole = copy.copy(vlm.processor)
    whole.image_processor = copy.copy(split)
    whole.image_processor.do_image_splitting = False
    unsplit = type(vlm)(vlm.model, whole)
    sizes = [(60, 40), (24, 24), (100, 30), (30, 100), (49, 48), (7, 300), (2000, 990)]
    leading = set()
    for one, size in [*((vlm, size) for size in sizes), (unsplit, (60, 40))]:
        made = one.processor(images=[[Image.new("RGB", size, "red")]], text=["<image>"], return_tensors="pt")
        around = one.processor.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        ids = one.image_ids(one.layout_of(size))
        assert made["input_ids"][0].tolist() == [1, around, *ids, around]
        leading.add(tuple(view.leading for view in one.layout_of(size).views))
    assert leading == {(1,), (1, 2, 3), (1, 3, 3), (1, 2, 3, 2, 3)}


def test_smolvlms_tiles_lie_row_by_row_on_the_image_and_the_last_on_all_of_it(tiny_smolvlm):
    config = tiny_smolvlm.model.config
    layout = tiny_smolvlm.layout_of((60, 40))
    quarters = [(0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), (0, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)]
    assert tiny_smolvlm.view_frames(config, layout, (60, 40)) == (*quarters, (0, 0, 1, 1))
    assert tiny_smolvlm.view_frames(config, VisualLayout((layout.views[0],)), (60, 40)) == ((0, 0, 1, 1),)
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout
    assert layout.tokens == 5 * 9 + 11 and layout.placeholders == layout.patches == 45
    with pytest.raises(UnreachableBudget) as caught:
        shares_of(layout, 15)
    assert str(caught.value) == (
        "15 tokens before the first cut are out of reach on this image: allowed 16..56, 11 of them tokens that name tiles"
    )


def test_a_tokenizer_that_names_tiles_otherwise_is_refused(tiny_smolvlm, families):
    processor = copy.copy(tiny_smolvlm.processor)
    processor.tokenizer = families.tokenizer("<image>", "<fake_token_around_image>", "<global-img>")
    other = type(tiny_smolvlm)(tiny_smolvlm.model, processor)
    with pytest.raises(CheckpointError) as caught:
        other.layout_of((60, 40))
    assert str(caught.value).startswith("the tokenizer writes the names of an image's tiles with [")
    assert str(caught.value).endswith("and this family's with [1, 2, 3, 2, 3]; fetch tokenizer.json of the checkpoint")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("HuggingFaceTB/SmolVLM2-2.2B-Instruct", 13 * 81), ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", 13 * 64)],
)
def test_smolvlms_published_sizes_are_planned_without_files(name, tokens):
    config = SHAPES[name]()
    layout = adapter_class("smolvlm").layout_for(config, usual_image_processor(config), (1024, 768))
    assert (layout.patches, layout.tokens) == (tokens, tokens + 1 + 9 * 2 + 3 * 3)


def test_an_image_whose_local_grid_is_all_padding_lies_in_its_base_crop(tiny_next):
    config, size = tiny_next.model.config, (2000, 10)
    assert len(tiny_next.layout_of(size).views) == 1
    assert tiny_next.view_frames(config, tiny_next.layout_of(size), size) == ((0, 0, 1, 1),)


# --- LLaVA-OneVision


def test_onevisions_image_among_others_lies_in_the_middle_of_a_square(tiny_onevision):
    config, size = tiny_onevision.model.config, (40, 21)
    assert tiny_onevision.view_frames(config, tiny_onevision.layout_among(size), size) == ((0, -9 / 21, 1, 40 / 21),)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_onevisions_signals_are_pooled_as_the_stock_model_pools_its_features(tiny_onevision, photos, number):
    """Its own function packs what a slow reading of the stock tower says; the second photo's grid is too small to pool."""
    vlm, image = tiny_onevision, photos[number]
    inputs = vlm.processor.image_processor([image], return_tensors="pt")
    rows, columns = vlm.crops_of(image.size[::-1])
    crops, tower = inputs["pixel_values"][0][: 1 + rows * columns], eager_copy(vlm.model).model.vision_tower
    keys = []
    listener = tower.encoder.layers[-1].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: keys.append(out))
    with torch.inference_mode():
        out = tower(crops, output_hidden_states=True, output_attentions=True)
        listener.remove()
        late = out.hidden_states[3:]  # 3 ... 5 of five layers
        received = [attention.mean(dim=(1, 2))[..., None] for attention in out.attentions]
        raw = {
            "features": vlm.model.model.multi_modal_projector(out.hidden_states[-1]),
            "cls_attention": received[-1],
            "keys": keys[0],
            "similarity": sum(late) / len(late),
            "early_attention": received[0],  # a quarter of five layers is the first
            "received_middle": received[1],
            "received_late": received[-1],
        }

        packed = {
            name: vlm.model.model.pack_image_features(
                [signal], inputs["image_sizes"], vision_aspect_ratio=vlm.model.config.vision_aspect_ratio
            )[0][0]
            for name, signal in raw.items()
        }
    (found,) = vlm.encode_images([image], FURTHER)
    assert found.layout == vlm.layout_of(image.size)
    assert (found.layout.views[1].grid.tokens == 36 * rows * columns) == (number == 2)
    assert set(found.signals) == set(packed)
    for name, expected in packed.items():
        signal = found.signals[name].reshape(expected.shape)
        assert torch.allclose(signal, expected, atol=1e-5), name
    assert found.signals["cls_attention"][:36].sum() == pytest.approx(1, rel=1e-5)


def test_grids_of_odd_sides_and_windows_that_do_not_divide_them_are_among_them(tiny_qwen, photos):
    grids = [found.layout.views[0].grid for found in tiny_qwen.encode_images(photos)]
    assert any(grid.height % 2 and grid.width % 2 for grid in grids)
    side = tiny_qwen.visual.window_size // 2 // tiny_qwen.visual.patch_size
    assert any(grid.height % side and grid.width % side for grid in grids)
    assert len(set(grids)) > 5


def test_an_image_does_not_depend_on_its_batch(family, photos, scenes):
    pictures = photos if family.layout is None else [Image.fromarray(scene.image) for scene in scenes]
    together = family.encode_images(pictures)
    for picture, other in zip(pictures, together, strict=True):
        (alone,) = family.encode_images([picture])
        assert alone.layout == other.layout
        for name in NAMES:
            assert torch.allclose(alone.signals[name], other.signals[name], atol=1e-5), name


@pytest.mark.parametrize("size", [*itertools.product((17, 24, 40, 63, 96), repeat=2), (200, 31), (23, 180)])
def test_the_layout_is_known_from_the_size_alone(family, size):
    """What plans and shards read before anything is encoded."""
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    (encoded,) = family.encode_images([picture])
    layout = family.layout_for(family.model.config, family.processor.image_processor, size)
    assert layout == encoded.layout == family.layout_of(size)
    widths = family.signal_widths(family.model.config)
    for name in NAMES:
        assert encoded.signals[name].shape[0] == layout.patches
        assert encoded.signals[name][0].numel() == widths[name]


@pytest.mark.parametrize("name", ["tiny_next", "tiny_qwen"])
def test_the_fingerprint_knows_weights_preprocessing_and_layers(request, name, monkeypatch):
    vlm = request.getfixturevalue(name)
    base = vlm.encoder_fingerprint()
    assert base == vlm.encoder_fingerprint()
    weight = next(next(iter(vlm.encoder_modules.values())).parameters())
    old = weight.data.flatten()[0].item()
    weight.data.view(-1)[0] += 1
    assert vlm.encoder_fingerprint() != base
    weight.data.view(-1)[0] = old
    assert vlm.encoder_fingerprint() == base
    mean = list(vlm.processor.image_processor.image_mean)
    monkeypatch.setattr(vlm.processor.image_processor, "image_mean", [0.1, *mean[1:]])
    assert vlm.encoder_fingerprint() != base
    monkeypatch.undo()
    assert json.dumps(vlm.encoder_settings)


def test_adapters_say_into_how_many_heads_keys_are_split(tiny_vlm, tiny_next, tiny_qwen):
    for vlm, config in (
        (tiny_vlm, tiny_vlm.model.config.vision_config),
        (tiny_next, tiny_next.model.config.vision_config),
    ):
        assert vlm.heads == config.num_attention_heads > 1
    assert tiny_qwen.heads == tiny_qwen.model.config.vision_config.num_heads > 1
    (image,) = tiny_next.encode_images([Image.new("RGB", (50, 40))])
    batch = {name: value[None] for name, value in image.signals.items()}
    assert {view.heads for view in view_signals(image.layout, batch, ("image",), heads=tiny_next.heads)} == {
        tiny_next.heads
    }


# --- signals of further layers, given only where they are asked for


def summed(attention: torch.Tensor, first: int = 1) -> list[float]:
    """Attention ``(heads, queries, keys)`` received by every key from ``first`` on, query by query."""
    heads, queries, keys = attention.shape
    total = [0.0] * (keys - first)
    for head in attention.tolist():
        for row in head:
            for key in range(first, keys):
                total[key - first] += row[key] / (heads * queries)
    return total


def test_further_layers_of_a_clip_tower_are_those_of_the_stock_model(tiny_next, photos):
    """Layers 6 and 9 of 24 are layers 2 and 2 of six; the features are those of the fifth."""
    inputs = tiny_next.processor.image_processor([photos[2]], return_tensors="pt")
    tower = eager_copy(tiny_next.model).model.vision_tower
    with torch.inference_mode():
        attentions = tower(inputs["pixel_values"][0], output_attentions=True).attentions
    (found,) = tiny_next.encode_images([photos[2]], FURTHER)
    base = {name: found.signals[name][:36] for name in FURTHER}
    assert torch.allclose(base["early_attention"], attentions[1][0].mean(dim=0)[0, 1:], atol=1e-6)
    for name, layer in (("received_middle", 1), ("received_late", 4)):
        assert base[name].tolist() == pytest.approx(summed(attentions[layer][0]), abs=1e-6)
        assert base[name].dtype == torch.float32 and base[name].std() > 1e-5
    assert found.signals["received_late"].shape == (found.layout.patches,)


def test_the_last_layer_of_a_clip_tower_is_read_as_one_head(tiny_next, photos):
    """What the tower's own projections make in a plain pass, by the equation in float64."""
    inputs = tiny_next.processor.image_processor([photos[2]], return_tensors="pt")
    made, last = [], tiny_next.tower.encoder.layers[-1].self_attn
    listeners = [
        part.register_forward_hook(lambda _m, _i, out: made.append(out)) for part in (last.q_proj, last.k_proj)
    ]
    with torch.inference_mode():
        tiny_next.tower(inputs["pixel_values"][0])
    for listener in listeners:
        listener.remove()
    query, keys = (one[0].double() for one in made[:2])
    (found,) = tiny_next.encode_images([photos[2]], ("last_attention", "last_keys"))

    expected = (query[0] @ keys.T / keys.shape[1] ** 0.5).softmax(dim=0)[1:]
    assert torch.allclose(found.signals["last_attention"][:36].double(), expected, atol=1e-6)
    assert torch.allclose(found.signals["last_keys"][:36].double(), keys[1:], atol=1e-5)
    assert not torch.allclose(found.signals["last_keys"], found.signals["keys"], atol=1e-2)
    assert tiny_next.signal_widths(tiny_next.model.config)["last_keys"] == keys.shape[1]


def test_methods_that_read_a_clip_towers_last_layer_are_refused_elsewhere(tiny_internvl):
    with pytest.raises(ValueError) as caught:
        check_encoder(specify("prumerge", preset="released", budget=16), tiny_internvl)
    assert str(caught.value) == (
        "method 'prumerge' reads last_attention and last_keys under these settings, which a CLIP tower gives and "
        "InternVL's vision tower does not: read the layer of the features instead (the method's default)"
    )


def test_further_signals_are_given_only_where_they_are_asked_for(family, photos, scenes):
    picture = photos[2] if family.layout is None else Image.fromarray(scenes[0].image)
    usual, further = (family.encode_images([picture], names)[0].signals for names in ((), FURTHER))
    assert tuple(usual) == NAMES and set(further) == {*NAMES, *FURTHER}
    assert all(torch.equal(usual[name], further[name]) for name in NAMES)


def test_an_encoder_too_shallow_for_a_signal_is_refused_by_name(tiny_next, tiny_qwen, photos, monkeypatch):
    monkeypatch.setattr(tiny_next.model.config, "vision_feature_layer", 2)
    with pytest.raises(UnavailableSignal) as caught:
        tiny_next.encode_images([photos[2]], ("early_attention",))
    assert str(caught.value) == (
        "signal early_attention is read at 0.25 of the encoder's layers; of 6 that is layer 2, which must lie below "
        "layer 2, where the features come from"
    )
    monkeypatch.setattr(tiny_qwen.visual, "fullatt_block_indexes", [4])
    with pytest.raises(UnavailableSignal) as caught:
        tiny_qwen.encode_images([photos[2]], ("received_middle",))
    assert str(caught.value) == (
        "signal received_middle is read in a block below the last that attends to the whole image; of 5 blocks those "
        "that do are 5"
    )


def test_qwens_further_signals_are_received_in_its_full_blocks(tiny_qwen, photos, monkeypatch):
    """The block named last is read as ``cls_attention``: one after the other, every block stands for itself."""
    (found,) = tiny_qwen.encode_images([photos[2]], FURTHER)
    assert torch.equal(found.signals["received_late"], found.signals["cls_attention"])
    visual = tiny_qwen.visual
    monkeypatch.setitem(visual._modules, "blocks", visual.blocks[:3])  # block 3 of five attends to the whole image
    monkeypatch.setattr(visual, "fullatt_block_indexes", [2])
    (cut,) = tiny_qwen.encode_images([photos[2]])
    for name in ("early_attention", "received_middle"):
        assert torch.allclose(found.signals[name], cut.signals["cls_attention"], atol=1e-6)
