"""How much memory of its own a worker takes when it starts: a made-up checkpoint in the published form, loaded as one does.

Weights lie in several safetensors files with an index, as published ones do. The worker's start runs in a process of its
own; counted is anonymous memory, which no other process can share, at its highest while the model is loaded, beyond what
imports take. The last line is one JSON object.

    python -m benchmarks.loading
    python -m benchmarks.loading --gib 2 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LIMIT_COPIES = 1.3
HIDDEN, INTERMEDIATE = 1024, 2816
LAYER_NUMBERS = 4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE
SHARDS = 4


def write_checkpoint(folder: Path, gib: float, dtype: str) -> None:
    """A model of the testbed's family, wider and deeper, of about ``gib`` GiB in ``dtype``; all weights are zero."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from nuwa.testbed.architecture import model_config
    from nuwa.testbed.language import build_processor

    processor = build_processor()
    words = processor.tokenizer
    config = model_config(
        len(words), processor.image_token_id, words.bos_token_id, words.eos_token_id, words.pad_token_id
    )
    config.dtype = dtype
    text, kind = config.text_config, getattr(torch, dtype)
    text.hidden_size, text.intermediate_size, text.head_dim = HIDDEN, INTERMEDIATE, HIDDEN // text.num_attention_heads
    text.num_hidden_layers = max(1, round(gib * 1024**3 / (LAYER_NUMBERS * kind.itemsize)))

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(kind)
    model.to_empty(device="cpu").tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    model.save_pretrained(folder, max_shard_size=f"{max(1, int(gib * 1024 / SHARDS))}MB")
    processor.save_pretrained(folder)


def start(folder: Path, dtype: str) -> dict[str, float]:
    """Load as a worker does; bytes of one copy of the weights, and the most anonymous memory beyond what there was."""
    from pipelines.features.loading import Loading, load_model
    from pipelines.sweep import answers  # noqa: F401 (what a worker imports before it loads)

    loading, before = Loading(dtype), _anonymous()
    Loading(dtype).here(str(folder))  # imports the model's classes, as planning does
    before = _anonymous()
    done, most = threading.Event(), [before]

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], _anonymous())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    began = time.process_time()
    vlm = load_model(str(folder), "cpu", loading)
    most[0] = max(most[0], _anonymous())
    done.set()
    watching.join()
    copy = sum(weight.nbytes for weight in vlm.model.parameters())
    assert {weight.dtype.__str__() for weight in vlm.model.parameters()} == {f"torch.{dtype}"}
    return {"copy_bytes": copy, "anonymous_bytes": most[0] - before, "cpu_seconds": time.process_time() - began}


def _anonymous() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell anonymous memory")


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """:func:`start` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--start", folder, "--dtype", dtype]
    told = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=dict(os.environ))
    return json.loads(told.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="of weights (default: 2)")
    parser.add_argument("--dtype", default="float32", help="of the files and of the model (default: float32)")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # the child's half
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start, options.dtype)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), options.gib, options.dtype)
        told = measure(Path(name), options.dtype)
    copies = told["anonymous_bytes"] / told["copy_bytes"]
    print(
        f"{told['copy_bytes'] / 1024**3:.2f} GiB of weights: {copies:.3f} copies of anonymous memory (bar: {LIMIT_COPIES})"
    )
    print(json.dumps({"benchmark": "loading", "copies": round(copies, 3), "limit": LIMIT_COPIES} | told))


if __name__ == "__main__":
    main()
