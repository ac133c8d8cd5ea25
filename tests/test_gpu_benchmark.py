"""``benchmarks.gpu``: a short dry run of all parts, and that what it says is so: checks fail, time is kept, lines are whole."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import correctness, scenes
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.decoding import held_tensors
from benchmarks.gpu.holdups import per_token
from benchmarks.gpu.results import Record, Result, table
from benchmarks.gpu.scale import DRY, FULL, LLAVA, LLAVA_NEXT, Lengths
from benchmarks.gpu.session import Piece, Session, run_part
from benchmarks.gpu.throughput import METHODS, answer_methods
from benchmarks.gpu.trace import read_trace
from benchmarks.gpu.workload import Models, draw_workload
from nuwa.methods import RECIPES, specify
from nuwa.positions import STRATEGIES
from nuwa.schedule import UnreachableBudget
from nuwa.stage2 import SCORERS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SHORT = replace(DRY, scenes=1, questions=1, questions_an_image=(1,), output_tokens=2, answer_tokens=2)
SHORT = replace(SHORT, batches=(1,), traced_tokens=2)


class Stream:
    """A standard output that is kept."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...


def record(path: Path | None = None) -> Record:
    return Record(path, Stream())


# --- the dry run


@pytest.fixture(scope="module")
def short_run():
    kept, session = record(), Session.on(CPU, SHORT)
    budget = Budget(600, command.WEIGHTS)
    for letter, part in command.PARTS.items():
        run_part(letter, part, session, budget, kept)
    return kept


def test_a_dry_run_holds_and_leaves_a_figure_of_everything(short_run):
    assert short_run.exit_code == 0, table(short_run.results)
    lines = [json.loads(line) for line in short_run.stream.text.splitlines()]
    assert [line["name"] for line in lines] == [result.name for result in short_run.results]
    assert {line["status"] for line in lines} == {"held", "measured"}, table(short_run.results)

    checks = [line["name"] for line in lines if line["checks"]]
    assert [name for name in checks if name.startswith("testbed")] == ["testbed in float32"]
    assert sum("stock generate" in name for name in checks) == sum("under nuwa" in name for name in checks) == 3
    assert "placement" in checks


def test_every_method_scorer_and_position_strategy_is_asked():
    specs = correctness.configurations().values()
    assert {spec.method for spec in specs} == set(RECIPES)
    assert {spec.stage2.scorer for spec in specs if spec.method == "nuwa"} == set(SCORERS)
    assert {spec.position for spec in specs if spec.method == "nuwa"} == set(STRATEGIES)


def test_parts_of_the_latency_add_up(short_run):
    rows = [result.figures for result in short_run.results if "prefill_ms" in result.figures]
    assert len(rows) == 2 * 4, "two models; stock, unpruned and two budgets"
    for row in rows:
        total = row["encode_ms"] + row["selection_ms"] + row["prefill_ms"] + row["decode_ms"]
        assert row["total_ms"] == pytest.approx(total) and min(row["encode_ms"], row["prefill_ms"]) > 0


def test_only_what_the_environment_holds_is_imported():
    allowed = {*sys.stdlib_module_names, "benchmarks", "nuwa", "torch", "transformers", "tokenizers"}
    allowed |= {"numpy", "pandas", "pyarrow", "PIL", "safetensors"}
    for path in sorted((ROOT / "benchmarks/gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path
            assert all(name.startswith("benchmarks.gpu") for name in names if name.startswith("benchmarks")), path


# --- the same work for all


@pytest.fixture(scope="module")
def work():
    """A tiny LLaVA-1.5 in float32, so that near ties do not decide."""
    vlm = Models(DRY, CPU).get(LLAVA)
    vlm.model.float()
    return draw_workload(vlm, DRY.side[LLAVA], images=2, questions=3, lengths=Lengths(4, 3, 1, 6, 2, (2, 5)))


def specs(work, names=METHODS):
    budget = DRY.budget(LLAVA, 64, work.layout.tokens)
    return {name: specify(name, **({} if name == "unpruned" else {"budget": budget})) for name in names}


def test_stock_generate_gets_the_same_questions(work):
    """Our unpruned answers are stock's to the left-padded rows, limit by limit."""
    inputs = work.stock_inputs()
    assert not inputs["attention_mask"].all(), "questions differ in length"
    stock = work.stock_generate(inputs, max(work.limits))[:, inputs["input_ids"].shape[1] :].tolist()
    (ours,) = answer_methods(work, specs(work, ["unpruned"])).values()
    assert [list(answer.tokens) for answer in ours] == [
        row[:limit] for row, limit in zip(stock, work.limits, strict=True)
    ]
    part = work.stock_inputs(2, 3)
    assert torch.equal(part["pixel_values"], inputs["pixel_values"][2:5]) and len(part["input_ids"]) == 3


def test_a_shared_tree_says_what_each_method_says_alone(work):
    together = answer_methods(work, specs(work))
    assert list(together) == list(METHODS)
    for name in METHODS:
        (alone,) = answer_methods(work, specs(work, [name])).values()
        assert together[name] == alone, name
    assert len({tuple(answers) for answers in together.values()}) == len(METHODS), "methods keep different tokens"


def test_true_sizes_are_the_checkpoints():
    for path, tokens in ((LLAVA, 576), (LLAVA_NEXT, 2928)):
        assert FULL.budget(path, 64, tokens) == 64
        assert FULL.shape(path).text_config.num_hidden_layers == 32


# --- checks that fail


def answers(*tokens: int, kept: tuple[int, ...] = (0, 1)):
    slots = SimpleNamespace(slots=kept)
    return [SimpleNamespace(tokens=(token,), kept=slots, kept_last=kept) for token in tokens]


def test_float32_must_say_what_the_cpu_says_and_half_precision_need_not():
    reference = {"unpruned": answers(*range(400)), "nuwa": answers(*range(400))}
    same = correctness.compare("float32", reference, reference)
    assert (same.status, same.figures["differ_share"], same.checks) == ("held", 0.0, True)

    few = reference | {"nuwa": answers(-1, *range(1, 400), kept=(0, 2))}
    differing = correctness.compare("float32", few, reference)
    assert differing.status == "held", "one of 800 is below the share that may"
    assert differing.figures["differ_share"] == 1 / 800 and differing.figures["kept_otherwise_share"] == 0.5
    assert differing.figures["differ_share_by_configuration"] == {"nuwa": 1 / 400}

    many = reference | {"nuwa": answers(*[-1] * 9, *range(9, 400))}
    assert correctness.compare("float32", many, reference).status == "failed", "9 of 400 under one method"
    half = correctness.compare("bfloat16", many, reference)
    assert (half.status, half.checks) == ("measured", False)


def test_a_tensor_of_numbers_left_behind_fails_placement():
    inside = [("weight", torch.zeros(2, device="meta")), ("index", torch.zeros(2, dtype=torch.long))]
    held = correctness.placement(inside, torch.device("meta"))
    assert held.status == "held" and held.figures["whole_number_left_share"] == 1.0
    left = correctness.placement([*inside, ("states", torch.zeros(2))], torch.device("meta"))
    assert left.status == "failed" and left.figures["left"] == ["states"] and left.figures["left_share"] == 0.5
    assert correctness.placement([], CPU).status == "failed", "nothing seen proves nothing"


def test_tensors_are_seen_however_deep_they_are_held(work):
    planned = work.plan(specs(work)["nuwa"])
    held = dict(held_tensors({"selection": work.select(planned, work.encode()), "more": [(torch.ones(1),)]}))
    assert {"[selection].indices", "[selection].features", "[selection].pillars", "[more][0][0]"} <= set(held)


# --- time


def test_each_part_has_its_share_and_what_is_left_over_goes_on():
    now = SimpleNamespace(seconds=0.0)
    budget = Budget(100, {"a": 1, "b": 3}, now=lambda: now.seconds)
    budget.begin("a")
    assert budget.left == 25
    now.seconds = 10
    budget.begin("b")
    assert budget.left == 90
    now.seconds = 120
    assert budget.left == -20


def test_pieces_that_do_not_fit_into_the_time_say_so_and_the_others_have_their_say():
    def raises(error):
        def run():
            yield Result("b", "first", "measured")
            raise error

        return run

    def part(session):
        yield Piece("long", 60, lambda: [Result("b", "long", "measured")], checks=True)
        yield Piece("large", 1, raises(torch.OutOfMemoryError("CUDA out of memory")))
        yield Piece("small budget", 1, raises(UnreachableBudget("budget 64 is out of reach")))
        yield Piece("broken", 1, raises(IndexError("list index\nout of range")))
        yield Piece("whole", 1, lambda: [Result("b", "whole", "held", checks=True)], checks=True)

    kept, session = record(), SimpleNamespace(scale=FULL)
    run_part("b", part, session, Budget(30, {"b": 1}), kept)
    statuses = [(result.name, result.status) for result in kept.results if result.name != "first"]
    assert statuses == [
        *(
            ("long", "skipped"),
            ("large", "skipped"),
            ("small budget", "skipped"),
            ("broken", "error"),
            ("whole", "held"),
        )
    ]
    lines = [json.loads(line) for line in kept.stream.text.splitlines()]
    assert lines[0]["why"] == "30 s left of this part's time, 60 s needed; give more --minutes"
    (broken,) = (line for line in lines if line["status"] == "error")
    assert broken["error"] == "IndexError: list index out of range" and "test_gpu_benchmark.py" in broken["where"][-1]
    assert kept.exit_code == 1


# --- lines


@pytest.mark.parametrize(
    "statuses, code",
    [
        ([("held", True), ("measured", False), ("missed", False), ("skipped", False)], 0),
        ([("held", True), ("failed", True)], 1),
        ([("held", True), ("error", False)], 1),
        ([("held", True), ("skipped", True)], 3),
    ],
)
def test_the_exit_code_is_correctness(statuses, code):
    kept = record()
    for status, checks in statuses:
        kept.add(Result("a", "one", status, checks=checks))
    assert kept.exit_code == code


def test_a_line_is_valid_json_whatever_the_figures(tmp_path):
    kept = record(tmp_path / "deep/results.jsonl")
    kept.add(
        Result("b", "Nüwa\n", "measured", {"share": float("nan"), "by": {"x": [float("inf"), 1 / 3]}, "none": None})
    )
    text = (tmp_path / "deep/results.jsonl").read_text()
    assert text == kept.stream.text and text.count("\n") == 1 and "Nüwa" in text
    assert json.loads(text)["by"] == {"x": [None, 0.333333]} and json.loads(text)["share"] is None


def test_a_torn_line_is_cut_off_before_more_is_appended(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"part": "a"}\n{"part": "b", "na')
    kept = record(path)
    kept.add(Result("c", "one", "measured"))
    assert [json.loads(line)["part"] for line in path.read_text().splitlines()] == ["a", "c"]


WRITER = """
import sys
from pathlib import Path
from benchmarks.gpu.results import Record, Result

kept = Record(Path(sys.argv[1]))
for number in range(10**9):
    kept.add(Result("b", f"piece {number}", "measured", {"number": number, "filling": "x" * 3900}))
"""


def test_killed_at_any_time_every_line_is_whole(tmp_path):
    """The real writer in a process of its own, killed in the middle of line after line of almost a page."""
    for attempt in range(6):
        path = tmp_path / f"{attempt}.jsonl"
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        printed = b"".join(writer.stdout.readline() for _ in range(40 + 17 * attempt))
        os.kill(writer.pid, signal.SIGKILL)
        printed += writer.stdout.read()
        assert writer.wait() == -signal.SIGKILL

        numbers = []
        for content in (path.read_bytes(), printed):
            numbers.append([json.loads(line)["number"] for line in content.splitlines()])
            assert content.endswith(b"\n") and numbers[-1] == list(range(len(numbers[-1]))) and len(numbers[-1]) >= 40
        assert 0 <= len(numbers[0]) - len(numbers[1]) <= 1, "what is printed is in the file"


def test_a_line_that_a_pipe_would_tear_leaves_figures_out_by_name():
    line = Result("a", "one", "held", {"first": 1, "many": {str(n): n for n in range(1000)}, "last": "y" * 90}).line()
    assert json.loads(line) == {
        **{"part": "a", "name": "one", "status": "held", "checks": False, "first": 1},
        "left_out": ["last", "many"],
    }


def test_the_table_has_a_row_a_result():
    rows = table(
        [Result("a", "one", "held", {"share": 0.123456, "by": {}}), Result("b", "two", "error", {"error": "E: x"})]
    )
    assert rows.splitlines() == ["a  one  held   share 0.1235", "b  two  error  E: x"]


# --- traces


def event(cat, name, ts, dur, tid=1):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid}


def test_a_trace_tells_kernels_gaps_copies_and_waits():
    trace = read_trace(
        [
            {"ph": "M", "name": "process_name"},
            event("cuda_runtime", "cudaLaunchKernel", 0, 5),
            event("kernel", "gemm", 1000, 400),
            event("kernel", "softmax", 1200, 400, tid=2),  # overlaps the first by 200
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 2000, 100),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 2050, 10),
            event("gpu_memset", "Memset (Device)", 2600, 400),
            event("cuda_runtime", "cudaStreamSynchronize", 2000, 1500),
            event("cpu_op", "aten::mm", 0, 50),
            event("cpu_op", "aten::mul", 10, 5),  # inside the first
            event("cpu_op", "aten::add", 50, 5),
        ]
    )
    assert (trace.kernels, trace.waits, trace.wait_ms, trace.operators) == (2, 1, 1.5, 2)
    assert trace.busy_ms == pytest.approx(0.6 + 0.1 + 0.4) and trace.idle_ms == pytest.approx(0.4 + 0.5)
    assert trace.copies == {"DtoH": 1, "HtoD": 1}


def test_what_a_token_costs_is_the_difference_of_two_runs():
    def run(tokens):
        prefill = [event("kernel", "prefill", 0, 1000), event("cuda_runtime", "cudaDeviceSynchronize", 0, 100)]
        steps = [event("kernel", "step", 1000 + 50 * step + 20, 30) for step in range(tokens)]
        copies = [event("gpu_memcpy", "Memcpy DtoH (x)", 1000 + 50 * step, 10) for step in range(tokens)]
        waits = [event("cuda_runtime", "cudaStreamSynchronize", 0, 40) for _ in range(2 * tokens)]
        return read_trace([*prefill, *steps, *copies, *waits])

    figures = per_token(run(1), run(9), 8)
    assert figures["waits_a_token"] == 2 and figures["wait_ms_a_token"] == pytest.approx(0.08)
    assert figures["kernels_a_token"] == 1 and figures["copies_a_token"] == {"DtoH": 1}
    assert figures["busy_ms_a_token"] == pytest.approx(0.04) and figures["idle_ms_a_token"] == pytest.approx(0.01)
    assert figures["gap_us_between_kernels"] == pytest.approx(10)


# --- data and the command line


def test_the_scenes_are_those_that_are_drawn():
    drawn = scenes.draw_scenes()
    assert drawn.equals(pq.read_table(scenes.FILE))
    whole = scenes.read_scenes(40, 10)
    assert whole.count == 400 and all(len(set(texts)) == 10 for texts in whole.questions)
    assert len({image.tobytes() for image in whole.images}) == 40


@pytest.mark.parametrize(
    "given, message",
    [
        (["--parts", "a,e"], "'e': allowed are a,b,c,d"),
        (["--minutes", "0"], "'0': a number of minutes above 0"),
        (["--minutes", "soon"], "'soon': a number of minutes above 0"),
        (["--device", "tpu"], "'tpu': allowed are cpu, cuda"),
        (["--device", "meta"], "'meta': allowed are cpu, cuda"),
        (["--device", "cuda:99"], "'cuda:99': torch sees"),
        (["--out", "/"], "'/': is no file"),
        (["--device", "cpu"], "parts b, c and d at true size need a GPU; use --dry-run, or --parts a"),
    ],
)
def test_a_wrong_command_line_is_refused_in_words(given, message, capsys):
    with pytest.raises(SystemExit) as refused:
        command.arguments(given)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_parts_keep_their_order_and_a_dry_run_is_the_cpus():
    chosen = command.arguments(["--parts", "c, a", "--dry-run"])
    assert chosen.parts == ["a", "c"] and chosen.device == CPU and chosen.minutes == 6
