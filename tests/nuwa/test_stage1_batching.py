"""Results of stage 1 do not depend on who shares the batch, and nothing in it waits for the device.

Which part of a result is the same bit for bit, per method:

* indices and pillars, and the features of tokens that merge nothing: always, for all methods;
* merged features of ``pooling``: always, as a cell is summed by itself;
* merged features of ``nuwa``, ``prumerge``, ``visionzip`` and ``vscan`` come out of matrix products, whose kernels may sum in another
  order for another batch: within 1e-6 of the largest feature (half precision: one unit in the last place).
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.agreement import PRUNING, select, signals_of
from oracles.pictures import KINDS, SHAPES, draw_picture

from nuwa.grid import PatchGrid
from nuwa.selection import Selection
from nuwa.signals import VIEW_SIGNALS, VisionSignals
from nuwa.stage1 import get_method

torch.set_num_threads(1)
PRODUCTS = {"nuwa", "prumerge", "visionzip", "vscan"}
WIDE = ("features", "keys", "similarity", "projected")  # a vector a token, not a number
CONFIGURED = [*PRUNING, "nuwa paper"]


def configured(name: str):
    method, _, preset = name.partition(" ")
    return method, get_method(method).configure(preset or None)


def assert_same_images(one: Selection, rows: list[int], other: Selection, exact: bool) -> None:
    """Images ``rows`` of one batch are those of another, in its order."""
    assert torch.equal(one.indices[rows], other.indices)
    assert torch.equal(one.pillars[rows], other.pillars)
    here, found, pillars = one.features[rows], other.features, other.pillars
    assert torch.equal(here[pillars], found[pillars])
    if exact:
        assert torch.equal(here, found)
    else:
        step = 2**-10 if here.dtype == torch.float16 else 1e-6
        assert ((here - found).float().abs().amax((1, 2)) <= step * here.float().abs().amax((1, 2))).all()


@functools.cache
def album_of(kind: str) -> VisionSignals:
    return signals_of(*[draw_picture(seed, 9, 12, kind, dim=48, key_dim=40) for seed in range(64)])


def part_of(album: VisionSignals, rows: list[int]) -> VisionSignals:
    """Copies of some images, as a batch of theirs would be drawn."""
    tensors = {name: value[rows] for name, value in vars(album).items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(album, **tensors, image_ids=tuple(album.image_ids[row] for row in rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGURED)
def test_batches_of_1_8_and_64_and_their_order_change_nothing(name, kind):
    method, config = configured(name)
    album, exact = album_of(kind), method not in PRODUCTS
    together = select(method, album, 21, config)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [order, *([*range(start, start + 8)] for start in range(0, 64, 8)), *([row] for row in range(0, 64, 9))]
    for rows in batches:
        assert_same_images(together, rows, select(method, part_of(album, rows), 21, config), exact)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), name=st.sampled_from(CONFIGURED))
def test_permuting_images_permutes_results(data, name):
    method, config = configured(name)
    shape = data.draw(st.sampled_from(SHAPES))
    kinds = data.draw(st.lists(st.sampled_from([kind for kind in KINDS if kind != "half"]), min_size=2, max_size=5))
    album = [draw_picture(seed, *shape, kind) for seed, kind in enumerate(kinds)]
    order = data.draw(st.permutations(range(len(album))))
    keep = data.draw(st.integers(1, album[0].tokens))
    plain = select(method, signals_of(*album), keep, config, seed=5)
    permuted = select(method, signals_of(*[album[row] for row in order]), keep, config, seed=5)
    assert_same_images(plain, order, permuted, method not in PRODUCTS)


def without_content(grid: PatchGrid, batch: int, dtype: torch.dtype = torch.float32) -> VisionSignals:
    """Signals on PyTorch's meta device: they have a shape and a dtype, and no values."""
    shape = (batch, grid.tokens, 32)
    wide = {name: torch.empty(shape, device="meta", dtype=dtype) for name in WIDE}
    parts = wide | {
        name: torch.empty(shape[:2], device="meta", dtype=dtype) for name in VIEW_SIGNALS if name not in wide
    }
    return VisionSignals(grid=grid, **parts, image_ids=tuple(f"image {row}" for row in range(batch)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("keep", [1, 16, 47, 144])
@pytest.mark.parametrize("name", CONFIGURED)
def test_selection_never_waits_for_the_device(name, keep, dtype):
    """What runs where there are no values reads none back to the host, in a branch, a loop or a shape."""
    method, config = configured(name)
    selection = select(method, without_content(PatchGrid(12, 12), 3, dtype), keep, config)
    kept = get_method(method).kept(PatchGrid(12, 12), keep)
    for part in (selection.indices, selection.features, selection.pillars):
        assert part.device.type == "meta" and part.shape[:2] == (3, kept)
    assert selection.features.dtype == dtype


@pytest.mark.parametrize(
    "wait",
    [
        lambda attention: attention.sum().item(),
        lambda attention: int(attention.argmax()),
        lambda attention: attention.tolist(),
        lambda attention: attention.nonzero(),
        lambda attention: attention[attention > 0],
        lambda attention: attention.cpu(),
        lambda attention: 1 if attention.any() else 0,
    ],
    ids=["item", "int", "tolist", "nonzero", "mask", "cpu", "if"],
)
def test_waiting_for_the_device_would_be_noticed(wait):
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(without_content(PatchGrid(2, 2), 1).cls_attention)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", CONFIGURED)
def test_the_accelerator_keeps_the_same_tokens(name):
    method, config = configured(name)
    album = signals_of(*[draw_picture(seed, 12, 12, dim=48, key_dim=40) for seed in range(8)])
    there = album.to(torch.device("cuda"))
    here, found = select(method, album, 21, config), select(method, there, 21, config)
    assert torch.equal(here.indices, found.indices.cpu()) and torch.equal(here.pillars, found.pillars.cpu())
    assert torch.allclose(here.features, found.features.cpu(), atol=1e-5)
