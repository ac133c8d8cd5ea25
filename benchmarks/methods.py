"""Time and peak memory of every stage-1 method, against the same equations written straightforwardly.

Ours runs the whole batch at once. The reference (``tests/oracles/dense.py``) forms full tokens x tokens matrices; all but
Nüwa's go image by image and are measured on one. DivPrune's goes about it as its released code does. Methods that only
index (random, uniform) have no reference, nor has LearnPruner, whose module is drawn at random here. What downsampling
costs is the encoder's, and what methods inside the language model cost is its layers': ``make profile`` times both.
Repetitions alternate between ours at every batch size and the reference; figures are medians, all of them per image, of
fewer repetitions where they take long. On a CPU time is the processor's, so that what else runs there weighs less.

Memory is the peak of tensor memory allocated above the inputs, over the images: from the profiler's allocator events on
a CPU, from the caching allocator on a GPU. Scratch space inside matrix kernels is not tensor memory and counts for
neither side.

The aims on a CPU, printed with what is measured of them: every method takes at most the time of its reference at batch 8,
DivPrune at most 0.7 of it at any batch, Nüwa at most 0.4 at any batch and budget, and Nüwa's selection without merging
at most the reference's at batch 1. The last line is one JSON object.

    python -m benchmarks.methods                    # 576 and 2880 tokens, batch 1 and 8: five minutes on a free core
    python -m benchmarks.methods --quick            # 576 tokens, batch 1 and 8
    python -m benchmarks.methods --device cuda
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nuwa.grid import PatchGrid
from nuwa.signals import VisionSignals
from nuwa.stage1 import METHODS
from nuwa.stage1.learnpruner import Lpm, save_lpm
from pipelines.profiling import peak_bytes

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from oracles import dense  # type: ignore[import-not-found]  # a folder of tests, on the path as of the line above

# LLaVA-1.5 and the five crops of LLaVA-NeXT, with what Nüwa keeps of them at the published 64 and 160 average tokens.
GRIDS = {576: (PatchGrid(24, 24), 112), 2880: (PatchGrid(60, 48), 290)}
DIM, WIDTH = 1024, 4096  # CLIP-L, and the language model behind it
FURTHER_KEEPS = {576: (64, 224, 336, 560), 2880: (1162,)}  # of Nüwa: other budgets, and nearly all
LIMITS = {"divprune": 0.7, "nuwa": 0.4}  # of the reference's time; every other method: 1 at batch 8
CELL_SECONDS = 8.0  # no further repetition of one method at one size begins after this
TIMED = sorted(name for name, method in METHODS.items() if name != "unpruned" and not method.reads_images)
SELECTION = "nuwa selection"
Run = Callable[[], object]


def draw_signals(grid: PatchGrid, batch: int, device: str) -> VisionSignals:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    shape = (batch, grid.tokens, DIM)
    attention = (2 * normal(batch, grid.tokens)).softmax(dim=-1)
    images = tuple(f"image {row}" for row in range(batch))
    usual = VisionSignals(
        grid=grid,
        features=normal(*shape),
        cls_attention=attention,
        keys=normal(*shape),
        similarity=normal(*shape),
        image_ids=images,
    )
    received: dict[str, Any] = {
        name: (2 * normal(batch, grid.tokens)).softmax(dim=-1)
        for name in ("early_attention", "received_middle", "received_late")
    }
    relevance = 0.2 + 0.03 * normal(batch, grid.tokens)  # a cosine of CLIP's, not an attention
    return dataclasses.replace(usual, **received, relevance=relevance, projected=normal(batch, grid.tokens, WIDTH))


def seconds(run: Run, device: str) -> float:
    if device != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def random_weights(folder: Path) -> str:
    """A file of an untrained LearnPruner module of the width at hand."""
    torch.manual_seed(0)
    save_lpm(Lpm(DIM), folder / "lpm.safetensors", "none", {})
    return str(folder / "lpm.safetensors")


def runs_of(
    name: str, weights: str, signals: VisionSignals, keep: int, batches: list[int]
) -> dict[str, tuple[Run, int]]:
    """What is measured of a method, each with its images: ours at every batch size, and the reference where there is one."""
    method = METHODS["nuwa" if name == SELECTION else name]
    special: dict[str, dict[str, Any]] = {"learnpruner": {"weights": weights}, SELECTION: {"aggregation": False}}
    given = special.get(name, {})
    config = method.configure(**given)

    def ours(part: VisionSignals) -> Run:
        return lambda: method.select(part, keep, config, 0)

    runs: dict[str, tuple[Run, int]] = {str(batch): (ours(signals[:batch]), batch) for batch in batches}
    if name in ("nuwa", SELECTION):
        form = dense.nuwa if name == "nuwa" else dense.nuwa_selection
        for batch in batches:
            runs[f"reference {batch}"] = (functools.partial(form, signals[:batch], keep), batch)
    if name in dense.PER_IMAGE:
        runs["reference"] = (functools.partial(dense.PER_IMAGE[name], signals[:1], keep), 1)
    return runs


def measure(runs: dict[str, tuple[Run, int]], repetitions: int, device: str) -> dict[str, tuple[float, float]]:
    """Median milliseconds and peak MiB an image of every run."""
    # This is the first call of each too, which no time is taken of.
    memory = {side: peak_bytes(run, torch.device(device)) / images / 2**20 for side, (run, images) in runs.items()}
    times: dict[str, list[float]] = {side: [] for side in runs}
    began = time.perf_counter()
    for repetition in range(repetitions):
        if repetition and time.perf_counter() - began > CELL_SECONDS:
            break
        # There and back: what ran before leaves its data in the caches, to the good of one side or the other.
        for side in list(runs)[:: -1 if repetition % 2 else 1]:
            times[side].append(seconds(runs[side][0], device))
    return {side: (statistics.median(times[side]) / runs[side][1] * 1000, memory[side]) for side in runs}


def compared(measured: dict[str, tuple[float, float]], batch: int) -> dict[str, float]:
    """Ours at a batch size, the reference, and the ratios of the two."""
    figures = dict(zip(("ours_ms", "ours_mib"), measured[str(batch)], strict=True))
    reference = measured.get("reference", measured.get(f"reference {batch}"))
    if reference is not None:
        figures |= zip(("reference_ms", "reference_mib"), reference, strict=True)
        figures["time_ratio"] = figures["ours_ms"] / figures["reference_ms"]
        figures["memory_ratio"] = figures["ours_mib"] / figures["reference_mib"]
    return {name: round(value, 4) for name, value in figures.items()}


def aims(results: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The largest ratio of the times that each aim is about, and its limit."""
    largest: dict[str, dict[str, float]] = {}
    for cell, figures in results.items():
        name, _, _, batch = cell.rsplit("_", 3)
        if "time_ratio" not in figures or (name not in LIMITS and batch != ("1" if name == SELECTION else "8")):
            continue
        known = largest.setdefault(name, {"ratio": 0.0, "limit": LIMITS.get(name, 1.0)})
        known["ratio"] = max(known["ratio"], figures["time_ratio"])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same as --tokens 576 --batches 1 8")
    parser.add_argument("--tokens", nargs="+", type=int, choices=GRIDS, help="of an image (default: 576 and 2880)")
    parser.add_argument("--batches", nargs="+", type=int, help="images at once (default: 1 and 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repetitions", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=[*TIMED, SELECTION], help="only these (default: all)")
    chosen = parser.parse_args()
    names = chosen.methods or [*TIMED, SELECTION]
    batches = chosen.batches or [1, 8]
    folder = tempfile.TemporaryDirectory()
    weights = random_weights(Path(folder.name))
    results: dict[str, dict[str, float]] = {}
    columns = ("ours ms", "ref. ms", "ours MiB", "ref. MiB", "time", "memory")
    print(f"{chosen.device}, {torch.get_num_threads()} threads; milliseconds and MiB an image, ours over reference")
    print(f"{'method':<15}{'tokens':>7}{'keep':>6}{'batch':>6}" + "".join(f"{column:>10}" for column in columns))

    for tokens in chosen.tokens or ([576] if chosen.quick else GRIDS):
        grid, usual = GRIDS[tokens]
        signals = draw_signals(grid, max(batches), chosen.device)
        keeps = {name: (usual, *(FURTHER_KEEPS[tokens] if name == "nuwa" else ())) for name in names}
        for name, keep in ((one, keep) for one in names for keep in keeps[one]):
            with torch.inference_mode():
                runs = runs_of(name, weights, signals, keep, batches)
                measured = measure(runs, chosen.repetitions, chosen.device)
            for batch in batches:
                figures = results[f"{name}_{tokens}_{keep}_{batch}"] = compared(measured, batch)
                keys = ("ours_ms", "reference_ms", "ours_mib", "reference_mib", "time_ratio", "memory_ratio")
                cells = "".join(f"{figures[key]:>10.2f}" if key in figures else f"{'-':>10}" for key in keys)
                print(f"{name:<15}{tokens:>7}{keep:>6}{batch:>6}{cells}", flush=True)

    reached = aims(results)
    for name, aim in sorted(reached.items()):
        print(f"{name}: {aim['ratio']:.2f} of the reference's time at most, the aim is {aim['limit']}")
    summary = {"benchmark": "methods", "device": chosen.device, "threads": torch.get_num_threads()}
    print(json.dumps(summary | {"aims": reached, "results": results}))


if __name__ == "__main__":
    main()
