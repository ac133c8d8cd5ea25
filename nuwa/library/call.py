"""``nuwa.generate`` and ``nuwa.stream``: images and questions in, answers out, and what was kept of the images.

answers = nuwa.generate(model, processor, images, questions, method="nuwa", average_tokens=64)
answers[0].text, answers[0].kept.slots, answers[0].timings

A call goes through four steps: keywords become :class:`nuwa.library.options.Options`, images and questions a
:class:`nuwa.library.pairing.Pairing`; a :class:`Plan` looks over every picture, layout and prompt before the first image
is encoded; and batches of images run, an image that comes again once with all its questions.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from nuwa.generation import (
    Generation,
    ImageBatch,
    answer_encoded,
    answer_interleaved,
    image_id,
    plan,
    plan_interleaved,
    seconds_since,
)
from nuwa.layout import InterleavedLayout, VisualLayout
from nuwa.library.conversations import encode_question
from nuwa.library.identity import encoder_identity, remembered_tower
from nuwa.library.options import Options
from nuwa.library.pairing import Asked, Pairing, pair
from nuwa.library.pictures import Picture, picture
from nuwa.library.refusal import CallError, kind_of
from nuwa.methods import RECIPES, MethodSpec, check_encoder
from nuwa.stage1 import get_method
from nuwa.stage1.found_weights import weight_places, weights_for
from nuwa.stage1.learnpruner import LearnPruner
from nuwa.vlm import Adapter, EncodedImage, EncodedPrompt, adapt


@dataclass(frozen=True)
class Failure:
    """In the place of an answer, with ``on_error="return"``: what was raised for its image or question."""

    error: Exception

    @property
    def message(self) -> str:
        return str(self.error)


@dataclass(frozen=True)
class Streamed:
    """An answer of :func:`stream`, and the numbers of its image (or of the list of them) and of its question about it."""

    image: int
    question: int
    answer: Generation | Failure


def generate(model: PreTrainedModel, processor: Any, images: Any = None, questions: Any = None, **options: Any) -> Any:
    """Greedy answers to questions about images under a pruning method.

    ``model``, ``processor``: any ``LlavaForConditionalGeneration``, ``LlavaNextForConditionalGeneration``,
    ``LlavaOnevisionForConditionalGeneration``, ``Qwen2VLForConditionalGeneration``,
    ``Qwen2_5_VLForConditionalGeneration``, ``Qwen3VLForConditionalGeneration``, ``InternVLForConditionalGeneration``,
    ``SmolVLMForConditionalGeneration`` or ``Idefics3ForConditionalGeneration`` in evaluation mode, and its processor; neither is changed.

    ``images``: one image or a list; each a path, bytes of a file, the same as a ``file:`` or ``data:`` URL, a Pillow image
    (an animation at the frame where it stands), or an array or tensor ``(height, width[, channels])`` or ``(channels, height, width)`` of uint8 or of floats
    in [0, 1]. All are read as :mod:`nuwa.images` says: turned upright, transparency on white. A list in the place of one
    is several images that its questions are about together. ``questions``: for each
    image a text, chat messages (:mod:`nuwa.library.conversations`), or a list of these, which share the image's prefix.
    Without ``images`` the messages hold them. ``options``: see :class:`nuwa.library.Options`.

    Returns a :class:`nuwa.Generation` for every question, in the shape of ``images`` and ``questions``: one image with
    one question has one answer, a list of images a list, and a list of questions a list in the image's place. With
    ``on_error="return"`` a :class:`Failure` stands where a question has no answer.

    Raises ``ValueError`` in one line naming the argument, its value and what is allowed, and
    :class:`nuwa.schedule.UnreachableBudget` where no schedule of the method has that average.
    """
    call = Call.of(model, processor, images, questions, options)

    # Batches answer image by image; the shape of the result is that of what was given.
    answers = {(one.image, one.question): one.answer for one in call.run()}
    return call.pairing.shaped([answers[asked.image, asked.question] for asked in call.pairing.asked])


def stream(
    model: PreTrainedModel, processor: Any, images: Any = None, questions: Any = None, **options: Any
) -> Iterator[Streamed]:
    """The answers of :func:`generate` as they come, batch by batch, in the order in which their images first appear.

    Everything that :func:`generate` refuses is refused here before the iterator is returned.
    """
    return Call.of(model, processor, images, questions, options).run()


def _show_options(function: Callable[..., Any]) -> None:
    """Put the keywords of :class:`Options` where ``help`` and editors look for them."""
    signature = inspect.signature(function)
    positional = [one for one in signature.parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    keywords = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default, annotation=item.type)
        for item in fields(Options)
    ]
    function.__signature__ = signature.replace(parameters=[*positional, *keywords])  # type: ignore[attr-defined]  # for help()


_show_options(generate)
_show_options(stream)


@dataclass(frozen=True)
class Prompted:
    """One question that is to be asked, and its tokens."""

    asked: Asked
    prompt: EncodedPrompt


@dataclass(frozen=True)
class Work:
    """One image, or several that are asked about together, and everything the call asks about them, wherever it stood."""

    pictures: tuple[Picture, ...]
    questions: tuple[Prompted, ...]

    def halves(self) -> tuple[Work, Work]:
        middle = len(self.questions) // 2
        return replace(self, questions=self.questions[:middle]), replace(self, questions=self.questions[middle:])


@dataclass(frozen=True)
class Plan:
    """What a call will do: ``work``, image by image; ``failures``: of questions that cannot be asked."""

    work: tuple[Work, ...]
    failures: tuple[Streamed, ...]


@dataclass(frozen=True)
class Call:
    """One call, all of it planned."""

    vlm: Adapter
    options: Options
    pairing: Pairing
    plan: Plan

    @classmethod
    def of(cls, model: Any, processor: Any, images: Any, questions: Any, given: dict[str, Any]) -> Call:
        options = Options.of(given)
        _check_model(model, processor)
        pairing = pair(images, questions)

        framing = {name: getattr(options, name) for name in ("conversation", "image_aspect_ratio")}
        vlm = adapt(model, processor, **framing)
        vlm.pass_tokens = options.pass_tokens
        if options.text_tower is not None:
            vlm.text_tower = remembered_tower(vlm, options.text_tower)
        options = _with_weights(vlm, options)
        _check_method(vlm, options)
        return cls(vlm, options, pairing, _Planning(vlm, options).of(pairing.asked))

    def run(self) -> Iterator[Streamed]:
        """Answers batch by batch; those that were lost in planning come first."""
        asked = len(self.pairing.asked)
        tell = _Progress(self.options.progress, asked)
        try:
            for failed in self.plan.failures:
                tell.one()
                yield failed
            work, size = self.plan.work, self.options.batch_images
            for start in range(0, len(work), size):
                for answered in self._answered(work[start : start + size]):
                    tell.one()
                    yield answered
        finally:
            tell.close()

    def _answered(self, batch: Sequence[Work]) -> list[Streamed]:
        """A batch's answers. What raises is halved, images first, until the question stands alone that has none."""
        try:
            return self._answer(batch)
        except Exception as caught:
            if self.options.on_error == "raise":
                raise
            error = caught.with_traceback(None)  # which holds the tensors that memory may have run out for

        if len(batch) > 1:
            middle = len(batch) // 2
            return [*self._answered(batch[:middle]), *self._answered(batch[middle:])]
        (work,) = batch
        if len(work.questions) > 1:
            return [one for half in work.halves() for one in self._answered([half])]
        (only,) = work.questions
        return [Streamed(only.asked.image, only.asked.question, Failure(error))]

    @torch.inference_mode()
    def _answer(self, batch: Sequence[Work]) -> list[Streamed]:
        """Images are read and encoded together; prompts that begin alike share an image's prefix."""
        began, vlm = time.perf_counter(), self.vlm
        pictures = {one.key: one.read() for work in batch for one in work.pictures}
        encoded = self._encoded(batch, pictures)
        names = {key: image_id(one) for key, one in pictures.items()}
        encoding = {"encode": seconds_since(vlm, began)}

        answers = []
        for beginning in dict.fromkeys(one.prompt.beginning for work in batch for one in work.questions):
            of_batch = [[one for one in work.questions if one.prompt.beginning == beginning] for work in batch]
            works = [work for work, row in zip(batch, of_batch, strict=True) if row]
            rows = [row for row in of_batch if row]
            columns = []
            for of_works in zip(*(work.pictures for work in works), strict=True):
                column = ImageBatch(
                    encoded=[encoded[one.key, self._among(work)] for one, work in zip(of_works, works, strict=True)],
                    names=[names[one.key] for one in of_works],
                    questions=[[one.asked.asked.text for one in row] for row in rows],
                    pictures=[pictures[one.key] for one in of_works],
                    prompts=[[one.prompt for one in row] for row in rows],
                )
                columns.append(column)
            if len(columns) == 1:
                of_rows = answer_encoded(vlm, columns[0], self._spec_on, self.options.max_new_tokens)
            else:
                of_rows = answer_interleaved(vlm, columns, self._spec_on, self.options.max_new_tokens)
            for row, of_row in zip(rows, of_rows, strict=True):
                for one, answer in zip(row, of_row, strict=True):
                    answer = replace(answer, timings=encoding | answer.timings)
                    answers.append(Streamed(one.asked.image, one.asked.question, answer))
        return answers

    def _among(self, work: Work) -> bool:
        """Whether its pictures are encoded in another way than alone, because they are several."""
        return len(work.pictures) > 1 and not self.vlm.alike

    def _encoded(self, batch: Sequence[Work], read: Mapping[str, Image.Image]) -> dict[tuple[str, bool], EncodedImage]:
        """Every picture of a batch, by its key and :meth:`_among`; ``read``: the pictures by their keys."""
        vlm, wanted = self.vlm, dict[bool, dict[str, Image.Image]]()
        for work in batch:
            wanted.setdefault(self._among(work), {}).update((one.key, read[one.key]) for one in work.pictures)

        encoded: dict[tuple[str, bool], EncodedImage] = {}
        for among, pictures in wanted.items():
            first, *_ = images = list(pictures.values())
            layout_of, encode = (vlm.layout_among, vlm.encode_among) if among else (vlm.layout_of, vlm.encode_images)
            # Which signals a method reads is the same on every layout: the first image's specification stands for all.
            further = self._spec_on(layout_of(first.size)).further_signals
            keys = ((key, among) for key in pictures)
            encoded.update(zip(keys, encode(images, further), strict=True))
        return encoded

    def _spec_on(self, layout: VisualLayout) -> MethodSpec:
        return self.options.spec_on(self.vlm.model.config.model_type, layout)


class _Planning:
    """Looks over pictures, layouts and prompts; nothing is encoded."""

    def __init__(self, vlm: Adapter, options: Options) -> None:
        self.vlm, self.options = vlm, options
        self.pictures: dict[int, tuple[Picture, ...]] = {}  # by image: its questions follow one another
        self.planned: dict[tuple[VisualLayout, ...], None] = {}
        self.prompts: dict[tuple[str, int], EncodedPrompt] = {}  # of texts and numbers of images, which come again

    def of(self, asked: Sequence[Asked]) -> Plan:
        work: dict[tuple[str, ...], tuple[tuple[Picture, ...], list[Prompted]]] = {}
        failures = []
        several = len({one.image for one in asked}) > 1
        for one in asked:
            try:
                seen = self._pictures(one)
                prompted = Prompted(one, self._prompt(one))
            except Exception as error:
                if self.options.on_error == "raise":
                    raise _placed(error, one.image) if several else error from None
                failures.append(Streamed(one.image, one.question, Failure(error)))
            else:
                work.setdefault(tuple(picture.key for picture in seen), (seen, []))[1].append(prompted)
        return Plan(tuple(Work(seen, tuple(questions)) for seen, questions in work.values()), tuple(failures))

    def _pictures(self, one: Asked) -> tuple[Picture, ...]:
        """Its pictures, once the budget is known to be in reach on their layouts."""
        if one.image not in self.pictures:
            seen = tuple(picture(given) for given in one.pictures)
            layout_of = self.vlm.layout_of if len(seen) == 1 else self.vlm.layout_among
            layouts = tuple(layout_of(picture.size) for picture in seen)
            if layouts not in self.planned:
                self._plan(layouts)
                self.planned[layouts] = None
            self.pictures[one.image] = seen
        return self.pictures[one.image]

    def _plan(self, layouts: tuple[VisualLayout, ...]) -> None:
        def spec_of(layout: VisualLayout) -> MethodSpec:
            return self.options.spec_on(self.vlm.model.config.model_type, layout)

        if len(layouts) == 1:
            plan(self.vlm, spec_of(layouts[0]), layouts[0])
        else:  # whatever stands between them
            plan_interleaved(self.vlm, spec_of, InterleavedLayout.of(layouts, [0] * (len(layouts) - 1)))

    def _prompt(self, one: Asked) -> EncodedPrompt:
        if one.asked.messages is not None:
            return encode_question(self.vlm, one.asked)
        asked = one.asked.text, one.asked.places
        if asked not in self.prompts:
            self.prompts[asked] = encode_question(self.vlm, one.asked)
        return self.prompts[asked]


def _placed(error: Exception, image: int) -> Exception:
    """``error``, whose line says which image of several it is about."""
    if isinstance(error, ValueError) and error.args and error.args[0] == str(error):
        error.args = (f"images[{image}]: {error}", *error.args[1:])
    return error


def _check_model(model: Any, processor: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise CallError(
            f"model is of type {kind_of(model)}; give a model that is loaded, "
            "AutoModelForImageTextToText.from_pretrained(path).eval()"
        )
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise CallError(
            f"processor is of type {kind_of(processor)}, without image processor and tokenizer; give "
            "AutoProcessor.from_pretrained(path)"
        )
    if model.training:
        raise CallError("the model is in training mode; call model.eval() first")


def _with_weights(vlm: Adapter, options: Options) -> Options:
    """``options`` that name the weights trained for the model's encoder, where the method has such and names none."""
    given = dict(options.parameters or {})
    if get_method(RECIPES[options.method].stage1).config is not LearnPruner or "weights" in given:
        return options
    found = weights_for(encoder_identity(vlm), weight_places(vlm.model.config.name_or_path))
    return replace(options, parameters=found | given)


def _check_method(vlm: Adapter, options: Options) -> None:
    """Refuse what no image could be answered with, whatever ``on_error`` says of single ones."""
    budget = None if options.average_tokens is None and options.retention is None else 1.0
    spec = options.spec_of(vlm.model.config.model_type, budget)
    check_encoder(spec, vlm)
    check = get_method(spec.stage1).check
    if check is not None:
        vlm.encoder_identity = encoder_identity(vlm)  # which planning asks again
        check(spec.config, vlm.encoder_identity)
    if spec.stage2 is not None:
        for layer in spec.stage2.layers or ():
            if not 1 <= layer < vlm.layers:
                raise CallError(
                    f"stage2: layer {layer} must lie in 1..{vlm.layers - 1}: the model has {vlm.layers} layers"
                )


class _Progress:
    """Tells how far a call is: a bar of tqdm's, which transformers brings along, or a function of the caller's."""

    def __init__(self, wanted: bool | Callable[[int, int], object], asked: int) -> None:
        self.tell = wanted if callable(wanted) else None
        self.done, self.asked, self.bar = 0, asked, None
        if wanted is True:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=asked, unit="answer")

    def one(self) -> None:
        self.done += 1
        if self.tell is not None:
            self.tell(self.done, self.asked)
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
