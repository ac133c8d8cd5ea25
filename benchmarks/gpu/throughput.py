"""Part (c): answers a second on LLaVA-1.5-7B's shape, of one method alone, of four as a shared tree, and of stock.

Images with ten questions each of RefCOCO's lengths, from pixels that are preprocessed to tokens. Ours encodes every image
once and answers all questions together; the tree encodes, selects and passes trunks once for all methods that share
them. Stock ``generate`` gets the same rows, unpruned, some at a time. Useful tokens count: what an answer's own length
asks for, not what a batch runs on to.

``busy_share``: time in which a kernel runs, under the profiler, over the time of an unprofiled run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.decoding import answer_tree
from benchmarks.gpu.results import Result
from benchmarks.gpu.scale import LLAVA
from benchmarks.gpu.session import Piece, Session
from benchmarks.gpu.trace import traced
from benchmarks.gpu.workload import Workload, draw_workload
from nuwa import UNPRUNED
from nuwa.methods import MethodSpec, specify

METHODS = (UNPRUNED, "visionzip", "fastv", "nuwa")
BUDGET = 64  # average tokens of 576
TREE, STOCK = "all four as one tree", "stock generate"
SECONDS_AN_IMAGE, SECONDS_AT_LEAST = 0.4, 4.0


def pieces(session: Session) -> Iterator[Piece]:
    for images in session.scale.batches:
        seconds = SECONDS_AT_LEAST + SECONDS_AN_IMAGE * images
        for system in (*METHODS, TREE, STOCK):
            times = len(METHODS) if system == TREE else 1
            run = partial(_measure, session, images, system)
            yield Piece(f"{images} images: {system}", times * seconds, run)


@torch.inference_mode()
def _measure(session: Session, images: int, system: str) -> Iterator[Result]:
    scale = session.scale
    vlm = session.models.get(LLAVA)
    work = draw_workload(vlm, scale.side[LLAVA], images, scale.batch_questions, scale.lengths)
    run: Callable[[], object]
    if system == STOCK:
        run, answers, tokens = _stock(session, work)
    else:
        names = METHODS if system == TREE else (system,)
        specs = {name: _spec(session, work, name) for name in names}
        run = partial(answer_methods, work, specs)
        answers, tokens = len(specs) * work.questions, len(specs) * sum(work.limits)

    if images == scale.batches[0]:  # kernels are chosen and the allocator grows once
        run()
    wall_ms = session.clock(run)
    busy_ms = traced(run, session.device).busy_ms if session.device.type == "cuda" else None  # kernels are a GPU's
    figures: dict[str, Any] = {"answers_per_s": 1000 * answers / wall_ms, "tokens_per_s": 1000 * tokens / wall_ms}
    figures["busy_share"] = None if busy_ms is None else busy_ms / wall_ms
    figures |= {"answers": answers, "tokens": tokens, "wall_ms": wall_ms}
    yield Result("c", f"{images} images: {system}", "measured", figures)


def _spec(session: Session, work: Workload, name: str) -> MethodSpec:
    if name == UNPRUNED:
        return specify(name)
    return specify(name, budget=session.scale.budget(LLAVA, BUDGET, work.layout.tokens))


@torch.inference_mode()
def answer_methods(work: Workload, specs: dict[str, MethodSpec]) -> dict[str, list[Any]]:
    """Answers under every method of ``specs`` from pixels, what they share computed once."""
    encoded = work.encode()
    plans = {name: work.plan(spec) for name, spec in specs.items()}
    choose = partial(work.select, encoded=encoded)
    return answer_tree(work.vlm, plans, choose, work.prompts, work.names, work.layout, work.limits)


def _stock(session: Session, work: Workload) -> tuple[Callable[[], None], int, int]:
    """Stock ``generate`` over some batches of rows, how many answers that is, and their useful tokens."""
    rows = min(session.scale.stock_rows, work.questions)
    starts = [rows * number for number in range(min(session.scale.stock_batches, work.questions // rows))]
    batches = [(work.stock_inputs(start, rows), max(work.limits[start : start + rows])) for start in starts]

    def run() -> None:
        for inputs, longest in batches:
            work.stock_generate(inputs, longest)

    answers = rows * len(starts)
    return run, answers, sum(work.limits[:answers])
