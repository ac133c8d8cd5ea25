"""What Nüwa saves at true size: LLaVA-1.5-7B at 64 average tokens, LLaVA-NeXT-7B at 160, against stock ``generate``.

Weights are random, since latency does not depend on their values; shapes, kernels and the number of tokens are the real
ones. Stock and ours run from the same images: preprocessing, encoder, prefill and decoding; ours with selection and with
its cut in the prefill. Stock's prefill is its language model's own forward over the unpruned sequence.

The aims, on a GPU in bfloat16: LLaVA-1.5's prefill at 64 tokens at least 2.5 times faster than stock's, selection at most
2 % of stock's prefill; LLaVA-NeXT's total at 160 tokens at least 3.2 times faster. A CPU prints the same ratios, which
count as a CPU's.

    python -m benchmarks.latency                               # both models on the GPU, or on the CPU where there is none
    python -m benchmarks.latency --model llava-hf/llava-1.5-7b-hf --batch 1 8 --output-tokens 16
    python -m benchmarks.latency --repeats 1 --output-tokens 2 --device cpu     # LLaVA-1.5-7B takes 15 GB of memory

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import dataclass

import torch

from nuwa import UNPRUNED
from nuwa.methods import specify
from nuwa.vlm import Adapter
from pipelines.profiling import Bench, Workload, device_name, random_model


@dataclass(frozen=True)
class Case:
    """``average_tokens`` of Nüwa on an image of ``image_size`` (width, height); ``aims``: ratio → least value."""

    image_size: tuple[int, int]
    average_tokens: float
    aims: dict[str, float]


CASES = {
    "llava-hf/llava-1.5-7b-hf": Case((336, 336), 64, {"prefill_faster": 2.5, "prefill_over_selection": 50.0}),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Case((672, 672), 160, {"total_faster": 3.2}),
}
TEXT_BEFORE, TEXT_AFTER = 35, 25  # LLaVA-1.5's system prompt and a question of POPE


def measure_model(path: str, case: Case, args: argparse.Namespace) -> list[dict]:
    """Every batch size on one model, which is dropped before the next is made: two of 7B need not fit."""
    adapter = random_model(path, args.device, torch.bfloat16, args.attention)
    found = [measure(path, adapter, case, batch, args) for batch in args.batch]
    del adapter
    gc.collect()  # a module refers to itself
    torch.cuda.empty_cache()
    return found


def measure(path: str, adapter: Adapter, case: Case, batch: int, args: argparse.Namespace) -> dict:
    bench = Bench(adapter, Workload(batch, case.image_size, TEXT_BEFORE, TEXT_AFTER, args.output_tokens), args.repeats)
    print(
        f"{path}, batch {batch}: {bench.layout.tokens} visual tokens, preprocessing {bench.preprocess_ms:.1f} ms",
        flush=True,
    )
    rows = {}
    runs = {
        "stock": bench.time_stock,
        UNPRUNED: lambda: bench.time_method(specify(UNPRUNED)),
        "nuwa": lambda: bench.time_method(specify("nuwa", budget=case.average_tokens)),
    }
    for name, run in runs.items():
        rows[name] = row = run()
        print(
            f"  {name:9} {row['average_tokens']:6g} tokens: encoder {row['encode_ms']:.0f} ms, "
            f"selection {row['selection_ms']:.1f} ms, prefill {row['prefill_ms']:.0f} ms, decode {row['decode_ms']:.0f} ms, total {row['total_ms']:.0f} ms",
            flush=True,
        )
    stock, ours = rows["stock"], rows["nuwa"]
    ratios = {
        "prefill_faster": stock["prefill_ms"] / ours["prefill_ms"],
        "total_faster": stock["total_ms"] / ours["total_ms"],
        "prefill_over_selection": stock["prefill_ms"] / ours["selection_ms"],
        "unpruned_prefill_over_stock": rows[UNPRUNED]["prefill_ms"] / stock["prefill_ms"],
        "cache_smaller": stock["kv_bytes"] / ours["kv_bytes"],
    }
    for name, least in case.aims.items():
        print(
            f"  {name} {ratios[name]:.2f}, aim {least:g}: {'held' if ratios[name] >= least else 'MISSED'}", flush=True
        )
    return {"batch": batch, "tokens": bench.layout.tokens, **ratios, "aims": case.aims, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager", "flash_attention_2"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = device_name(args.device)
    print(f"{device}, bfloat16, {args.attention}, {args.output_tokens} tokens of answer, medians of {args.repeats}")
    found = {path: measure_model(path, CASES[path], args) for path in CASES if path in args.model}
    print(json.dumps({"device": device, "output_tokens": args.output_tokens, "repeats": args.repeats, **found}))


if __name__ == "__main__":
    main()
