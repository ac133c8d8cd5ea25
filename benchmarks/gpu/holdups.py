"""Part (d): what holds it up: a generated token's waits of the host, kernels, time between them, and copies.

Each figure is a run's of some tokens less the same run's of one, over the tokens between: what decoding a token costs,
without the prefill. Where the host waits is told by torch's debug mode of synchronisations, line by line.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.results import Result
from benchmarks.gpu.scale import LLAVA
from benchmarks.gpu.session import Piece, Session
from benchmarks.gpu.throughput import BUDGET
from benchmarks.gpu.trace import Trace, traced
from benchmarks.gpu.workload import Workload, draw_workload
from nuwa import UNPRUNED
from nuwa.methods import specify

ROOT = Path(__file__).parents[2]
STOCK = "stock generate"
PLACES = 12  # where the host waits most


def pieces(session: Session) -> Iterator[Piece]:
    for system in (STOCK, UNPRUNED, "nuwa"):
        yield Piece(f"a token of {system}", 8, partial(_measure, session, system))


@torch.inference_mode()
def _measure(session: Session, system: str) -> Iterator[Result]:
    scale = session.scale
    vlm = session.models.get(LLAVA)
    work = draw_workload(vlm, scale.side[LLAVA], 1, scale.batch_questions, scale.lengths)
    run = _runs(session, work, system)
    run(scale.traced_tokens)  # to warm up
    short, long = traced(partial(run, 1), session.device), traced(partial(run, scale.traced_tokens), session.device)
    figures = per_token(short, long, scale.traced_tokens - 1)

    if session.device.type == "cuda":
        few, many = _places(partial(run, 1)), _places(partial(run, scale.traced_tokens))
        many.subtract(few)
        places = {place: count / (scale.traced_tokens - 1) for place, count in many.most_common(PLACES) if count > 0}
        figures["waits_by_place"] = places
    else:
        figures |= {"why_null": "kernels, waits and copies are a GPU's"}
    figures |= {"questions": work.questions, "tokens": scale.traced_tokens}
    yield Result("d", f"a token of {system}", "measured", figures)


def _runs(session: Session, work: Workload, system: str) -> Callable[[int], Any]:
    """Answers of a number of tokens, from what is encoded and selected already."""
    if system == STOCK:
        return partial(work.stock_generate, work.stock_inputs())
    budget = session.scale.budget(LLAVA, BUDGET, work.layout.tokens)
    planned = work.plan(specify(system) if system == UNPRUNED else specify(system, budget=budget))
    selection = work.select(planned, work.encode())
    return partial(work.answer, planned, selection)


def per_token(short: Trace, long: Trace, tokens: int) -> dict[str, Any]:
    """What ``tokens`` more tokens cost, each; figures of the device are null where none was seen."""
    operators = (long.operators - short.operators) / tokens
    if long.busy_ms is None or short.busy_ms is None:
        names = ("waits", "wait_ms", "kernels", "busy_ms", "idle_ms", "gap_us")
        return {f"{name}_a_token": None for name in names} | {"operators_a_token": operators}
    kernels = (long.kernels - short.kernels) / tokens
    idle_ms = ((long.idle_ms or 0.0) - (short.idle_ms or 0.0)) / tokens
    return {
        "waits_a_token": (long.waits - short.waits) / tokens,
        "wait_ms_a_token": (long.wait_ms - short.wait_ms) / tokens,
        "kernels_a_token": kernels,
        "busy_ms_a_token": (long.busy_ms - short.busy_ms) / tokens,
        "idle_ms_a_token": idle_ms,
        "gap_us_between_kernels": 1000 * idle_ms / kernels if kernels else None,
        "copies_a_token": {
            way: (long.copies.get(way, 0) - short.copies.get(way, 0)) / tokens for way in sorted(long.copies)
        },
    }


def _places(run: Callable[[], Any]) -> Counter[str]:
    """How often the host waited, by file and line; torch warns of each in its debug mode."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return Counter(_place(one) for one in caught if "called a synchronizing" in str(one.message))


def _place(warning: warnings.WarningMessage) -> str:
    path = Path(warning.filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{shown.as_posix()}:{warning.lineno}"
