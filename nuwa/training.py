"""Training with Accelerate: one loop, resumable, the same on a CPU, one GPU or several.

A phase is a module whose ``forward(batch)`` returns named scalars, and a function that draws the batch of a step.
Scalars with a gradient are losses and are summed; the others are only logged. Every batch is a pure function of
(seed, phase, step, process), so resuming needs no data state.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

Metrics = dict[str, float]
Log = Callable[[int, Metrics], None]


@dataclass(frozen=True, kw_only=True)
class PhaseSchedule:
    """How long and how fast a phase learns. The learning rate warms up, stays, and falls to zero linearly."""

    steps: int
    batch_size: int  # over all processes
    learning_rate: float
    warmup: int = 200
    decay_share: float = 0.26
    weight_decay: float = 0.05
    clip: float = 1.0
    checkpoint_every: int = 250
    evaluate_every: int = 250
    log_every: int = 50

    def rate(self, step: int) -> float:
        """Learning rate as a share of ``learning_rate`` at ``step``."""
        decay = max(1, round(self.steps * self.decay_share))
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / decay))


def step_rng(seed: int, phase: str, step: int, process: int) -> np.random.Generator:
    return np.random.default_rng([seed, *phase.encode(), step, process])


def _save(accelerator: Accelerator, folder: Path, step: int) -> None:
    """Checkpoint beside, then swap: a kill leaves the old one, the new one, or both (see :func:`_latest`)."""
    fresh = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(fresh, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(fresh))
    accelerator.wait_for_everyone()  # every process writes its random state there; none may find the folder moved
    if accelerator.is_main_process:
        (fresh / "step.json").write_text(json.dumps({"step": step}))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def _latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; between the two renames of :func:`_save` only the old one has its name."""
    candidates = (folder, folder.with_name(folder.name + ".old"))
    return next((path for path in candidates if (path / "step.json").exists()), None)


def _resume(accelerator: Accelerator, folder: Path) -> int:
    """Load the newest checkpoint of ``folder``; returns the step at which training goes on, 0 where there is none."""
    latest = _latest(folder)
    if latest is None:
        return 0
    accelerator.load_state(str(latest))
    return int(json.loads((latest / "step.json").read_text())["step"])


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices; leave biases, norms and tables alone."""
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in trained if not (p.ndim > 1 and "embed" not in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


Learner = TypeVar("Learner", bound=nn.Module)


def train_phase(
    phase: str,
    module: Learner,
    draw_batch: Callable[[np.random.Generator, int, float], dict[str, torch.Tensor]],
    schedule: PhaseSchedule,
    *,
    seed: int,
    checkpoint: Path,
    log: Log,
    evaluate: Callable[[Learner], Metrics] | None = None,
) -> None:
    """Run ``schedule.steps`` optimiser steps of ``module``, from ``checkpoint`` if it exists.

    ``draw_batch(rng, size, progress)`` gets the per-process batch size and the share of the phase that is done. The
    module is left with its final weights, on its original object.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(
        _parameter_groups(module, schedule.weight_decay), lr=schedule.learning_rate, betas=(0.9, 0.98)
    )
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    start = _resume(accelerator, checkpoint)
    share, rest = divmod(schedule.batch_size, accelerator.num_processes)
    if rest:
        raise ValueError(
            f"{phase}: batch_size {schedule.batch_size} must be divisible by the {accelerator.num_processes} processes"
        )
    wrapped.train()
    began = time.monotonic()
    sums: dict[str, float] = {}

    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        rng = step_rng(seed, phase, step, accelerator.process_index)
        batch = draw_batch(rng, share, step / schedule.steps)
        scalars = wrapped({name: value.to(accelerator.device) for name, value in batch.items()})
        accelerator.backward(sum(value for value in scalars.values() if value.requires_grad))
        accelerator.clip_grad_norm_(module.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in scalars.items():
            name = f"{phase}/loss_{name}" if value.requires_grad else f"{phase}/{name}"
            sums[name] = sums.get(name, 0.0) + float(value.detach())

        done = step + 1
        if done % schedule.log_every == 0 and accelerator.is_main_process:
            metrics = {name: value / schedule.log_every for name, value in sums.items()}
            metrics[f"{phase}/examples_per_second"] = (done - start) * schedule.batch_size / (time.monotonic() - began)
            log(done, metrics)
            sums = {}
        if done % schedule.evaluate_every == 0 and evaluate is not None and accelerator.is_main_process:
            module.eval()
            log(done, {f"{phase}/{name}": value for name, value in evaluate(module).items()})
            module.train()
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            _save(accelerator, checkpoint, done)
    module.eval()
    accelerator.free_memory()
