"""The pretended device notices what CUDA would refuse, allows what CUDA allows, and counts what waits."""

from __future__ import annotations

import pytest
import torch
from pretended_device import SYNCS, UPLOADS, Accelerator, Mismatch

FIRST, SECOND = "pretended:0", "pretended:1"


@pytest.fixture(autouse=True)
def accelerator():
    with Accelerator():
        yield


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: torch.ones(3, device=FIRST) + torch.ones(3),
        lambda: torch.ones(3, device=FIRST) * torch.ones(3, device=SECOND),
        lambda: torch.ones(2, 2, device=FIRST) @ torch.ones(2, 2),
        lambda: torch.cat([torch.ones(3), torch.ones(3, device=FIRST)]),
        lambda: torch.ones(3)[torch.tensor([1], device=FIRST)],
        lambda: torch.ones(3, device=FIRST)[torch.tensor([1], device=SECOND)],
        lambda: torch.zeros(3, device=FIRST).index_put_((torch.tensor([1]),), torch.ones(1, device=SECOND)),
        lambda: torch.nn.functional.embedding(torch.tensor([1], device=SECOND), torch.ones(3, 2, device=FIRST)),
        lambda: torch.nn.Linear(2, 2).requires_grad_(False).to(FIRST)(torch.ones(1, 2, device=SECOND)),
        lambda: torch.zeros(3).add_(torch.ones(3, device=FIRST)),
    ],
)
def test_mixed_devices_are_refused(mixed):
    with pytest.raises(Mismatch, match="mixes devices"):
        mixed()


def test_what_cuda_allows_passes():
    here = torch.arange(3.0, device=FIRST)
    assert (here + torch.tensor(1.0)).tolist() == [1, 2, 3]
    assert here[torch.tensor([2])].tolist() == [2]
    assert (here.to(SECOND) + torch.ones(3, device=SECOND)).device == torch.device(SECOND)
    here[1:] = torch.tensor([5.0, 6.0])
    assert here.cpu().tolist() == [0, 5, 6]
    assert torch.zeros(3).copy_(here).device.type == "cpu"
    with pytest.raises(TypeError, match="copy it to the CPU first"):
        here.numpy()


@pytest.mark.parametrize(
    ("waits", "times"),
    [
        (lambda here: here.tolist(), 1),
        (lambda here: here.sum().item(), 1),
        (lambda here: bool(here.any()), 1),
        (lambda here: here.cpu(), 1),
        (lambda here: torch.zeros(3).copy_(here), 1),
        (lambda here: here.nonzero(), 1),
        (lambda here: here[here > 1], 1),
        (lambda here: here.unique(), 1),
        (lambda here: (here + 1).softmax(0).argmax().to(SECOND), 0),
        (lambda here: here[torch.tensor([0])], 0),
    ],
)
def test_waiting_for_the_device_is_counted(waits, times):
    here = torch.arange(3.0, device=FIRST)
    SYNCS.clear()
    waits(here)
    assert SYNCS.total() == times


@pytest.mark.parametrize(
    ("copies", "times"),
    [
        (lambda here: torch.ones(3).to(FIRST), 1),
        (lambda here: here.copy_(torch.ones(3)), 1),
        (lambda here: here.to(SECOND), 0),
        (lambda here: torch.zeros(3, device=FIRST), 0),
        (lambda here: here.cpu(), 0),
    ],
)
def test_copies_to_the_device_are_counted(copies, times):
    here = torch.arange(3.0, device=FIRST)
    UPLOADS.clear()
    copies(here)
    assert UPLOADS.total() == times
