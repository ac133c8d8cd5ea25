"""The model ``nuwa`` of lmms-eval: any of its tasks about images, under any method.

lmms_eval --model nuwa --model_args pretrained=PATH,method=nuwa,average_tokens=64 --tasks textvqa_val --batch_size 8

The interface is ``lmms_eval.api.model.lmms`` of release 0.7 (``is_simple``: a request's arguments are its text, generation
settings, a function from document to images, and where the document stands). docs/lmms_eval.md is the manual.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig

from nuwa.library import Failure, Options, stream
from nuwa.library.refusal import CallError, counted, kind_of, shown
from nuwa.vlm import load_adapter

PLACEHOLDER = "<image>"  # what tasks write where the image belongs, whatever the model's own placeholder is
WINDOW = 32  # batches whose images are in memory at once; one that comes again in a window is encoded once
USUAL_NEW_TOKENS = 1024  # where a task says nothing, as lmms-eval's own backends have it
OF_THE_TASK = ("max_new_tokens", "batch_images", "on_error", "progress")
# Settings of generation that greedy decoding obeys at these values, and at no others.
GREEDY: Mapping[str, tuple[Any, ...]] = {
    "do_sample": (False, None),
    "temperature": (0, None),
    "num_beams": (1, None),
    "num_return_sequences": (1, None),
}
OF_SAMPLING = ("top_p", "top_k")  # without meaning where nothing is sampled


class Nuwa(lmms):
    """``pretrained``: a folder or hub id that :func:`nuwa.vlm.load_adapter` takes. ``dtype``: ``auto`` (the checkpoint's)
    or a name of torch's. ``attn_implementation``, ``device_map``: as of ``from_pretrained``. ``batch_size``: images a
    batch. ``options``: keywords of :class:`nuwa.library.Options`.

    Under ``accelerate launch`` with several processes each has a model on a device of its own and answers the documents that
    the harness deals it; the harness gathers them. ``device`` and ``--device`` then name the kind of device alone.

    Raises :class:`CallError` in one line: here for a wrong option, before the first answer for generation settings, and
    for a document that cannot be asked when its turn comes.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str = "sdpa",
        device_map: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in OF_THE_TASK:
            if name in options:
                raise CallError(f"model_args: {name} is not the model's to set; use --batch_size or --gen_kwargs")
        if not str(batch_size).isdigit():
            raise CallError(f"--batch_size {batch_size} must be a whole number")
        self.options = {**options, "batch_images": int(batch_size)}
        Options.of(self.options)  # refused before the weights are read

        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise CallError(f"dtype={dtype} is none of torch's; give auto, float32, bfloat16 or float16")
        # The harness gathers with it, and tells this process its rank and what to answer.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and device_map is not None:
            raise CallError(
                f"model_args: device_map={device_map} spreads one model, and {self._world_size} processes have a model each; "
                "leave it out, or start one process"
            )
        self._device = self._own_device(device)
        saved = AutoConfig.from_pretrained(pretrained).dtype or torch.float32
        self.vlm = load_adapter(
            Path(pretrained) if os.path.isdir(pretrained) else pretrained,
            str(self._device),
            saved if dtype == "auto" else getattr(torch, dtype),
            attention=attn_implementation,
            device_map=device_map,
        )

    def _own_device(self, wanted: str | None) -> torch.device:
        """Where this process' model goes: with several processes each has the accelerator of its number on its machine."""
        usual = self.accelerator.device
        if wanted is None:
            return usual
        device = torch.device(wanted)
        return usual if self._world_size > 1 and device.type == usual.type else device

    @property
    def device(self) -> torch.device:
        return self._device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer a request, in their order."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        limits = [_limits(requests[numbers[0]].args[1]) for numbers in groups.values()]  # refuses before any work

        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for (most, stops), numbers in zip(limits, groups.values(), strict=True):
                for number, text in self._answers(requests, numbers, most):
                    answers[number] = _until(text, stops)
                    self.cache_hook.add_partial("generate_until", requests[number].args[:2], answers[number])
                    bar.update()
        return answers

    def _answers(self, requests: Sequence[Any], numbers: Sequence[int], most: int) -> Iterator[tuple[int, str]]:
        size = WINDOW * self.options["batch_images"]
        for start in range(0, len(numbers), size):
            window = numbers[start : start + size]
            images, questions = zip(*(self._asked(requests[number].args) for number in window), strict=True)
            # What fails comes back alone, so that it can be named; a batch too large for memory is halved on the way.
            options = {**self.options, "max_new_tokens": most, "on_error": "return"}
            for one in stream(self.vlm.model, self.vlm.processor, list(images), list(questions), **options):
                number = window[one.image]
                if isinstance(one.answer, Failure):
                    *_, doc, task, _ = requests[number].args
                    raise CallError(f"task {task}, document {doc}: {one.answer.message}") from one.answer.error
                yield number, one.answer.text

    def _asked(self, arguments: tuple[Any, ...]) -> tuple[list[Image.Image], Any]:
        """The images and the question of a request."""
        text, _, doc_to_visual, doc, task, split = arguments
        visuals = list(doc_to_visual(self.task_dict[task][split][doc]) or [])
        where = f"task {task}, document {doc}"
        if not visuals:
            raise CallError(f"{where} shows no image; nuwa answers about images: leave the task out")
        for visual in visuals:
            if not isinstance(visual, Image.Image):
                raise CallError(f"{where} shows a {kind_of(visual)}, no image; leave the task out")

        texts = [part.strip() for part in text.split(PLACEHOLDER)]
        if len(texts) == 1:
            return visuals, text
        if len(texts) != len(visuals) + 1:
            places, images = counted(len(texts) - 1, "place"), counted(len(visuals), "image")
            raise CallError(f"{where} names {places} for {images}; leave the task out")
        content: list[dict[str, Any]] = []
        for number, part in enumerate(texts):
            content += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": part}] * (part != "")
        return visuals, [{"role": "user", "content": content}]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise CallError("nuwa generates answers and scores none: choose tasks of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise CallError("nuwa answers in one round: choose tasks of output_type generate_until")


def _limits(settings: Mapping[str, Any]) -> tuple[int, list[str]]:
    """How long an answer may be, and the texts that end it; raises :class:`CallError` for what is not greedy."""
    for name, value in settings.items():
        if name in GREEDY and value not in GREEDY[name]:
            raise CallError(
                f"generation_kwargs: {name}={value!r} is not done; nuwa decodes greedily: {GREEDY[name][0]!r}"
            )
        if name not in (*GREEDY, *OF_SAMPLING, "max_new_tokens", "until"):
            known = ", ".join(("max_new_tokens", "until", *GREEDY, *OF_SAMPLING))
            raise CallError(f"generation_kwargs: {name}={shown(value)} is not known; allowed: {known}")
    stops = settings.get("until") or []
    return settings.get("max_new_tokens", USUAL_NEW_TOKENS), [stops] if isinstance(stops, str) else list(stops)


def _until(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of ``stops`` in it."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]
