"""Is it right and fast on this GPU? Needs torch, transformers, numpy, pandas, pyarrow, pillow and safetensors only.

Parts: a  right on the device (exit code 1 where it is not); b  latency at true size; c  throughput; d  what holds it up.
Standard output is one JSON object a line, each result as it comes, so that a file of it is valid whenever the run is
cut off, and so is --out; the table at the end goes to standard error.

    python -m benchmarks.gpu --out benchmarks/results/h100.jsonl      # six minutes at most
    python -m benchmarks.gpu --parts a,c --minutes 3
    python -m benchmarks.gpu --dry-run                                # tiny shapes, on a CPU: do all parts run?
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler's own log, which torch reads when it is imported

import torch
import transformers

from benchmarks.gpu import correctness, holdups, latency, throughput
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.results import Record, Result, table
from benchmarks.gpu.scale import DRY, FULL
from benchmarks.gpu.session import Part, Session, run_part

PARTS: dict[str, Part] = {
    "a": correctness.pieces,
    "b": latency.pieces,
    "c": throughput.pieces,
    "d": holdups.pieces,
}
WEIGHTS = {"a": 1.6, "b": 1.8, "c": 2.2, "d": 0.4}  # of the time
MINUTES = 6.0


def parts_named(text: str) -> list[str]:
    """``a,c`` → its letters, in order."""
    letters = [letter.strip() for letter in text.split(",")]
    if unknown := [letter for letter in letters if letter not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(map(repr, unknown))}: allowed are {','.join(PARTS)}")
    return [letter for letter in PARTS if letter in letters]


def device_named(text: str) -> torch.device:
    """``cpu`` or a CUDA device that is there."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are cpu, cuda and cuda:0, cuda:1, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are cpu, cuda and cuda:0, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text!r}: torch sees {torch.cuda.device_count()} GPUs; --dry-run needs none")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def file_named(text: str) -> Path:
    """A file that is there or not yet; it is replaced at every line, which a folder or a device must not be."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: is no file; redirect standard output instead")
    return path


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of minutes above 0")
    return value


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--parts", type=parts_named, default=list(PARTS), help="such as a,c (default: all)")
    parser.add_argument("--minutes", type=minutes, default=MINUTES, help=f"of the whole run (default: {MINUTES:g})")
    parser.add_argument("--device", type=device_named, default=None, help=f"cpu or cuda (default here: {usual})")
    parser.add_argument("--out", type=file_named, help="a file that the lines are appended to as well")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU unless --device says otherwise")
    chosen = parser.parse_args(given)
    if chosen.device is None:
        chosen.device = device_named("cpu" if chosen.dry_run else usual)
    if chosen.device.type == "cpu" and not chosen.dry_run and set(chosen.parts) - {"a"}:
        parser.error("--device cpu: parts b, c and d at true size need a GPU; use --dry-run, or --parts a")
    return chosen


def environment(chosen: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the figures were measured."""
    cuda = chosen.device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(chosen.device) if cuda else platform.processor() or platform.machine(),
        "device_type": chosen.device.type,
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.get_device_properties(chosen.device).total_memory if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return facts | {"dry_run": chosen.dry_run, "minutes": chosen.minutes, "parts": ",".join(chosen.parts)}


def _interrupted(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main(given: Sequence[str] | None = None) -> int:
    chosen = arguments(given)
    signal.signal(signal.SIGTERM, _interrupted)  # the table comes even so
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    if chosen.device.type == "cuda":
        torch.cuda.set_device(chosen.device)

    record = Record(chosen.out)
    budget = Budget(60 * chosen.minutes, {letter: WEIGHTS[letter] for letter in chosen.parts})
    session = Session.on(chosen.device, DRY if chosen.dry_run else FULL)
    try:
        record.add(Result("run", "environment", "measured", environment(chosen)))
        for letter in chosen.parts:
            run_part(letter, PARTS[letter], session, budget, record)
        record.add(Result("run", "end", "measured", {"exit_code": record.exit_code}))
    finally:
        print(table([result for result in record.results if result.part != "run"]), file=sys.stderr, flush=True)
    return record.exit_code


if __name__ == "__main__":
    sys.exit(main())
