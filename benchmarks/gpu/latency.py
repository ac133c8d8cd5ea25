"""Part (b): latency at true size, stock ``generate`` and ours from the same pixels.

One image with one question and with ten, whose answers have :attr:`Scale.output_tokens` tokens. ``encode``: pixels to
what enters the language model (stock, whose projector and word embeddings are in it) or to the signals (ours).
``prefill``: everything up to the first token. ``decode``: a whole answer less one of one token. ``total`` is their sum
with selection; the image processor's time, the same for all and the host's, stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.results import Result, Status
from benchmarks.gpu.scale import LLAVA, LLAVA_NEXT
from benchmarks.gpu.session import Piece, Session
from benchmarks.gpu.workload import Workload, draw_workload
from nuwa import UNPRUNED
from nuwa.methods import MethodSpec, specify

SHORT = {LLAVA: "LLaVA-1.5-7B", LLAVA_NEXT: "LLaVA-NeXT-7B"}
BUDGETS = (64, 160)
STOCK = "stock"
# Of one question about one image: (model, budget, ratio) → least value, as the papers have it on an A100.
AIMS = {
    (LLAVA, 64, "prefill_faster"): 2.5,
    (LLAVA, 64, "stock_prefill_over_selection"): 50.0,
    (LLAVA_NEXT, 160, "total_faster"): 3.2,
}
SECONDS = {LLAVA: 8.0, LLAVA_NEXT: 10.0}  # of one system at one number of questions


def pieces(session: Session) -> Iterator[Piece]:
    """LLaVA-NeXT first, so that parts (c) and (d) find the other model in memory."""
    for path in (LLAVA_NEXT, LLAVA):
        for questions in session.scale.questions_an_image:
            rows: dict[str, dict[str, Any]] = {}
            for system in (STOCK, UNPRUNED, *BUDGETS):
                run = partial(_measure, session, path, questions, system, rows)
                yield Piece(_name(path, questions, system), SECONDS[path], run)
            yield Piece(_name(path, questions, "ratios"), 0.0, partial(_ratios, session, path, questions, rows))


def _name(path: str, questions: int, system: str | int) -> str:
    words = f"Nüwa at {system}" if isinstance(system, int) else system
    return f"{SHORT[path]}, {questions} question{'s' if questions > 1 else ''}: {words}"


@torch.inference_mode()
def _peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """Largest tensor memory held during ``work`` beyond what was held before it; null on a CPU, which has no such count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - held


def _measure(
    session: Session, path: str, questions: int, system: str | int, rows: dict[str, dict[str, Any]]
) -> Iterator[Result]:
    scale = session.scale
    vlm = session.models.get(path)
    work = draw_workload(vlm, scale.side[path], 1, questions, scale.lengths)
    if system == STOCK:
        row = time_stock(session, work)
    else:
        budget = scale.budget(path, system, work.layout.tokens) if isinstance(system, int) else None
        row = time_method(session, work, specify("nuwa", budget=budget) if budget else specify(UNPRUNED))
    row["total_ms"] = sum(row[part] for part in ("encode_ms", "selection_ms", "prefill_ms", "decode_ms"))
    row["preprocess_ms"] = session.clock(lambda: vlm.processor.image_processor(work.images, return_tensors="pt"))
    rows[str(system)] = row
    yield Result("b", _name(path, questions, system), "measured", row)


def time_method(session: Session, work: Workload, spec: MethodSpec) -> dict[str, Any]:
    """Milliseconds of our parts, and the peak of tensor memory above weights and signals."""
    median, planned = partial(session.clock.median, repeats=session.scale.repeats), work.plan(spec)
    encoded = work.encode()
    selection = work.select(planned, encoded)
    output = session.scale.output_tokens
    prefill_ms = median(lambda: work.answer(planned, selection, 1))
    return {
        "encode_ms": median(work.encode),
        "selection_ms": 0.0 if spec.stage1 == UNPRUNED else median(lambda: work.select(planned, encoded)),
        "prefill_ms": prefill_ms,
        "decode_ms": median(lambda: work.answer(planned, selection, output)) - prefill_ms,
        "average_tokens": planned.schedule.average_tokens,
        "image_tokens": work.layout.tokens,
        "peak_bytes": _peak_bytes(lambda: work.answer(planned, work.select(planned, encoded), output), session.device),
    }


def time_stock(session: Session, work: Workload) -> dict[str, Any]:
    """The model's own code: its encoder and embeddings, its language model's forward and head, its ``generate``.

    What ``generate`` does before its first pass is in no part, in stock's favour.
    """
    median, vlm = partial(session.clock.median, repeats=session.scale.repeats), work.vlm
    inputs = work.stock_inputs()
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    pixels = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}

    def embed() -> torch.Tensor:
        features = torch.cat(tuple(vlm.model.model.get_image_features(**pixels, return_dict=True).pooler_output))
        words = vlm.language.embed_tokens(tokens)
        at_image = (tokens == vlm.image_token)[..., None].expand_as(words)
        return words.masked_scatter(at_image, features.to(words))

    def prefill(embedded: torch.Tensor) -> torch.Tensor:
        out = vlm.language(inputs_embeds=embedded, attention_mask=mask, use_cache=True)
        return vlm.model.lm_head(out.last_hidden_state[:, -1:])

    output = session.scale.output_tokens
    one_ms = median(lambda: work.stock_generate(inputs, 1))
    return {
        "encode_ms": median(embed),
        "selection_ms": 0.0,
        "prefill_ms": median(partial(prefill, embed())),
        "decode_ms": median(lambda: work.stock_generate(inputs, output)) - one_ms,
        "average_tokens": float(work.layout.tokens),
        "image_tokens": work.layout.tokens,
        "peak_bytes": _peak_bytes(lambda: work.stock_generate(inputs, output), session.device),
    }


def _ratios(session: Session, path: str, questions: int, rows: dict[str, dict[str, Any]]) -> Iterator[Result]:
    """Ours against stock; the aims are a GPU's, so that a CPU neither reaches nor misses them."""
    name = _name(path, questions, "ratios")
    if STOCK not in rows:
        yield Result("b", name, "skipped", {"why": "stock was not measured"})
        return
    for budget in BUDGETS:
        if str(budget) not in rows:
            continue
        figures = ratios(rows[STOCK], rows[str(budget)])
        aims = {ratio: least for (model, at, ratio), least in AIMS.items() if (model, at) == (path, budget)}
        aims = aims if questions == 1 and session.device.type == "cuda" else {}
        reached = all((figures[ratio] or 0.0) >= least for ratio, least in aims.items())  # null: nothing measured
        status: Status = ("reached" if reached else "missed") if aims else "measured"
        yield Result("b", f"{name} at {budget}", status, figures | {f"aim_{ratio}": aims[ratio] for ratio in aims})


def ratios(stock: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    """How many times less time and memory ours takes; ``first_token``: encoder, selection and prefill."""

    def first_token(row: dict[str, Any]) -> float:
        return row["encode_ms"] + row["selection_ms"] + row["prefill_ms"]

    return {
        "prefill_faster": stock["prefill_ms"] / ours["prefill_ms"],
        "stock_prefill_over_selection": stock["prefill_ms"] / max(ours["selection_ms"], 1e-6),
        "first_token_faster": first_token(stock) / first_token(ours),
        "total_faster": stock["total_ms"] / ours["total_ms"],
        "peak_smaller": stock["peak_bytes"] / ours["peak_bytes"] if ours["peak_bytes"] else None,
    }
