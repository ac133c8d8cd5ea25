"""What the decoder and stage 1 need of a vision-language model, over a stock transformers class.

An adapter uses its model as it is: nothing is patched, hooked, subclassed or replaced, and no state is kept outside
it, so several adapters and plain ``generate`` may share a process and even a model.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from PIL import Image
from torch import Tensor

from nuwa.allowed import check_word
from nuwa.errors import UserError, in_one_line
from nuwa.grid import PatchGrid
from nuwa.image_rules import ImageRules
from nuwa.layout import VisualLayout
from nuwa.selection import Selection
from nuwa.signals import VIEW_SIGNALS, VisionSignals
from nuwa.vlm.checkpoint import CheckpointError, module_tensors
from nuwa.vlm.generation_settings import check_generation
from nuwa.vlm.language import TEXT_FAMILIES, TextModel
from nuwa.vlm.processors import load_processor
from nuwa.vlm.text_tower import TextTower
from nuwa.vlm.weights import check_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The system prompt by name of the conversation; ``template``: what the model's own chat template says.
CONVERSATIONS = {
    "template": None,
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llava_v1": (  # what Nüwa's authors ran LLaVA-NeXT with
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
    "qwen": "You are a helpful assistant.",  # what lmms-eval asks Qwen3-VL with, whose own template says nothing
}
AS_PUBLISHED = ImageRules()
ASPECT_RATIOS = ("processor", "pad")  # of images, see Adapter
# Left, top, width and height of what a view shows, as shares of the image's sides; padding reaches beyond 0 and 1.
Frame = tuple[float, float, float, float]
ENDS_THE_PROGRAM = (KeyboardInterrupt, SystemExit, MemoryError)  # says nothing of the file that was read
TEMPLATE_S = 10.0  # for a chat template to render two questions
WHOLE: Frame = (0.0, 0.0, 1.0, 1.0)


class PromptError(UserError, ValueError):
    """A question that the model cannot be asked; all others can."""


class UnavailableSignal(UserError, ValueError):
    """A signal that an encoder does not give, because it is too shallow or has no such thing."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids before and after the image placeholder; the part before is the same for every question.

    ``between``: of several images, those between a placeholder and the next.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    between: tuple[tuple[int, ...], ...] = ()

    @property
    def beginning(self) -> tuple[tuple[int, ...], ...]:
        """What questions share that are asked about the same images in one row."""
        return self.before, *self.between

    @classmethod
    def split(cls, ids: Sequence[int], placeholder: int) -> EncodedPrompt:
        """``ids`` taken apart at every ``placeholder``, of which there is one at least."""
        places = [number for number, token in enumerate(ids) if token == placeholder]
        between = tuple(tuple(ids[at + 1 : following]) for at, following in itertools.pairwise(places))
        return cls(tuple(ids[: places[0]]), tuple(ids[places[-1] + 1 :]), between)


@dataclass(frozen=True)
class EncodedImage:
    """What the encoder says of one image: everything that must be cached to answer without its pixels.

    ``signals``: the tensors of ``SIGNAL_NAMES``, and of ``OPTIONAL_SIGNALS`` those that were asked for, each with
    ``layout.patches`` tokens first, view behind view.
    """

    layout: VisualLayout
    signals: dict[str, Tensor]

    def to(self, *args: Any, **kwargs: Any) -> EncodedImage:
        """The same on another device or in another dtype, as ``torch.Tensor.to``."""
        return EncodedImage(self.layout, {name: value.to(*args, **kwargs) for name, value in self.signals.items()})


def view_signals(
    layout: VisualLayout,
    signals: Mapping[str, Tensor],
    image_ids: Sequence[str],
    *,
    resized: Callable[[PatchGrid], Tensor] | None = None,
    encoder: str | None = None,
    heads: int = 1,
    project: Callable[[Tensor], Tensor] | None = None,
) -> list[VisionSignals]:
    """Every view of several images of one layout, as stage 1 reads it; ``signals`` ``(images, layout.patches, ...)``.

    ``resized``, ``encoder``, ``heads``: see :class:`nuwa.signals.VisionSignals`.
    """
    counts = [view.grid.tokens for view in layout.views]
    parts: dict[str, Sequence[Tensor | None]] = {
        name: signals[name].split(counts, dim=1) if name in signals else [None] * len(counts) for name in VIEW_SIGNALS
    }
    of_views = []
    for number, view in enumerate(layout.views):
        # What is random must not draw alike in two views of an image.
        ids = tuple(f"{image} view {number}" if number else image for image in image_ids)
        own: dict[str, Any] = {name: parts[name][number] for name in VIEW_SIGNALS}
        of_views.append(
            VisionSignals(
                grid=view.grid,
                **own,
                image_ids=ids,
                encoder=encoder,
                resized=resized,
                heads=heads,
                deep=layout.deep,
                project=project,
            )
        )
    return of_views


class FromTransformers:
    """A class of transformers by its name, imported when it is first asked for: a model's takes seconds, and planning
    needs none."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        import transformers

        return getattr(transformers, self.name)


class Adapter(ABC):
    """One loaded model.

    ``offers_cls``: whether the encoder has a CLS token whose attention ranks patches. Where it has none,
    ``cls_attention`` of the signals is the attention a token receives, which only methods that say so may read.
    ``offers_last``: whether it gives ``last_attention`` and ``last_keys``.
    ``resizes``: whether images can be encoded at a smaller size (:meth:`encode_resized`).
    ``dynamic``: whether images differ in layout.
    ``alike``: whether an image among several of one question is encoded as it is alone; where it is not,
    :meth:`layout_among` and :meth:`encode_among` say how.
    ``joint``: what parts the placeholders of several images that stand before a text; null: what the checkpoint's
    template puts there.
    ``layout``: the layout of every image where all images have the same, else null.
    ``text``: the language model's layers and what they take (:mod:`nuwa.vlm.language`).
    ``turn``: one question about one image as the family's published chat template renders it, with the placeholders
    ``{system}`` and ``{text}`` and the word ``<image>``; ``usual_system``: what stands for ``{system}`` where no message
    says otherwise. They plan what no processor is at hand for (docs/adding_a_model_family.md).

    ``conversation``: a key of ``CONVERSATIONS``. ``image_aspect_ratio``: ``processor`` hands images to the processor as
    they are; ``pad`` first makes them square with bars of the processor's mean colour, as LLaVA-1.5's own code does. The
    processors of its published conversions cut the middle out instead. Only an encoder of square images (``pads``) asks.
    ``image_rules``: pixel limits and layout, which an adapter puts into a copy of the processor. ``text_tower``: a folder
    with the CLIP model that the encoder is a half of, for methods that read a question before the language model; only
    an encoder of CLIP's (``pairs_text``) has one. ``pass_tokens``: about how many tokens pass the language model's layers
    at once, which bounds memory; null: by device and width (:func:`nuwa.decoder.trunk.usual_pass_tokens`). It may be set
    at any time.
    """

    model_class: ClassVar[type[PreTrainedModel] | FromTransformers]
    language_name: ClassVar[str] = "language_model"  # what the stock class calls it
    encoder: ClassVar[str]  # what messages call it
    offers_cls: ClassVar[bool]
    offers_last: ClassVar[bool] = False
    resizes: ClassVar[bool] = False
    dynamic: ClassVar[bool] = True
    alike: ClassVar[bool] = True
    joint: ClassVar[str | None] = None
    pads: ClassVar[bool] = False
    pairs_text: ClassVar[bool] = False
    turn: ClassVar[str]
    usual_system: ClassVar[str] = ""
    layout: VisualLayout | None = None
    text_tower: TextTower | None = None
    pass_tokens: int | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        conversation: str = "template",
        image_aspect_ratio: str = "processor",
        image_rules: ImageRules = AS_PUBLISHED,
        text_tower: str | Path | None = None,
    ) -> None:
        check_framing(type(self), conversation, image_aspect_ratio)
        self.language = getattr(model.model, self.language_name)
        self.text = TextModel(self.language)
        check_generation(model.generation_config)
        self.model = model.eval()
        self.processor = _framed(processor, image_rules, model.config.model_type)
        self.image_token = model.config.image_token_id
        self.end_tokens = check_end_tokens(model.generation_config, model.config)
        self.repetition_penalty = float(model.generation_config.repetition_penalty or 1.0)
        self.image_aspect_ratio = image_aspect_ratio
        if text_tower is not None:
            self.text_tower = TextTower(text_tower)
        system = CONVERSATIONS[conversation]
        # Messages that stand before the first question.
        self.opening: list[dict[str, Any]] = (
            [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        attention: str = "sdpa",
        device_map: str | dict | None = None,
        **framing: Any,
    ) -> Self:
        """Model and processor from a folder or hub id, with plain ``from_pretrained``.

        ``attention``: ``sdpa``, ``eager``, or ``flash_attention_2`` where it is installed. ``device_map`` spreads the
        layers with Accelerate and replaces ``device``. ``framing``: ``conversation``, ``image_aspect_ratio``,
        ``image_rules`` and ``text_tower``.

        Raises :class:`nuwa.vlm.checkpoint.CheckpointError` where tensors of the model are not the checkpoint's.
        """
        model, report = cls.model_class.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            ignore_mismatched_sizes=True,  # told by the report, name by name
            output_loading_info=True,
        )

        check_report(path, report)
        model = model.requires_grad_(False)
        model = model if device_map is not None else model.to(device)
        rules: ImageRules = framing.get("image_rules", AS_PUBLISHED)
        return cls(model, load_processor(path, rules.backend), **framing)

    @property
    def device(self) -> torch.device:
        """Where token ids and masks are kept: the device of the word embeddings, offloaded or not."""
        hook = getattr(self.language.embed_tokens, "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        return torch.device(execution) if execution is not None else self.language.embed_tokens.weight.device

    @property
    def layers(self) -> int:
        return len(self.language.layers)

    @property
    def flash_attention(self) -> bool:
        """Whether the language model's kernels take key lengths instead of masks."""
        return "flash" in self.language.config._attn_implementation

    @property
    @abstractmethod
    def heads(self) -> int:
        """Attention heads of the vision encoder, into which its keys are split."""

    @classmethod
    @abstractmethod
    def layout_for(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> VisualLayout:
        """The layout of an image of ``size`` (width, height), from a model's configuration; nothing is encoded."""

    @classmethod
    @abstractmethod
    def signal_widths(cls, config: Any) -> dict[str, int]:
        """How many numbers each signal has a token."""

    @classmethod
    @abstractmethod
    def usual_image_processor(cls, config: Any) -> Any:
        """The family's image processor with its defaults, for a configuration beside which none was saved."""

    @classmethod
    def seen_size(cls, config: Any, image_processor: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height in pixels of the picture on which the model tells boxes, of an image of ``size``."""
        return size

    @classmethod
    def view_frames(cls, config: Any, layout: VisualLayout, size: tuple[int, int]) -> tuple[Frame, ...]:
        """Where each view's grid lies on an image of ``size`` that has ``layout``."""
        return (WHOLE,) * len(layout.views)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Refuse a configuration whose mathematics the adapter does not know, with a ``UserError`` that says what."""
        TEXT_FAMILIES.look_up(config.text_config.model_type)

    def layout_of(self, size: tuple[int, int]) -> VisualLayout:
        """The layout of an image of ``size`` (width, height)."""
        return self.layout_for(self.model.config, self.processor.image_processor, size)

    @abstractmethod
    def encode_images(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        """Preprocess and encode; images may differ in size and, where the model allows it, in layout.

        ``further``: names of ``OPTIONAL_SIGNALS`` that are wanted beside the usual ones. Raises
        :class:`UnavailableSignal` for one that this encoder does not give.
        """

    def layout_among(self, size: tuple[int, int]) -> VisualLayout:
        """The layout of an image of ``size`` (width, height) that is one of several in a question."""
        return self.layout_of(size)

    def encode_among(self, images: Sequence[Image.Image], further: Collection[str] = ()) -> list[EncodedImage]:
        """As :meth:`encode_images`, of images each of which is one of several in a question, in whichever."""
        return self.encode_images(images, further)

    def encode_resized(self, images: Sequence[Image.Image], grid: PatchGrid) -> Tensor:
        """Features of images made smaller so that they have ``grid``, ``(batch, grid.tokens, dim)``."""
        raise NotImplementedError(f"{self.encoder} encodes images at their own size only")

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """Encoder features ``(batch, kept, vision_dim)`` → language embeddings ``(batch, kept, dim)``."""

    def embed_visual(self, selection: Selection, layout: VisualLayout) -> Tensor:
        """Language embeddings of a selection over slots, ``(batch, kept, dim)``; where the layout has ``deep`` vectors,
        those stand behind them: ``(batch, kept, (1 + deep) * dim)``."""
        if selection.projected:
            return selection.features.to(self.device, self.language.embed_tokens.weight.dtype)
        return self.project(selection.features)

    @torch.inference_mode()
    def read_questions(self, views: Sequence[VisionSignals], questions: Sequence[Sequence[str]]) -> list[VisionSignals]:
        """Signals of every view of some images, made a row a question: with its ``relevance`` to each token.

        ``questions``: of each image. What belongs to the image alone is computed once for all of them. Raises
        :class:`nuwa.vlm.text_tower.TextTowerError` where the text tower is not the encoder's.
        """
        if self.text_tower is None:
            raise ValueError("there is no text tower: name one as text_tower")
        tower = self.text_tower.loaded(self.encoder_modules["tower"].state_dict(), self.device)
        owners = [row for row, about_image in enumerate(questions) for _ in about_image]
        texts = [text for about_image in questions for text in about_image]
        by_question = []
        for view in views:
            relevance = tower.relevance(tower.patches(view.features)[owners], texts)
            rows = view.with_derived(("projected",)).at(owners)
            by_question.append(dataclasses.replace(rows, relevance=relevance.to(view.features.device)))
        return by_question

    def encode_prompt(self, text: str, images: int = 1) -> EncodedPrompt:
        """The model's own chat template around ``text`` and so many images before it, split at the image placeholders.

        Raises :class:`PromptError` where ``text`` holds a placeholder of its own, ``ValueError`` where the template hides
        the conversation's system prompt, :class:`nuwa.vlm.checkpoint.CheckpointError` where it shows no image.
        """
        full = render_question(self.processor, text, self.opening, 1 if self.joint is not None else images)
        if self.joint is not None and images > 1:
            placeholder = self.processor.tokenizer.convert_ids_to_tokens(self.image_token)
            full = full.replace(placeholder, self.joint.join([placeholder] * images), 1)
        for message in self.opening:
            (system,) = message["content"]
            if system["text"] not in full:
                raise ValueError("the model's chat template shows no system prompt: use conversation 'template'")
        ids = tokenize_prompt(self.processor.tokenizer, self.prompt_text(full))

        if ids.count(self.image_token) != images:
            if self.image_token in self.processor.tokenizer(text, add_special_tokens=False).input_ids:
                raise PromptError(
                    f"the question {_shortened(text)!r} holds the model's image placeholder; reword it or take it out"
                )
            check_template(self.processor, self.image_token)
            if images > 1:
                raise PromptError(f"the model's chat template does not show {images} images; ask about one at a time")
        return EncodedPrompt.split(ids, self.image_token)

    def prompt_text(self, rendered: str) -> str:
        """What is tokenized of a rendered chat: with what the processor puts around an image, where it does."""
        return rendered

    def image_ids(self, layout: VisualLayout) -> list[int]:
        """What the processor writes for an image, ``layout.tokens`` token ids."""
        return [self.image_token] * layout.tokens

    def decode_text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @property
    @abstractmethod
    def encoder_modules(self) -> dict[str, torch.nn.Module]:
        """The parts of the model that decide the signals, by name."""

    @property
    @abstractmethod
    def encoder_settings(self) -> list[Any]:
        """What decides the signals beside weights and preprocessing: layers read and averaged."""

    def encoder_fingerprint(self, stored: Mapping[str, Tensor] | None = None) -> str:
        """Digest of what decides the signals: encoder weights, layers read and image preprocessing.

        It ties weights that were trained on an encoder to that encoder. ``stored``: tensors by canonical name
        (:class:`nuwa.vlm.checkpoint.StoredTensors`), for an adapter whose model is a shape without weights.
        """
        preprocessing = self.processor.image_processor.to_dict()
        digest = hashlib.sha256(json.dumps(preprocessing, sort_keys=True, default=str).encode())
        digest.update(json.dumps(self.encoder_settings).encode())
        for name, module in self.encoder_modules.items():
            digest.update(name.encode())
            state = module.state_dict() if stored is None else module_tensors(self.model, module, stored)
            _digest_weights(digest, state)
        return digest.hexdigest()

    @functools.cached_property
    def encoder_identity(self) -> str:
        """The encoder's fingerprint when it was first needed: to read all weights for every batch would be slow."""
        return self.encoder_fingerprint()

    def fingerprint(self) -> str:
        """Digest of all weights and of the prompt format."""
        digest = hashlib.sha256(self.encoder_identity.encode())
        digest.update(json.dumps(self.encode_prompt("?").__dict__).encode())
        _digest_weights(digest, self.model.state_dict())
        return digest.hexdigest()


def check_framing(family: type[Adapter], conversation: str, image_aspect_ratio: str) -> None:
    """Raises ``ValueError`` that names the argument and what is allowed for models of ``family``."""
    check_word("conversation", conversation, CONVERSATIONS)
    allowed = ASPECT_RATIOS if family.pads else ASPECT_RATIOS[:1]
    if image_aspect_ratio not in allowed:
        raise ValueError(
            f"image_aspect_ratio {image_aspect_ratio!r} is not for {family.encoder}; allowed: {', '.join(allowed)}"
        )


def _framed(processor: Any, rules: ImageRules, model_type: str) -> Any:
    """``processor``, or a copy of it where ``rules`` change how images are prepared."""
    image_processor = rules.framed(processor.image_processor, model_type)
    if image_processor is processor.image_processor:
        return processor
    framed = copy.copy(processor)
    framed.image_processor = image_processor
    return framed


def _digest_weights(digest: Any, state: dict[str, Tensor]) -> None:
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())


def render_question(processor: Any, text: str, opening: Sequence[dict[str, Any]] = (), images: int = 1) -> str:
    """The chat template around ``images`` and ``text``, up to where the answer begins; ``opening``: messages before."""
    turn = {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}
    return processor.apply_chat_template([*opening, turn], add_generation_prompt=True, tokenize=False)


def tokenize_prompt(tokenizer: Any, rendered: str) -> list[int]:
    """Token ids of a rendered chat, as transformers' ``apply_chat_template(tokenize=True)`` makes them: a template that
    writes the token of the beginning itself gets no second one."""
    return tokenizer(rendered, add_special_tokens=not writes_beginning(tokenizer, rendered)).input_ids


def writes_beginning(tokenizer: Any, rendered: str) -> bool:
    """Whether a rendered chat starts with the token of the beginning."""
    beginning = getattr(tokenizer, "bos_token", None)
    return rendered.startswith(beginning) if beginning else False


def check_template(processor: Any, image_token: int) -> None:
    """Refuse a processor whose chat template does not put one image and the question into a prompt.

    Raises :class:`nuwa.vlm.checkpoint.CheckpointError`: no template, one that fails, or one that shows no image.
    """
    if getattr(processor, "chat_template", None) is None:
        raise CheckpointError(
            "the model's processor has no chat template; fetch chat_template.jinja (or chat_template.json) of the "
            "checkpoint"
        )
    questions = ("what is on the left?", "what is on the right?")
    try:
        with _within(TEMPLATE_S):
            rendered, other = (render_question(processor, question) for question in questions)
    except Exception as error:  # whatever a template raises
        reason = in_one_line(error)
        raise CheckpointError(f"the model's chat template fails ({reason}); fetch it again") from None
    try:
        ids, others = (tokenize_prompt(processor.tokenizer, one) for one in (rendered, other))
    except BaseException as error:  # a panic of tokenizers', which is written in Rust, is no Exception
        if isinstance(error, ENDS_THE_PROGRAM):
            raise
        reason = in_one_line(error)
        raise CheckpointError(f"the model's tokenizer fails ({reason}); fetch tokenizer.json again") from None

    if (count := ids.count(image_token)) != 1:
        shown = "no image placeholder" if count == 0 else f"{count} image placeholders"
        raise CheckpointError(
            f"the model's chat template puts {shown} (token {image_token} of config.json) into {_shortened(rendered)!r}; "
            "fetch the template and the tokenizer of the checkpoint"
        )
    if rendered == other:
        raise CheckpointError("the model's chat template does not show the question; fetch it again")
    at = ids.index(image_token)
    if ids[: at + 1] != others[: at + 1] or at + 1 == len(ids):
        raise CheckpointError(
            f"the model's chat template puts the question before the image ({_shortened(rendered)!r}), and answers are made "
            "of images with their questions behind them; fetch the template of the checkpoint"
        )


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` in Python code that runs inside for longer: a template's loops are such code."""
    end, before = time.monotonic() + seconds, sys.gettrace()

    def look(_frame: Any, _event: str, _argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"not done after {seconds:g} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def check_end_tokens(settings: Any, config: Any) -> tuple[int, ...]:
    """The tokens that end an answer, from generation settings or else the language model's configuration.

    Raises :class:`nuwa.vlm.checkpoint.CheckpointError` where neither names one.
    """
    for end in (settings.eos_token_id, getattr(config.text_config, "eos_token_id", None)):
        tokens = tuple(end) if isinstance(end, (list, tuple)) else (end,)
        if end is not None and tokens:
            return tokens
    raise CheckpointError(
        "the model has no token that ends an answer; name it as eos_token_id in generation_config.json"
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"
