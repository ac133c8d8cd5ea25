"""What the ``profile`` stage measures adds up, fits the model, and is refused or left out in words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nuwa.cost import LlmShape, kv_cache_bytes
from nuwa.methods import specify
from nuwa.vlm.shapes import model_shape
from pipelines import profiling
from pipelines.profiling import MethodTimer, peak_bytes, planned_methods, profile_model
from pipelines.settings import ProfileSettings, SettingsError

TESTBED = str(Path(__file__).parents[2] / "models/testbed")
TEXT = {"text_before": 4, "text_after": 12, "output_tokens": 3}
USUAL = {
    "models": [TESTBED],
    "methods": ["nuwa", "fastv"],
    "shares": [0.1, 0.5],
    "batch": [1, 2],
    "attention": ["sdpa"],
    "dtype": "float32",
    "device": "cpu",
    "threads": 1,
    "image_size": [96, 96],
    "repeats": 1,
    **TEXT,
}


def settings(**changes) -> ProfileSettings:
    return ProfileSettings(**{**USUAL, **changes})


def measured(**changes) -> tuple[list[dict], list[str]]:
    rows, said = [], []
    profile_model(settings(**changes), rows.append, said.append)
    return rows, said


@pytest.fixture(scope="module")
def profiled():
    return measured()


def test_every_method_budget_and_batch_has_a_row_that_adds_up(profiled):
    rows, said = profiled
    expected = ["stock generate", "unpruned", "nuwa", "nuwa", "fastv"]
    assert [(row["batch"], row["method"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in expected]
    for row in rows:
        parts = [row[part] for part in ("preprocess_ms", "encode_ms", "selection_ms", "prefill_ms", "decode_ms")]
        assert row["total_ms"] == pytest.approx(sum(parts)) and min(*parts[:2], row["prefill_ms"]) > 0
        assert (row["selection_ms"] > 0) == (row["method"] == "nuwa")
    assert len(said) == 1 and said[0].startswith(f"{TESTBED}: ") and said[0].endswith("; left out")
    assert "14.4" in said[0], "FastV sees all tokens up to its cut and cannot have a tenth of them on average"


def test_cache_bytes_are_those_of_the_schedule(profiled):
    rows, _ = profiled
    shape = LlmShape.from_config(model_shape(TESTBED))
    for row in rows:
        if row["method"] in ("stock generate", "unpruned"):
            tokens = 144 + sum(TEXT.values())
            one = 2 * shape.layers * tokens * shape.kv_heads * shape.head_dim * 4
        else:
            (spec,) = (
                one
                for one in planned_methods(settings(), lambda line: None)[TESTBED]
                if one.method == row["method"] and round(one.budget) == round(row["average_tokens"])
            )
            one = kv_cache_bytes(spec.on(_layout(), shape.layers).schedule, shape, 4, sum(TEXT.values()))
        assert row["kv_bytes"] == row["batch"] * one


def _layout():
    config = model_shape(TESTBED)
    family = profiling.adapter_class(config.model_type)
    return family.layout_for(config, profiling.usual_image_processor(config), (96, 96))


def test_pruning_takes_less_memory_and_a_batch_more(profiled):
    rows, _ = profiled
    peak = {(row["batch"], row["method"], round(row["average_tokens"])): row["peak_memory_bytes"] for row in rows}
    for batch in (1, 2):
        small, half, whole = (peak[batch, *of] for of in (("nuwa", 14), ("nuwa", 72), ("unpruned", 144)))
        assert 0 < small < half < whole
    assert peak[2, "unpruned", 144] > 1.5 * peak[1, "unpruned", 144]


def test_peak_memory_is_what_is_held_at_once():
    def two_at_once() -> None:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(500, dtype=torch.float32)
        del first, second
        torch.empty(1200, dtype=torch.float32)

    found = peak_bytes(two_at_once, torch.device("cpu"))
    assert 6000 <= found < 6000 + 256, "allocations are rounded up to 64 bytes"


def test_decoding_makes_every_token_asked_for():
    adapter = profiling.random_model(TESTBED, "cpu", torch.float32, "sdpa")
    bench = MethodTimer(adapter, profiling._workload(settings(), 2), 1)
    spec = specify("nuwa", budget=16)
    planned = profiling.plan(adapter, spec, bench.layout)
    answers = bench.answer(bench._select(planned), planned, 5)
    assert [len(one.tokens) for one in answers] == [5, 5]


# --- what is inside each timed call


class WorkClock:
    """In place of milliseconds the work inside a call, each kind in digits of its own.

    A batch preprocessed, a pass of the vision encoder, a token through the head, a token through a language layer.
    """

    PREPROCESS, ENCODER, HEAD, LAYER = 10**10, 10**8, 10**5, 1

    def __init__(self, adapter, monkeypatch) -> None:
        self.spent = 0
        kind = type(adapter.processor.image_processor)
        process = kind.__call__

        def preprocess(*args, **kwargs):
            self.spent += self.PREPROCESS
            return process(*args, **kwargs)

        monkeypatch.setattr(kind, "__call__", preprocess)
        (encoder,) = adapter.encoder_modules.values()
        self.hooks = [encoder.register_forward_pre_hook(self._pass)]
        self.hooks += [adapter.model.lm_head.register_forward_pre_hook(self._tokens(self.HEAD))]
        self.hooks += [layer.register_forward_pre_hook(self._tokens(self.LAYER)) for layer in adapter.language.layers]

    def _pass(self, *_) -> None:
        self.spent += self.ENCODER

    def _tokens(self, cost: int):
        def charge(_, args) -> None:
            (states, *_) = args
            self.spent += cost * (states.numel() // states.shape[-1])

        return charge

    def __call__(self, work) -> int:
        before = self.spent
        work()
        return self.spent - before


@pytest.fixture
def counted(family, monkeypatch):
    """A bench of two images a batch whose clock counts work, on each family."""
    adapter = profiling.adapt(family.model, family.processor)
    adapter.end_tokens = ()
    clock = WorkClock(adapter, monkeypatch)
    yield MethodTimer(adapter, profiling.WorkloadSize(2, (60, 40), 4, 12, 5), 1, clock)
    for hook in clock.hooks:
        hook.remove()


@pytest.mark.parametrize("method", ["stock generate", "unpruned", "nuwa"])
def test_every_part_is_timed_with_its_own_work_alone(counted, method):
    spec = specify("unpruned") if method == "unpruned" else specify("nuwa", budget=counted.layout.tokens / 2)
    row = counted.time_stock() if method == "stock generate" else counted.time_method(spec)
    clock, layers = counted.clock, counted.adapter.layers
    assert row["preprocess_ms"] == clock.PREPROCESS
    assert row["encode_ms"] == clock.ENCODER
    assert row["selection_ms"] == 0
    assert row["decode_ms"] // clock.HEAD == 2 * 4, "one token of five comes out of the prefill"
    if method != "nuwa":
        rows = layers * (counted.layout.tokens + 4 + 12)
        if method == "unpruned":  # of the last layer only the prompt's last token goes on to the head
            rows -= counted.layout.tokens + 4 + 12 - 1
        assert row["prefill_ms"] == 2 * (clock.HEAD + rows * clock.LAYER)
        assert row["decode_ms"] == 2 * 4 * (clock.HEAD + layers * clock.LAYER)


def stock_inputs(bench: MethodTimer) -> dict[str, torch.Tensor]:
    (prompt,) = bench.prompts[0]
    ids = [*prompt.before, *[bench.adapter.image_token] * bench.layout.tokens, *prompt.after]
    pixels = bench.adapter.processor.image_processor(bench.images, return_tensors="pt")
    return {"input_ids": torch.tensor([ids] * len(bench.images)), **pixels}


@torch.inference_mode()
def test_the_parts_of_stock_are_the_whole_of_it(counted):
    def from_images_to_tokens() -> None:
        lengths = {"max_new_tokens": 5, "min_new_tokens": 5}
        counted.adapter.model.generate(**stock_inputs(counted), **lengths, do_sample=False)

    assert counted.time_stock()["total_ms"] == counted.clock(from_images_to_tokens)


@torch.inference_mode()
def test_the_parts_of_a_method_are_the_whole_of_it(counted):
    spec = specify("nuwa", budget=counted.layout.tokens / 2)
    planned = profiling.plan(counted.adapter, spec, counted.layout)

    def from_images_to_tokens() -> None:
        counted.encoded = counted.adapter.encode_images(counted.images)
        counted.answer(counted._select(planned), planned, 5)

    assert counted.time_method(spec)["total_ms"] == counted.clock(from_images_to_tokens)


@torch.inference_mode()
def test_stock_is_prefilled_with_what_its_own_forward_makes_of_the_pixels(counted):
    said = []
    model = counted.adapter.model
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: said.append(logits))
    counted.time_stock()
    hook.remove()
    expected = model(**stock_inputs(counted), logits_to_keep=1).logits
    torch.testing.assert_close(said[0], expected, rtol=1e-4, atol=1e-4)


def test_a_newer_family_is_timed_beside_its_own_generate(newer):
    adapter = profiling.adapt(newer.model, newer.processor)
    adapter.end_tokens = ()
    bench = MethodTimer(adapter, profiling.WorkloadSize(2, (60, 40), 4, 12, 3), 1)
    rows = [bench.time_stock(), bench.time_method(specify("nuwa", budget=bench.layout.tokens / 2))]
    assert [row["method"] for row in rows] == ["stock generate", "nuwa"]
    assert rows[0]["average_tokens"] == bench.layout.tokens == 2 * rows[1]["average_tokens"]


# --- what cannot be had


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["tests"]}, "profile.models: 'tests' is no model of a supported family ("),
        (
            {"attention": ["flash_attention_2"], "dtype": "bfloat16"},
            "profile.attention: flash_attention_2 is not installed here; leave it out, or install flash-attn",
        ),
        (
            {"models": ["Qwen/Qwen2.5-VL-7B-Instruct"], "methods": ["visionzip"]},
            "profile.methods: method 'visionzip' needs the attention of a CLS token, and",
        ),
    ],
)
def test_refused_before_anything_is_loaded(changes, message, monkeypatch):
    if changes.get("attention"):
        monkeypatch.setattr(profiling, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(profiling, "random_model", None)  # nothing may come to it
    with pytest.raises(SettingsError) as caught:
        measured(**changes)
    assert str(caught.value).startswith(message)


def test_flash_attention_needs_half_precision():
    with pytest.raises(ValueError, match="attention flash_attention_2 needs dtype bfloat16 or float16, not float32"):
        settings(attention=["flash_attention_2"])


def test_true_sizes_are_planned_without_weights():
    models = ["llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"]
    planned = planned_methods(settings(models=models, image_size=[672, 672], methods=["nuwa"]), print)
    assert [round(spec.budget) for spec in planned[models[0]]] == [58, 288]
    assert [round(spec.budget) for spec in planned[models[1]]] == [293, 1464]


def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
    time_method = MethodTimer.time_method

    def memory_runs_out(self, spec):
        if spec.method == "unpruned" and self.workload.batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return time_method(self, spec)

    monkeypatch.setattr(MethodTimer, "time_method", memory_runs_out)
    rows, said = measured(methods=["nuwa"], shares=[0.1])
    assert [(row["batch"], row["method"]) for row in rows] == [
        (1, "stock generate"),
        (1, "unpruned"),
        (1, "nuwa"),
        (2, "stock generate"),
        (2, "nuwa"),
    ]
    assert said == [f"{TESTBED}, sdpa, batch 2: unpruned does not fit into memory; left out"]
