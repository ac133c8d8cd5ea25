"""Time and peak memory of every stage-1 method, against the same equations written straightforwardly.

Ours runs the whole batch at once. The reference (``tests/oracles/dense.py``) forms full tokens x tokens matrices; all but
Nüwa's go image by image and are measured on one. Methods that only index (random, uniform) have no reference, nor has
LearnPruner, whose module is drawn at random here. What downsampling costs is the encoder's, and what methods inside the
language model cost is its layers': ``make profile`` times both.
Repetitions alternate between the two; figures are medians, all of them per image, of fewer repetitions where they take
long.

Memory is the peak of tensor memory allocated above the inputs, over the images: from the profiler's allocator events on
a CPU, from the caching allocator on a GPU. Scratch space inside matrix kernels is not tensor memory and counts for
neither side.

The aim is Nüwa at 576 tokens and batch 8 on a CPU in at most half the time and half the memory of the full form.
The last line is one JSON object.

    python -m benchmarks.methods                    # 576 and 2880 tokens, batch 1 and 8: a few minutes on two free cores
    python -m benchmarks.methods --quick            # 576 tokens, batch 1 and 8
    python -m benchmarks.methods --device cuda
"""

from __future__ import annotations

import argparse
import dataclasses
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
LIMIT = 0.5
CELL_SECONDS = 3.0  # no further repetition of one method at one size begins after this
TIMED = sorted(name for name, method in METHODS.items() if name != "unpruned" and not method.reads_images)
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
        for name in ("early_attention", "received_middle", "received_late", "relevance")
    }
    return dataclasses.replace(usual, **received, projected=normal(batch, grid.tokens, WIDTH))


def seconds(run: Run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def random_weights(folder: Path) -> str:
    """A file of an untrained LearnPruner module of the width at hand."""
    torch.manual_seed(0)
    save_lpm(Lpm(DIM), folder / "lpm.safetensors", "none", {})
    return str(folder / "lpm.safetensors")


def measure(
    name: str, weights: str, signals: VisionSignals, keep: int, repetitions: int, device: str
) -> dict[str, float]:
    """Median milliseconds and peak MiB an image, of ours and of the reference where there is one, and their ratios."""
    method, batch = METHODS[name], len(signals.image_ids)
    config = method.configure(**({"weights": weights} if name == "learnpruner" else {}))
    runs: dict[str, tuple[Run, int]] = {"ours": (lambda: method.select(signals, keep, config, 0), batch)}
    if name == "nuwa":
        runs["reference"] = (lambda: dense.nuwa(signals, keep), batch)
    elif name in dense.PER_IMAGE:
        runs["reference"] = (lambda: dense.PER_IMAGE[name](signals[:1], keep), 1)
    times: dict[str, list[float]] = {side: [] for side in runs}
    for run, _ in runs.values():
        run()
    began = time.perf_counter()

    for repetition in range(repetitions):
        if repetition and time.perf_counter() - began > CELL_SECONDS:
            break
        for side, (run, _) in runs.items():
            times[side].append(seconds(run, device))
    figures = {}
    for side, (run, images) in runs.items():
        figures[f"{side}_ms"] = statistics.median(times[side]) / images * 1000
        figures[f"{side}_mib"] = peak_bytes(run, torch.device(device)) / images / 2**20
    if "reference" in runs:
        figures["time_ratio"] = figures["ours_ms"] / figures["reference_ms"]
        figures["memory_ratio"] = figures["ours_mib"] / figures["reference_mib"]
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the same as --tokens 576 --batches 1 8")
    parser.add_argument("--tokens", nargs="+", type=int, choices=GRIDS, help="of an image (default: 576 and 2880)")
    parser.add_argument("--batches", nargs="+", type=int, help="images at once (default: 1 and 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repetitions", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--methods", nargs="+", choices=TIMED, help="only these (default: all)")
    chosen = parser.parse_args()
    names = chosen.methods or TIMED
    folder = tempfile.TemporaryDirectory()
    weights = random_weights(Path(folder.name))
    results: dict[str, dict[str, float]] = {}
    columns = ("ours ms", "ref. ms", "ours MiB", "ref. MiB", "time", "memory")
    print(f"{chosen.device}, {torch.get_num_threads()} threads; milliseconds and MiB an image, ours over reference")
    print(f"{'method':<10}{'tokens':>7}{'keep':>6}{'batch':>6}" + "".join(f"{column:>10}" for column in columns))

    for tokens in chosen.tokens or ([576] if chosen.quick else GRIDS):
        grid, keep = GRIDS[tokens]
        for batch in chosen.batches or ([1, 8]):
            signals = draw_signals(grid, batch, chosen.device)
            for name in names:
                with torch.inference_mode():
                    figures = measure(name, weights, signals, keep, chosen.repetitions, chosen.device)
                results[f"{name}_{tokens}_{batch}"] = figures
                keys = ("ours_ms", "reference_ms", "ours_mib", "reference_mib", "time_ratio", "memory_ratio")
                cells = "".join(f"{figures[key]:>10.2f}" if key in figures else f"{'-':>10}" for key in keys)
                print(f"{name:<10}{tokens:>7}{keep:>6}{batch:>6}{cells}", flush=True)
    summary = {"benchmark": "methods", "device": chosen.device, "threads": torch.get_num_threads(), "limit": LIMIT}
    bar = results.get("nuwa_576_8", {})
    summary |= {f"nuwa_576_{kind}_ratio": bar.get(f"{kind}_ratio") for kind in ("time", "memory")}
    print(json.dumps(summary | {"results": results}))


if __name__ == "__main__":
    main()
