"""Several processes train as one: gradients are averaged, so a step equals a step on all their batches together."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from forked import begin

from nuwa.training import PhaseSchedule, _parameter_groups, step_rng, train_phase

SCHEDULE = PhaseSchedule(steps=7, batch_size=8, learning_rate=0.05, warmup=2, checkpoint_every=3)


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"square": ((batch["x"] @ self.weight + self.bias - batch["y"]) ** 2).mean()}


def draw(rng, size: int, progress: float) -> dict[str, torch.Tensor]:
    x = torch.from_numpy(rng.normal(size=(size, 3))).float()
    return {"x": x, "y": x.sum(1, keepdim=True) + 0.5}


def train(folder: Path, port: int, process: int) -> None:
    """One of two processes, as a launcher begins it: it leaves its weights, and what a batch of seven came to."""
    places = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process this is a copy of

    module = Line()
    train_phase("line", module, draw, SCHEDULE, seed=3, checkpoint=folder / "checkpoint", log=lambda step, values: None)
    assert PartialState().process_index == process and PartialState().num_processes == 2
    torch.save(module.state_dict(), folder / f"process-{process}.pt")
    try:
        odd = replace(SCHEDULE, batch_size=7)
        train_phase("odd", Line(), draw, odd, seed=3, checkpoint=folder / "odd", log=lambda step, values: None)
    except ValueError as refused:
        (folder / f"refused-{process}.txt").write_text(str(refused))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What two processes leave; that a launcher begins the stage in two is shown by tests/stages/test_pruner_stage.py."""
    folder = tmp_path_factory.mktemp("trained")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [begin(partial(train, folder, port, process)) for process in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    return folder


def reference(processes: int) -> Line:
    """The same steps in one process, the loss averaged over the batches that the processes draw."""
    module = Line()
    optimizer = torch.optim.AdamW(
        _parameter_groups(module, SCHEDULE.weight_decay), lr=SCHEDULE.learning_rate, betas=(0.9, 0.98)
    )
    for step in range(SCHEDULE.steps):
        for group in optimizer.param_groups:
            group["lr"] = SCHEDULE.learning_rate * SCHEDULE.rate(step)
        batches = [
            draw(step_rng(3, "line", step, process), SCHEDULE.batch_size // processes, 0)
            for process in range(processes)
        ]
        loss = sum(module(batch)["square"] for batch in batches) / processes
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), SCHEDULE.clip)
        optimizer.step()
    return module


def test_two_processes_equal_one_on_both_their_batches(trained):
    first, second = (torch.load(trained / f"process-{rank}.pt") for rank in (0, 1))
    expected = reference(2).state_dict()
    for name, value in expected.items():
        assert torch.equal(first[name], second[name]), "both processes end with the same weights"
        assert torch.allclose(first[name], value, atol=1e-6)
    assert not torch.allclose(expected["weight"], reference(1).state_dict()["weight"], atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused_by_every_process(trained):
    for rank in (0, 1):
        assert "batch_size 7 must be divisible by the 2 processes" in (trained / f"refused-{rank}.txt").read_text()
    assert not (trained / "odd").exists()


@pytest.mark.parametrize("step", [0, 1, 6])
def test_every_process_draws_its_own_batch(step):
    one, other = (draw(step_rng(3, "line", step, process), 4, 0)["x"] for process in (0, 1))
    assert not torch.equal(one, other)
