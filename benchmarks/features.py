"""How fast the feature store is, beside ``numpy.memmap`` over the same bytes in the same run.

Sizes: LLaVA-1.5 (576 tokens of 1024, float16) and the testbed (144 of 64, float32). *Sequential*: shard by shard, every
byte added up. *Random*: one image at a time, warm. *Again*: what a worker gets when trials use an image once more. The
first pass compares checksums as well; its ratio is given apart. The last line is one JSON object.

    python -m benchmarks.features
    python -m benchmarks.features --images 512 --folder /mnt/nfs/scratch
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nuwa.grid import PatchGrid
from nuwa.layout import View, VisualLayout
from pipelines.features.store import FeatureStore

ROUNDS = 5
SHARD_IMAGES = 32
SIZES: dict[str, tuple[int, int, type[np.floating[Any]]]] = {
    "": (576, 1024, np.float16),
    "testbed_": (144, 64, np.float32),
}


def fill(store: FeatureStore, images: list[str], tokens: int, dim: int, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(0)
    for start in range(0, len(images), SHARD_IMAGES):
        names = images[start : start + SHARD_IMAGES]
        wide = [rng.standard_normal((len(names), tokens, dim), np.float32).astype(dtype) for _ in range(3)]
        salience = rng.random((len(names), tokens), np.float32).astype(dtype)
        signals = dict(zip(("features", "keys", "similarity"), wide, strict=True)) | {"cls_attention": salience}
        layout = VisualLayout((View(PatchGrid(1, tokens)),))
        store.write(names, {key: torch.from_numpy(value) for key, value in signals.items()}, layout)
    store.refresh()


def add_up(array: np.ndarray) -> int:
    """Touch every byte at the speed of memory."""
    return int(array.reshape(-1).view(np.uint64).sum(dtype=np.uint64))


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(folder: Path, count: int, tokens: int, dim: int, dtype: type[np.floating[Any]]) -> dict[str, float]:
    images = [f"{number:064x}" for number in range(count)]
    fill(FeatureStore(folder, "bench"), images, tokens, dim, dtype)
    store = FeatureStore(folder, "bench", cache_bytes=0)
    runs = [images[start : start + SHARD_IMAGES] for start in range(0, count, SHARD_IMAGES)]
    files = sorted(store.folder.glob("*.arrow"))
    size = sum(path.stat().st_size for path in files)

    def read_store() -> None:
        for run in runs:
            for value in store.read(run).values():
                add_up(value.numpy())

    def read_memmap() -> None:
        for path in files:
            mapped = np.memmap(path, np.uint8, "r")
            add_up(mapped[: mapped.size // 8 * 8])

    read_memmap()  # warm
    first = seconds(read_store)
    # Alternating, so that what else the machine does falls on both.
    pairs = [(seconds(read_memmap), seconds(read_store)) for _ in range(ROUNDS)]
    mapped, stored = (min(column) for column in zip(*pairs, strict=True))
    drawn = np.random.default_rng(1).choice(images, 200)

    def read_copy(image: str) -> None:
        for value in store.read([image]).values():
            value.clone()

    random = [seconds(partial(read_copy, image)) for image in drawn]
    worker = FeatureStore(folder, "bench")
    for image in images:
        worker.read([image])
    again = [seconds(partial(worker.read, [image])) for image in drawn]
    return {
        "gib": size / 1024**3,
        "gib_a_second": size / 1024**3 / stored,
        "sequential_ratio": mapped / stored,
        "first_pass_ratio": mapped / first,
        "random_ms": 1000 * statistics.median(random),
        "again_ms": 1000 * statistics.median(again),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128, help="images of each size (default: 128)")
    parser.add_argument("--folder", type=Path, help="where to write them (default: a temporary folder)")
    options = parser.parse_args()
    figures: dict[str, object] = {"benchmark": "features", "images": options.images}
    for name, (tokens, dim, dtype) in SIZES.items():
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measured = measure(Path(folder), options.images, tokens, dim, dtype)
        print(
            f"{tokens}x{dim} {np.dtype(dtype).name}: {measured['gib_a_second']:.1f} GiB/s, "
            f"{measured['sequential_ratio']:.0%} of numpy.memmap (bar: 80 %); first pass with checksums "
            f"{measured['first_pass_ratio']:.0%}; one image {measured['random_ms']:.2f} ms (bar: 2), "
            f"held {measured['again_ms']:.2f} ms"
        )
        figures |= {f"feature_{name}{key}": round(value, 3) for key, value in measured.items()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
