"""How long answers take and what they hold: preprocessing, encoder, selection, prefill and decoding, by the clock.

Latency depends on shapes and not on the values of weights, so models of true size are timed with random weights. Every
time is the median of repeated runs after one warm-up; on a GPU the clock is a pair of CUDA events. All parts are timed by
themselves but decoding, which is a whole answer less one of one token, both from the same start; it is stated as it comes
out, below zero too where noise is larger. The parts add up to the total. Memory is the peak of tensor memory above model
and encoded images, in a run of its own.
"""

from __future__ import annotations

import gc
import inspect
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText
from transformers.utils import is_flash_attn_2_available

from nuwa import UNPRUNED
from nuwa.clock import Clock
from nuwa.cost import LlmShape, kv_cache_bytes
from nuwa.decoder import Answer, Trunk
from nuwa.errors import in_one_line
from nuwa.generation import ImageBatch, LayoutPlan, plan, select
from nuwa.layout import VisualLayout
from nuwa.methods import MethodSpec, check_encoder, specify
from nuwa.schedule import UnreachableBudget
from nuwa.selection import Selection
from nuwa.vlm import Adapter, EncodedImage, EncodedPrompt, adapt, adapter_class, usual_image_processor
from nuwa.vlm.made_pixels import processor_of
from nuwa.vlm.shapes import model_shape
from pipelines.settings import ProfileSettings, SettingsError

PREFILL_TOKENS = 1
STOCK = "stock generate"  # the model's own code, pixels to tokens


@dataclass(frozen=True)
class WorkloadSize:
    """What is asked: ``batch`` images of ``image_size`` pixels (width, height), one question each.

    ``text_before``, ``text_after``: tokens before and behind the image. ``output_tokens``: all of them are generated.
    """

    batch: int
    image_size: tuple[int, int]
    text_before: int
    text_after: int
    output_tokens: int


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Largest tensor memory held during ``run`` beyond what was held before it.

    From the caching allocator on a GPU, from the profiler's allocator events on a CPU; scratch space inside matrix
    kernels is not tensor memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - held

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]

    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def random_model(path: str, device: str, dtype: torch.dtype, attention: str) -> Adapter:
    """The architecture of ``path`` with random weights and its family's own image processor; nothing is downloaded."""
    config = model_shape(path)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    adapter = adapt(model.eval().requires_grad_(False), SimpleNamespace(image_processor=usual_image_processor(config)))
    adapter.end_tokens = ()  # every answer has its full length
    return adapter


class MethodTimer:
    """One model and one workload, encoded once; times each method on it.

    ``preprocess_ms``: the image processor on the whole batch. ``encode_ms``: the vision encoder from its pixels, with
    their way to the device. ``clock``: milliseconds of a call; :class:`Clock` where none is given.
    """

    def __init__(
        self,
        adapter: Adapter,
        workload: WorkloadSize,
        repeats: int,
        clock: Callable[[Callable[[], Any]], float] | None = None,
    ) -> None:
        self.adapter, self.workload, self.repeats = adapter, workload, repeats
        self.clock = clock or Clock(adapter.device)
        rng = np.random.default_rng(0)
        width, height = workload.image_size
        self.images = [
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(workload.batch)
        ]
        self.names = tuple(f"image {number}" for number in range(workload.batch))
        words = np.delete(np.arange(adapter.model.config.text_config.vocab_size), adapter.image_token)
        words = rng.choice(words, workload.text_before + workload.text_after).tolist()
        prompt = EncodedPrompt(tuple(words[: workload.text_before]), tuple(words[workload.text_before :]))
        self.prompts = [[prompt] for _ in range(workload.batch)]
        self.pixels: Mapping[str, torch.Tensor] = {}
        self.preprocess_ms = self.median(self._preprocess)
        # An adapter preprocesses what it encodes; this one, around the same model, is handed the pixels.
        self.encoder = adapt(adapter.model, processor_of(adapter.processor.image_processor, self.pixels))
        self.encoded: list[EncodedImage] = []
        self.encode_ms = self.median(self._encode)

    @property
    def layout(self) -> VisualLayout:
        return self.encoded[0].layout

    def median(self, work: Callable[[], Any]) -> float:
        work()
        return statistics.median(self.clock(work) for _ in range(self.repeats))

    def _preprocess(self) -> None:
        self.pixels = self.adapter.processor.image_processor(self.images, return_tensors="pt")

    def _encode(self) -> None:
        self.encoded = self.encoder.encode_images(self.images)

    def _select(self, planned: LayoutPlan) -> Selection:
        batch = ImageBatch(encoded=self.encoded, names=self.names, pictures=self.images)
        return select(self.adapter, planned, self.layout, batch)

    @torch.inference_mode()
    def answer(self, selection: Selection, planned: LayoutPlan, tokens: int) -> list[Answer]:
        """Prefill of all layers, stage 2 among them, and ``tokens`` tokens of every answer."""
        spec, schedule = planned.spec, planned.schedule
        trunk = Trunk(self.adapter, selection, self.prompts, spec.position, self.names, self.layout)
        limits = [tokens] * len(self.prompts)
        return trunk.answer(spec.running_cuts(schedule), limits, spec.seed)

    @torch.inference_mode()
    def time_method(self, spec: MethodSpec) -> dict[str, Any]:
        """Milliseconds of one method, for the whole batch. Raises ``ValueError`` as :func:`nuwa.generation.plan`."""
        planned = plan(self.adapter, spec, self.layout)
        selection = self._select(planned)
        selection_ms = self.median(lambda: self._select(planned))
        prefill_ms = self.median(lambda: self.answer(selection, planned, PREFILL_TOKENS))
        whole_ms = self.median(lambda: self.answer(selection, planned, self.workload.output_tokens))
        return self._row(
            planned,
            lambda: self.answer(self._select(planned), planned, self.workload.output_tokens),
            encode_ms=self.encode_ms,
            selection_ms=0.0 if spec.stage1 == UNPRUNED else selection_ms,
            prefill_ms=prefill_ms,
            decode_ms=whole_ms - prefill_ms,
        )

    @torch.inference_mode()
    def time_stock(self) -> dict[str, Any]:
        """The model's own code. ``encode_ms``: its encoder from pixels to what enters the language model, projector and
        word embeddings with it, which ours has in its prefill. ``prefill_ms``: its language model's forward over the
        unpruned sequence and the head on the last token. ``decode_ms``: its ``generate``, less that of one token; what
        ``generate`` does before its first pass is in no part, in stock's favour.
        """
        model, device = self.adapter.model, self.adapter.device
        (prompt,) = self.prompts[0]
        ids = [*prompt.before, *self.adapter.image_ids(self.layout), *prompt.after]
        tokens = torch.tensor([ids] * self.workload.batch, device=device)
        mask = torch.ones_like(tokens)
        taken = inspect.signature(model.forward).parameters  # InternVL's image processor counts tiles, too

        def inputs() -> dict[str, torch.Tensor]:
            return {
                name: value.to(device, model.dtype if value.is_floating_point() else None)
                for name, value in self.pixels.items()
                if name in taken
            }

        def embed() -> torch.Tensor:
            features = torch.cat(tuple(model.model.get_image_features(**inputs(), return_dict=True).pooler_output))
            words = self.adapter.language.embed_tokens(tokens)
            at_image = (tokens == self.adapter.image_token)[..., None].expand_as(words)
            return words.masked_scatter(at_image, features.to(words))

        def prefill(embedded: torch.Tensor) -> torch.Tensor:
            out = self.adapter.language(inputs_embeds=embedded, attention_mask=mask, use_cache=True)
            return model.lm_head(out.last_hidden_state[:, -1:])

        def generate(count: int, pixels: dict[str, torch.Tensor]) -> torch.Tensor:
            lengths = {"max_new_tokens": count, "min_new_tokens": count}
            return model.generate(input_ids=tokens, attention_mask=mask, **pixels, **lengths, do_sample=False)

        encode_ms = self.median(embed)
        prefill_ms = self.median(partial(prefill, embed()))
        pixels = inputs()
        one_ms = self.median(lambda: generate(PREFILL_TOKENS, pixels))
        whole_ms = self.median(lambda: generate(self.workload.output_tokens, pixels))
        row = self._row(
            plan(self.adapter, specify(UNPRUNED), self.layout),
            lambda: generate(self.workload.output_tokens, pixels),
            encode_ms=encode_ms,
            selection_ms=0.0,
            prefill_ms=prefill_ms,
            decode_ms=whole_ms - one_ms,
        )
        return row | {"method": STOCK}

    def _row(self, planned: LayoutPlan, run: Callable[[], Any], **times: float) -> dict[str, Any]:
        schedule, config = planned.schedule, self.adapter.model.config
        text = self.workload.text_before + self.workload.text_after + self.workload.output_tokens
        times = {"preprocess_ms": self.preprocess_ms, **times}
        kept = kv_cache_bytes(schedule, LlmShape.from_config(config), self.adapter.model.dtype.itemsize, text)
        return {
            "method": planned.spec.method,
            "average_tokens": schedule.average_tokens,
            "image_tokens": schedule.tokens,
            **times,
            "total_ms": sum(times.values()),
            "kv_bytes": self.workload.batch * kept,
            "peak_memory_bytes": peak_bytes(run, self.adapter.device),
        }


def planned_methods(settings: ProfileSettings, say: Callable[[str], None]) -> dict[str, list[MethodSpec]]:
    """The methods to time, by model; ``say`` gets a line for every budget that a method cannot reach there.

    Nothing is loaded. Raises :class:`SettingsError` for a model, method or kernel that cannot be had.
    """
    if "flash_attention_2" in settings.attention and not is_flash_attn_2_available():
        raise SettingsError(
            "profile.attention: flash_attention_2 is not installed here; leave it out, or install flash-attn"
        )
    planned: dict[str, list[MethodSpec]] = {}

    for path in settings.models:
        try:
            config = model_shape(path)
            family = adapter_class(config.model_type)
            width, height = settings.image_size
            layout = family.layout_for(config, usual_image_processor(config), (width, height))
        except (OSError, ValueError, AttributeError) as error:
            reason = in_one_line(error)
            raise SettingsError(f"profile.models: {path!r} is no model of a supported family ({reason})") from None
        planned[path] = []
        for method in settings.methods:
            for share in settings.shares:
                spec = specify(method, budget=share * layout.tokens)
                try:
                    check_encoder(spec, family)
                    spec.on(layout, config.get_text_config().num_hidden_layers)
                except UnreachableBudget as error:
                    say(f"{path}: {error}; left out")
                except ValueError as error:
                    raise SettingsError(f"profile.methods: {error}; {path} is of that kind") from None
                else:
                    planned[path].append(spec)
    return planned


def profile_model(
    settings: ProfileSettings, on_row: Callable[[dict[str, Any]], None], say: Callable[[str], None]
) -> None:
    """Time every method × budget × batch × attention kernel of ``settings``; ``on_row`` gets each finished row.

    What does not fit into the GPU's memory is left out, and ``say`` told. Raises as :func:`planned_methods`.
    """
    planned = planned_methods(settings, say)
    for path, specs in planned.items():
        for attention in settings.attention:
            adapter = random_model(path, settings.device, getattr(torch, settings.dtype), attention)
            for batch in settings.batch:
                fixed = {"model": path, "attention": attention, "dtype": settings.dtype, "batch": batch}
                fixed |= {"output_tokens": settings.output_tokens, "device": device_name(settings.device)}
                _profile_batch(adapter, _workload(settings, batch), settings.repeats, specs, fixed, on_row, say)
            del adapter
            gc.collect()  # a module refers to itself; two models of true size would not fit
            torch.cuda.empty_cache()


def _profile_batch(
    adapter: Adapter,
    workload: WorkloadSize,
    repeats: int,
    specs: list[MethodSpec],
    fixed: dict[str, Any],
    on_row: Callable[[dict[str, Any]], None],
    say: Callable[[str], None],
) -> None:
    where = f"{fixed['model']}, {fixed['attention']}, batch {workload.batch}"
    try:
        bench = MethodTimer(adapter, workload, repeats)
    except torch.OutOfMemoryError:
        say(f"{where}: the images do not fit into memory; left out")
        return

    runs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    runs += [(STOCK, bench.time_stock), (UNPRUNED, partial(bench.time_method, specify(UNPRUNED)))]
    runs += [(f"{spec.method} at {spec.budget:g}", partial(bench.time_method, spec)) for spec in specs]

    for name, run in runs:
        try:
            on_row(fixed | run())
        except torch.OutOfMemoryError:
            say(f"{where}: {name} does not fit into memory; left out")


def _workload(settings: ProfileSettings, batch: int) -> WorkloadSize:
    width, height = settings.image_size
    return WorkloadSize(batch, (width, height), settings.text_before, settings.text_after, settings.output_tokens)


def device_name(device: str) -> str:
    """What the figures were measured on, in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
