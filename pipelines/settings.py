"""``params.yaml`` as typed, validated settings.

Everything is checked before any work starts: unknown keys, types, ranges, names, budgets no schedule can reach. An
error is one line: the key, the value, what is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import fsspec
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from nuwa import UNPRUNED
from nuwa.allowed import check_share
from nuwa.benchmarks import PROTOCOLS, TESTBED
from nuwa.budget import BudgetUnit
from nuwa.errors import UserError
from nuwa.image_rules import ImageRules
from nuwa.methods import RECIPES, MethodSpec, specify
from nuwa.plugins import PluginError, load_plugins
from nuwa.positions import PositionName
from nuwa.registry import unknown
from nuwa.signals import OPTIONAL_SIGNALS, SIGNAL_NAMES, SignalName
from pipelines.addresses import BenchmarkName, hub_address, under_protocol
from pipelines.axes import AXES, Budget, Seed
from pipelines.files.storage import ARROW_SCHEMES, is_uri

PARAMS_FILE = Path("params.yaml")
SCENES = "scenes"  # pruner.data
MERGE = "tag:yaml.org,2002:merge"
DEEPEST, MOST_VALUES = 40, 100_000  # of a params.yaml: levels of nesting, and values when all aliases are written out
TOO_DEEP = f"nested more than {DEEPEST} levels deep, or an alias (*name) within what it names; write it out flat"
SHOWN = 200  # characters of a wrong value in a message
TESTBED_TASKS = ("refcoco", "refcocoplus", "refcocog", "pope", "gqa", "textvqa")
LARGEST = 2**31 - 1  # of a whole number: what counts images, tokens or steps anywhere below holds no more
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Reuse = Literal["any", "same_versions"]


def _of_a_known_scheme(place: str) -> str:
    if is_uri(place) and place.partition("://")[0] not in {*ARROW_SCHEMES, *fsspec.available_protocols()}:
        raise ValueError(
            f"{place!r} is of an unknown scheme; allowed: a folder, {', '.join(ARROW_SCHEMES)}, or a scheme of fsspec"
        )
    if is_uri(place) and not place.partition("://")[2].strip("/"):
        raise ValueError(f"{place!r} names no place; write it as {place.partition('://')[0]}://bucket/folder")
    if place.startswith("~"):
        raise ValueError(f"{place!r}: ~ is a shell's word for a home folder; write the folder out")
    return place


Place = Annotated[str, Field(min_length=1), AfterValidator(_of_a_known_scheme)]


class SettingsError(UserError, ValueError):
    """A wrong ``params.yaml``; the message is one line a user can act on."""

    exit_code = 2


def _check_kernels(attention: Sequence[str], dtype: str) -> None:
    if "flash_attention_2" in attention and dtype == "float32":
        raise ValueError("attention flash_attention_2 needs dtype bfloat16 or float16, not float32")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSettings(Section):
    """The model, and how it is handed images and text."""

    path: Annotated[str, Field(min_length=1)]
    """A folder or hub id that ``from_pretrained`` loads."""
    prompt_style: Literal["llava_v1", "testbed"]
    """In whose words benchmarks ask: ``nuwa.benchmarks.STYLES``."""
    conversation: Literal["template", "vicuna_v1", "llava_v1", "qwen"] = "template"
    """The system prompt: a key of ``nuwa.vlm.adapter.CONVERSATIONS``."""
    image_aspect_ratio: Literal["processor", "pad"] = "processor"
    """Whether images are made square with bars first; see :class:`nuwa.vlm.Adapter`."""
    image_rules: str | None = None
    """The protocol whose pixel limits and layouts hold; null: ``prepare.protocol``."""
    min_pixels: Positive | None = None
    """Of an image as Qwen2-VL, Qwen2.5-VL and Qwen3-VL see it, at least; null: what the protocol pins."""
    max_pixels: Positive | None = None
    """Likewise, at most."""
    image_grid: Literal["transformers", "llava"] | None = None
    """By whose rule LLaVA-NeXT's crops are laid where two grids fit alike; null: the protocol's."""
    image_backend: Literal["pil", "torchvision"] = "pil"
    """What resizes images (:mod:`nuwa.image_rules`)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The kernel of the language model; flash-attention needs half precision."""
    text_tower: Annotated[str, Field(min_length=1)] | None = None
    """A folder with the CLIP model that the encoder is a half of, for methods that read the question before the language
    model (CDPruner)."""
    pass_tokens: Positive | None = None
    """About how many tokens pass the language model's layers at once, which bounds memory beside weights and caches; null: by
    device and width (``nuwa.decoder.trunk.usual_pass_tokens``). Part of what answers are in half precision, not in float32."""

    @property
    def images(self) -> ImageRules:
        """How images are handed to the model."""
        protocol = self.image_rules or TESTBED
        return ImageRules(protocol, self.min_pixels, self.max_pixels, self.image_grid, self.image_backend)

    @field_validator("image_rules")
    @classmethod
    def _rules_exist(cls, name: str | None) -> str | None:
        if name is not None and name not in PROTOCOLS:
            raise ValueError(unknown("protocol", name, PROTOCOLS))
        return name

    @model_validator(mode="after")
    def _limits_are_a_range(self) -> ModelSettings:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} must not be above max_pixels {self.max_pixels}")
        return self

    @model_validator(mode="after")
    def _flash_attention_in_half_precision(self) -> ModelSettings:
        _check_kernels([self.attention], self.dtype)
        return self

    @model_validator(mode="after")
    def _the_testbed_has_its_own_words(self) -> ModelSettings:
        if self.prompt_style == "testbed" and self.conversation != "template":
            raise ValueError(
                f"conversation {self.conversation} is in words that prompt_style testbed's model does not know; allowed "
                "with it: template"
            )
        return self


class PrepareSettings(Section):
    """The questions there are: the testbed's, or published tables."""

    protocol: str = TESTBED
    """How benchmarks are asked and scored (``nuwa.benchmarks.protocols``); one that names its own
    (``refcoco/testA:pixels@vscan``) keeps it."""
    seed: Seed
    """Draws the testbed's scenes and questions."""
    images: Positive
    """The testbed's test scenes."""
    questions: dict[str, Positive]
    """How many questions each scene is asked, by benchmark."""
    tables: dict[str, str] | None = None
    """Published tables instead of the testbed: a benchmark's name, with split and variant (``refcoco/testA``,
    ``textvqa/validation:ocr``), and its folder or ``hub:organisation/dataset[/folder]@commit``."""

    @property
    def names(self) -> list[str]:
        return list(self.questions if self.tables is None else self.tables)


class PhaseSettings(Section):
    """One phase of a training."""

    steps: Positive
    """Optimiser steps."""
    batch_size: Positive
    """Examples a step, over all processes."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest, behind the warm-up."""


class TestbedSettings(Section):
    """How the testbed's model is trained."""

    seed: Seed
    """Of weights, scenes and their order."""
    compile: bool
    """Fuse layers with a C++ compiler: faster on a CPU."""
    vision: PhaseSettings
    """The vision tower, on its own heads."""
    language: PhaseSettings
    """Projector and language model, behind the frozen tower."""


class PrunerSettings(Section):
    """How LearnPruner's module is trained; see ``nuwa.pruner.learner``."""

    seed: Seed
    """Of weights, the share and the order."""
    data: Annotated[str, Field(min_length=1)] = SCENES
    """``scenes`` (the testbed's), or a file of instruction data as LLaVA publishes it."""
    images: Positive
    """How many scenes there are."""
    images_folder: Annotated[str, Field(min_length=1)] | None = None
    """Where the file's image paths begin; null: the file's own folder."""
    max_tokens: Positive = 2048
    """Of a sequence, image included, at most."""
    share: Annotated[float, Field(gt=0, le=1)]
    """Of the training images that are learned from."""
    sparsity: Literal["topk_ste", "ratio_penalty"]
    """How the number of tokens is held: the best of every image, or a penalty on the mean."""
    keep_share: Annotated[float, Field(gt=0, lt=1)]
    """Tokens that stay, as a share: of every image (``topk_ste``) or on average (``ratio_penalty``)."""
    penalty_weight: Annotated[float, Field(gt=0)]
    """Of the squared distance from ``keep_share``."""
    steps: Positive
    """Optimiser steps."""
    batch_size: Positive
    """Images a step, over all processes."""
    learning_rate: Annotated[float, Field(gt=0)]
    """The highest, behind the warm-up."""
    recompute: bool = False
    """Less memory for more time, with the same result."""

    @model_validator(mode="after")
    def _scenes_have_no_folder(self) -> PrunerSettings:
        if self.data == SCENES and self.images_folder is not None:
            raise ValueError(f"images_folder {self.images_folder!r} belongs to instruction data; data is {SCENES}")
        return self


def _place(name: str) -> int:
    """Signals in the order of ``SIGNAL_NAMES``; unknown ones last, to be refused."""
    known = (*SIGNAL_NAMES, *OPTIONAL_SIGNALS)
    return known.index(name) if name in known else len(known)


class FeatureSettings(Section):
    """What the encoder says of images, as it is stored."""

    dtype: Literal["float16", "float32"]
    """Of cached signals; ``cls_attention`` is always float32."""
    shard_images: Positive
    """Images in a file of the store."""
    batch_size: Positive
    """Images in a forward pass."""
    keep: tuple[SignalName, ...] = SIGNAL_NAMES
    """The signals that are cached (``nuwa.signals``); a method that reads another one is refused."""
    store: Place | None = None
    """Where features are kept, a folder or a storage URI such as ``s3://bucket/features``; null: ``cache/``."""

    @field_validator("keep", mode="before")
    @classmethod
    def _in_one_order(cls, names: Any) -> Any:
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return names  # refused as what it is
        if "features" not in names:
            raise ValueError("keep must hold features, which every method reads")
        return tuple(sorted(set(names), key=_place))


class ClusterSettings(Section):
    """Where workers run and how many; results do not depend on any of it."""

    address: str | None
    """Null runs on this machine, ``auto`` or ``host:port`` joins a Ray cluster; RAY_ADDRESS wins."""
    workers: Positive | Literal["auto"]
    """Actors, each holding one model; ``auto``: as many as the cluster holds or its autoscaler brings, now and later."""
    cpus: Positive
    """CPUs of a worker, and its thread count."""
    gpus: Annotated[float, Field(ge=0)]
    """GPUs of a worker: 0, 1/k or a whole number."""
    patience: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds to wait without any worker, as for machines that an autoscaler starts, before the run stops."""
    silence: Annotated[float, Field(gt=0)] = 900.0
    """Seconds a worker may be at a unit at least before it counts as hanging; longer where its cost forecasts so."""

    @model_validator(mode="after")
    def _whole_share_of_a_gpu(self) -> ClusterSettings:
        if self.gpus > 0 and not (self.gpus.is_integer() or (1 / self.gpus).is_integer()):
            raise ValueError(f"gpus {self.gpus} must be 0, a whole number or 1/k (0.5, 0.25, 0.2, ...)")
        return self

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def resolved_address(self) -> str | None:
        return os.environ.get("RAY_ADDRESS") or self.address


def _off(layer: Any) -> Any:
    """YAML 1.1 reads a bare ``off`` as False; among layers it is the word."""
    return "off" if layer is False else layer


class GridBlock(Section):
    """One block of trials: every list is an axis, and the block is the product of its axes (``pipelines.axes``)."""

    name: str
    """Of the grid; several blocks may carry one."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Axes of the stage-1 method's own hyper-parameters, and of its scorer's."""
    where_reachable: bool = False
    """Leave out budgets that the schedule cannot reach instead of refusing them."""

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        if isinstance(values, dict) and "stage2_layer" in values:
            layer = values["stage2_layer"]
            worded = [_off(one) for one in layer] if isinstance(layer, list) else _off(layer)
            values = {**values, "stage2_layer": worded}
        return values

    def axes(self, budgets: list[float]) -> dict[str, list[Any]]:
        """The values of every axis, in the order of ``AXES``; ``budgets``: where the block names none of its own."""
        values = {name: getattr(self, name) for name in AXES}
        if values["budget"] is None:
            values["budget"] = budgets
        return {name: value if isinstance(value, list) else [value] for name, value in values.items()}


if TYPE_CHECKING:

    class GridEntry(GridBlock):
        """:class:`GridBlock` with a field for every axis."""

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    GridEntry = create_model(
        "GridEntry", __base__=GridBlock, **{axis.name: (axis.annotation, axis.usual) for axis in AXES.values()}
    )


class SweepSettings(Section):
    """Which trials are asked which questions."""

    benchmarks: Annotated[list[str], Field(min_length=1)]
    """Names as in ``prepare``."""
    images: Positive | dict[str, Positive] | None
    """How many images of every benchmark are used, or how many by benchmark, the first of a seeded line; null: all."""
    subset_seed: Seed
    """Orders that line."""
    unit_images: Positive
    """Images a work unit covers at most."""
    store: Place | None = None
    """Where answers are kept, a folder or a storage URI such as ``s3://bucket/results``; null: ``cache/``."""
    quarantine: Literal["refuse", "allow"] = "refuse"
    """Whether trials with answers that cannot be made stop the pipeline or are left out."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """What a run may use, GPUs (without any: workers) times hours: then it begins no unit more and says what is missing;
    null: no limit."""
    finish_with: Annotated[float, Field(ge=0, lt=1)] | None = None
    """A run ends with what is there where at most this share of its answers is missing; scores are then over the
    questions that all compared trials have answered. Null: only with all."""
    reuse: Reuse = "any"
    """Whether stored answers of other versions of torch and transformers, or of another kind of device, are taken."""
    budget_unit: BudgetUnit = "tokens"
    """Budgets are average tokens, or shares of each image's own tokens."""
    budgets: Annotated[list[Budget], Field(min_length=1)]
    """Of blocks that name none."""
    grids: Annotated[list[GridEntry], Field(min_length=1)]
    """The blocks of trials."""

    @model_validator(mode="after")
    def _names_exist(self) -> SweepSettings:
        names = [BenchmarkName.parse(text) for text in self.benchmarks]
        tables = [name.table for name in names]
        for name in names:
            name.benchmark()
            if tables.count(name.table) > 1:
                raise ValueError(
                    f"benchmark {name.table!r} is named more than once; a sweep scores one variant of each"
                )

        for limited in self.images if isinstance(self.images, dict) else ():
            if limited not in self.benchmarks:
                raise ValueError(
                    f"images: {limited!r} is not in sweep.benchmarks; allowed: {', '.join(self.benchmarks)}"
                )

        for entry in self.grids:
            axes = entry.axes(self.budgets)
            for method in axes["method"]:
                if method not in RECIPES:
                    raise ValueError(
                        f"method {method!r} of grid {entry.name!r} is unknown; allowed: {', '.join(sorted(RECIPES))}"
                    )
            for budget in axes["budget"] if self.budget_unit == "share" else ():
                check_share(f"budget {budget:g} of grid {entry.name!r}", budget, "(0, 1]", ": budget_unit is share")
        return self


class AgainstSettings(Section):
    """The main trial of every budget that all others are held against."""

    method: str = "nuwa"
    """As in a grid."""
    preset: str | None = "released"
    """As in a grid; null is the first there is."""
    position: PositionName = "own"
    """Its position ids."""

    @model_validator(mode="after")
    def _method_exists(self) -> AgainstSettings:
        if self.method not in RECIPES:
            raise ValueError(unknown("method", self.method, RECIPES))
        return self


class PlannedSettings(Section):
    """A pair of main trials that is held apart from all others because it was named before the run."""

    trial: AgainstSettings
    """Whose retention."""
    less: AgainstSettings
    """What is taken off."""


class EvaluateSettings(Section):
    """Bootstrap over images."""

    resamples: Annotated[int, Field(ge=100)]
    """How many are drawn."""
    seed: Seed
    """Draws them."""
    grades: Annotated[str, Field(min_length=1)] | None = None
    """A file of grades for benchmarks that a judge scores, such as ``mmvet:judged`` (:mod:`pipelines.scores.grades`)."""
    against: AgainstSettings = AgainstSettings()
    """What every other main trial of a budget is compared with, pair by pair (:mod:`pipelines.scores.comparisons`)."""
    planned: list[PlannedSettings] = []
    """Pairs named before the run, at every budget that has both: each budget's are corrected with one another alone."""
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Of retention: a trial this near the unpruned model, surely, is called equivalent to it."""
    processes: Positive = 1
    """That score blocks of trials at once; no number depends on it."""


class ProfileSettings(Section):
    """What the ``profile`` stage times: every method at every share of the image's tokens, per batch and kernel."""

    models: Annotated[list[str], Field(min_length=1)]
    """Folders or hub ids, whose weights are not needed."""
    methods: Annotated[list[str], Field(min_length=1)]
    """Beside the unpruned model, which is always timed."""
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    """Budgets, of the image's tokens."""
    batch: Annotated[list[Positive], Field(min_length=1)]
    """Questions at once, each about an image of its own."""
    attention: Annotated[list[Literal["sdpa", "eager", "flash_attention_2"]], Field(min_length=1)]
    """Kernels of the language model."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the random weights."""
    device: Literal["cpu", "cuda"]
    """Where they are."""
    threads: Positive
    """Of a CPU."""
    image_size: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    """Width and height in pixels."""
    text_before: Positive
    """Tokens before the image."""
    text_after: Positive
    """Tokens behind it."""
    output_tokens: Annotated[int, Field(ge=2)]
    """Of every answer."""
    repeats: Positive
    """Of each measurement; the median counts."""

    @model_validator(mode="after")
    def _methods_exist(self) -> ProfileSettings:
        for method in self.methods:
            if method not in RECIPES or method == UNPRUNED:
                known = ", ".join(sorted(set(RECIPES) - {UNPRUNED}))
                raise ValueError(f"methods: {method!r} is unknown; allowed: {known} (unpruned is always timed)")
        _check_kernels(self.attention, self.dtype)
        return self


class AxisSettings(Section):
    """Values a search may take for one hyper-parameter: a list of choices, or a range.

    A range whose ends are both whole numbers is searched in whole numbers.
    """

    choices: list[Any] | None = None
    """Each may be taken; null among them is the method's own value."""
    low: int | float | None = None
    """The least of a range."""
    high: int | float | None = None
    """The largest of a range."""
    log: bool = False
    """Searched evenly in orders of magnitude."""

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_choices(cls, values: Any) -> Any:
        return {"choices": values} if isinstance(values, list) else values

    @model_validator(mode="after")
    def _holds_something(self) -> AxisSettings:
        if self.choices is not None:
            if not self.choices or self.low is not None or self.high is not None:
                raise ValueError("must be a list of at least one choice, or a range {low: ..., high: ...}")
            for choice in self.choices:
                if not isinstance(choice, bool | int | float | str | None):
                    raise ValueError(f"choice {choice!r} must be a number, a word, true, false or null")
        elif self.low is None or self.high is None:
            raise ValueError("a range needs both ends: {low: ..., high: ...}")
        elif self.low >= self.high:
            raise ValueError(f"low {self.low:g} must lie below high {self.high:g}")
        elif self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 on a logarithmic range")
        return self

    @property
    def extremes(self) -> list[Any]:
        """All choices, or both ends of the range."""
        return [self.low, self.high] if self.choices is None else self.choices


class SpaceSettings(Section):
    """What a swarm search varies."""

    parameters: dict[str, AxisSettings] = Field(default_factory=dict)
    """The stage-1 method's own, by name."""
    stage2_layer: AxisSettings | None = None
    """Before which layer stage 2 cuts; ``off``: nowhere."""
    stage2_scorer: AxisSettings | None = None
    """By what it cuts."""
    stage2_ratio: AxisSettings | None = None
    """What it keeps of what enters."""

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(layers := values.get("stage2_layer"), list):
            values = {**values, "stage2_layer": [_off(layer) for layer in layers]}
        return values

    @model_validator(mode="after")
    def _layers_are_numbers(self) -> SpaceSettings:
        for value in self.stage2_layer.extremes if self.stage2_layer else []:
            if value != "off" and type(value) is not int:
                raise ValueError(f"stage2_layer: {value!r} must be a whole number or off")
        return self

    @property
    def axes(self) -> dict[str, AxisSettings]:
        """Every axis by the key it has in a grid entry: ``stage2_layer``, ``parameters.pillar_quantile``."""
        stage2 = {name: getattr(self, name) for name in ("stage2_layer", "stage2_scorer", "stage2_ratio")}
        parameters = {f"parameters.{name}": axis for name, axis in self.parameters.items()}
        return {name: axis for name, axis in stage2.items() if axis is not None} | parameters


class SwarmSettings(Section):
    """A search over one method's hyper-parameters at one budget."""

    method: str
    """Whose they are."""
    preset: str | None = None
    """What is not searched; null: the method's first."""
    position: PositionName = "pesp"
    """As on a grid."""
    budget: Budget
    """As on a grid, one."""
    objective: Literal["mean", "grounding", "vqa"]
    """The mean retention that is maximised, of one family or (``mean``) of all with equal weight."""
    trials: Positive
    """Points that are tried."""
    batch: Positive
    """Points that are asked and run together."""
    space: SpaceSettings
    """What is varied."""

    @model_validator(mode="after")
    def _every_value_is_allowed(self) -> SwarmSettings:
        """Each value by itself beside the preset; whether the model's layers reach the budget is for later."""
        if not self.space.axes:
            raise ValueError("space: it has no axis; name parameters, stage2_layer, stage2_scorer or stage2_ratio")
        self.specify({})
        for name, axis in self.space.axes.items():
            for value in axis.extremes:
                try:
                    self.specify({name: value})
                except (ValueError, TypeError) as error:
                    raise ValueError(f"space.{name}: {error}") from None
        return self

    def specify(self, point: Mapping[str, Any]) -> MethodSpec:
        """The method at ``point`` of the space, keyed as :attr:`SpaceSettings.axes`; raises ``ValueError``."""
        stage2 = {name: point.get(f"stage2_{name}") for name in ("layer", "scorer", "ratio")}
        parts = {name.partition(".")[2]: value for name, value in point.items() if name.startswith("parameters.")}
        return specify(
            self.method,
            preset=self.preset,
            position=self.position,
            budget=self.budget,
            without_stage2=stage2["layer"] == "off",
            stage2={name: value for name, value in stage2.items() if value is not None},
            parameters=parts,
        )


class SearchSettings(Section):
    """``make search``: the sweep's trials race on growing shares of its images.

    ``seed`` orders the images and seeds the swarm search. ``shares`` of the images are the rungs, the last is all.
    ``confidence``: see :mod:`pipelines.search.racing`. ``cost``: the column of ``trials.parquet`` by which trials cost more or
    less.
    """

    seed: Seed
    """Orders the images of a race, and seeds the sampler of a swarm search."""
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    """Of the sweep's images, rising to 1.0: after each but the last, trials that are beaten stop."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    """With which a trial that nothing cheaper beats in some family stays in the race, at least."""
    cost: Literal["average_tokens", "flops"]
    """What a rival may not exceed, as a mean over the images."""
    swarm: SwarmSettings | None
    """Hyper-parameters to search; null: only the race."""

    @model_validator(mode="after")
    def _shares_rise_to_everything(self) -> SearchSettings:
        if self.shares != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise ValueError(f"shares {self.shares} must rise and end with 1.0, all of the images")
        return self


class ReportSettings(Section):
    """What the page leads with."""

    headline_budget: Budget
    """Of the finding and the headline table."""


class TrackingSettings(Section):
    """MLflow."""

    uri: str | None
    """Null is a local SQLite file; MLFLOW_TRACKING_URI wins."""
    experiment: str
    """Under which name runs stand."""

    @property
    def resolved_uri(self) -> str | None:
        return os.environ.get("MLFLOW_TRACKING_URI") or self.uri


def _renamed(names: Any, protocol: str) -> Any:
    """The benchmarks' names with their protocol; what is no list or mapping of names is for the fields to refuse."""
    if isinstance(names, dict):
        return {under_protocol(name, protocol) if isinstance(name, str) else name: of for name, of in names.items()}
    if isinstance(names, list):
        return [under_protocol(name, protocol) if isinstance(name, str) else name for name in names]
    return names


class Settings(Section):
    """All of ``params.yaml``."""

    model: ModelSettings
    """What is asked."""
    prepare: PrepareSettings
    """Which questions there are."""
    testbed: TestbedSettings
    """How the testbed's model is trained."""
    pruner: PrunerSettings
    """How LearnPruner's module is trained."""
    features: FeatureSettings
    """How the encoder's signals are stored."""
    cluster: ClusterSettings
    """Where workers run."""
    sweep: SweepSettings
    """Which trials there are."""
    evaluate: EvaluateSettings
    """How sure scores are."""
    profile: ProfileSettings
    """What is timed."""
    search: SearchSettings
    """What is searched."""
    report: ReportSettings
    """What the page leads with."""
    tracking: TrackingSettings
    """Where runs are logged."""
    plugins: list[Annotated[str, Field(pattern=r"^\w+(\.\w+)*$")]] = []
    """Modules that register methods, scorers or benchmarks (:mod:`nuwa.plugins`)."""

    @model_validator(mode="before")
    @classmethod
    def _names_carry_their_protocol(cls, values: Any) -> Any:
        """What is prepared, asked and scored goes by the name that says how: ``gqa/testdev@lmms_eval``."""
        prepare, sweep = (
            (values.get(part) for part in ("prepare", "sweep")) if isinstance(values, dict) else (None, None)
        )
        if not isinstance(prepare, dict) or not isinstance(sweep, dict):
            return values
        protocol = prepare.get("protocol", TESTBED)
        if not isinstance(protocol, str):
            return values
        if protocol not in PROTOCOLS:
            raise ValueError(f"prepare.protocol: {unknown('protocol', protocol, PROTOCOLS)}")

        model = values.get("model")
        if isinstance(model, dict) and model.get("image_rules") is None and protocol != TESTBED:
            values = values | {"model": model | {"image_rules": protocol}}

        swept = {key: _renamed(sweep.get(key), protocol) for key in ("benchmarks", "images")}
        prepared = {key: _renamed(prepare[key], protocol) for key in ("tables", "questions") if key in prepare}
        if prepare.get("tables") is not None:
            prepared.pop("questions", None)  # the testbed's are not asked
        return values | {"prepare": prepare | prepared, "sweep": sweep | swept}

    @model_validator(mode="after")
    def _protocols_have_words(self) -> Settings:
        if self.model.prompt_style == "testbed":
            for text in self.prepare.names:
                if (protocol := BenchmarkName.parse(text).protocol) != TESTBED:
                    raise ValueError(
                        f"prepare.protocol: {protocol!r} is in words that prompt_style testbed's model does not know; "
                        f"allowed with it: {TESTBED}"
                    )
        return self

    @model_validator(mode="after")
    def _boxes_are_read_one_way(self) -> Settings:
        variants = {name.benchmark().variant: text for text in self.sweep.benchmarks
                    if (name := BenchmarkName.parse(text)).benchmark().family == "grounding"}  # fmt: skip
        if {"as_published", "unpadded"} <= set(variants):
            raise ValueError(
                f"sweep.benchmarks: {variants['as_published']!r} reads boxes as_published and {variants['unpadded']!r} "
                "unpadded; one table holds one of the two"
            )
        return self

    @model_validator(mode="after")
    def _servers_score_apart(self) -> Settings:
        """What only a server scores has no retention, so it stands in no table beside what is scored here."""
        names = self.sweep.benchmarks
        served = [text for text in names if BenchmarkName.parse(text).benchmark().submission is not None]
        if served and len(served) < len(names):
            here = next(text for text in names if text not in served)
            raise ValueError(
                f"sweep.benchmarks: the answers to {served[0]!r} are with its server and {here!r} is scored here; "
                "sweep them apart"
            )
        return self

    @model_validator(mode="after")
    def _what_is_prepared_exists(self) -> Settings:
        for text in self.prepare.questions:
            name = BenchmarkName.parse(text)
            if name.table not in TESTBED_TASKS:
                raise ValueError(f"prepare.questions: {text!r} is unknown; allowed: {', '.join(TESTBED_TASKS)}")
            _known(f"prepare.questions: {text!r}", name)

        for text, location in (self.prepare.tables or {}).items():
            _known(f"prepare.tables: {text!r}", BenchmarkName.parse(text))
            try:
                hub_address(location)
            except ValueError as error:
                raise ValueError(f"prepare.tables.{text}: {error}") from None
        return self

    @model_validator(mode="after")
    def _what_is_swept_is_prepared(self) -> Settings:
        sweep, prepared = self.sweep, self.prepare
        key = "prepare.questions" if prepared.tables is None else "prepare.tables"
        for text in sweep.benchmarks:
            if text not in prepared.names:
                raise ValueError(f"sweep.benchmarks: {text!r} is not in {key}; add it there")

        images = sweep.images.values() if isinstance(sweep.images, dict) else [sweep.images or 0]
        if prepared.tables is None and max(images) > prepared.images:
            raise ValueError(f"sweep.images = {max(images)}: prepare.images makes {prepared.images}")
        return self

    @model_validator(mode="after")
    def _budgets_agree(self) -> Settings:
        sweep, swarm = self.sweep, self.search.swarm
        budgets = {budget for entry in sweep.grids for budget in entry.axes(sweep.budgets)["budget"]}
        if self.report.headline_budget not in budgets:
            known = ", ".join(f"{budget:g}" for budget in sorted(budgets))
            raise ValueError(
                f"report.headline_budget = {self.report.headline_budget:g} is swept by no grid; swept: {known}"
            )

        if swarm is not None and sweep.budget_unit == "share":
            check_share(
                f"search.swarm.budget = {swarm.budget:g}", swarm.budget, "(0, 1]", ": sweep.budget_unit is share"
            )
        return self

    @model_validator(mode="after")
    def _resamples_tell_such_confidence(self) -> Settings:
        """Rungs share the risk; a rung's share of it must come to one resample at least."""
        rungs, risk = len(self.search.shares) - 1, 1 - self.search.confidence
        if self.evaluate.resamples * risk < rungs:
            raise ValueError(
                f"search.confidence = {self.search.confidence:g} over {rungs} rungs needs evaluate.resamples of at least "
                f"{math.ceil(rungs / risk - 1e-6)}, not {self.evaluate.resamples}"
            )
        return self


def _known(where: str, name: BenchmarkName) -> None:
    try:
        name.benchmark()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _line(error: Mapping[str, Any]) -> str:
    """One validation error as one line: key, value, what is allowed."""
    key = ".".join(str(part) for part in error["loc"] if not _is_alternative(part)) or "params"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; see docs/params.md for the keys that exist"
    if error["type"] == "missing":
        return f"{key}: missing; see docs/params.md for its meaning"
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # sections that do not agree: the message names its own key
        return message
    if error["type"] == "value_error":
        return f"{key}: {message}"
    shown = repr(error["input"])
    return f"{key} = {shown if len(shown) <= SHOWN else f'{shown[:SHOWN]}…'}: {message}"


def load_settings(path: Path = PARAMS_FILE) -> Settings:
    """Read and validate ``path``; raises :class:`SettingsError` with one line that names the first fault."""
    if not path.exists():
        raise SettingsError(f"{path}: no such file; run from the repository's top folder")
    if not (path.is_file() or path.is_dir()):
        raise SettingsError(f"{path}: no file but a pipe or a device; put the settings there")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: no text in UTF-8 (byte {error.start}); save it as UTF-8") from None
    return parse_settings(text, str(path))


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses what that one passes over or fails on without a place."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Refuses a key that stands there twice, of which the last would silently count."""
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise SettingsError(
                    f"line {line}: {key.value} stands there twice, first in line {first[key.value]}; leave out one of the two"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Names the value that is none of its type, such as a date of a thirteenth month."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, OverflowError):
            kind = node.tag.rpartition(":")[2]
            shown = str(node.value)[:SHOWN]
            raise yaml.constructor.ConstructorError(None, None, f"{shown!r} is no {kind}", node.start_mark) from None


def _check_extent(raw: Any) -> None:
    """Refuse what cannot be settings: aliases that multiply or contain themselves, characters that no name may hold."""
    waiting, seen = [(raw, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST:
            raise SettingsError(TOO_DEEP)
        if seen > MOST_VALUES:
            raise SettingsError(f"holds more than {MOST_VALUES:,} values; write out what aliases (*name) repeat")
        if isinstance(value, str) and "\0" in value:
            raise SettingsError(f"{value[:SHOWN]!r} holds a NUL character; take it out")
        if isinstance(value, (dict, list)):
            waiting += [(one, depth + 1) for one in (value.values() if isinstance(value, dict) else value)]


def read_yaml(text: str, source: str) -> Any:
    """The plain values of ``text``, none of which was passed over; raises :class:`SettingsError`, which names ``source``."""
    try:
        raw = yaml.load(text, _Loader)
        _check_extent(raw)
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SettingsError(f"{source}: {TOO_DEEP}") from None
    return raw


def parse_settings(text: str, source: str) -> Settings:
    """Validate the text of a ``params.yaml``; ``source`` names it in the error."""
    raw = read_yaml(text, source)
    if isinstance(raw, dict) and isinstance(raw.get("plugins", []), list):
        try:  # before any name is looked up; those of entry points whether any is named or not
            load_plugins(str(name) for name in raw.get("plugins", []))
        except PluginError as error:
            raise SettingsError(f"{source}: {error}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{source}: must hold a mapping of sections: {', '.join(Settings.model_fields)}")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_line(_most_telling(error.errors()))}") from None


def _most_telling(errors: Sequence[Any]) -> Any:
    """The first error; of a value that no alternative of its type fits, the one that got furthest into it."""
    key = tuple(part for part in errors[0]["loc"] if not _is_alternative(part))
    alike = [
        one for one in errors if tuple(part for part in one["loc"] if not _is_alternative(part))[: len(key)] == key
    ]
    return max(alike, key=lambda one: len([part for part in one["loc"] if not _is_alternative(part)]))


def _is_alternative(part: Any) -> bool:
    """Whether a step of a location names an alternative of a type rather than a key."""
    return str(part).startswith(("list[", "dict[", "function-", "literal[", "constrained-"))


def asked(model: ModelSettings, sweep: SweepSettings) -> dict[str, str]:
    """What a sweep asks, as parameters of its MLflow run: model, numbers, protocols, budgets, grids."""
    protocols = dict.fromkeys(BenchmarkName.parse(text).protocol for text in sweep.benchmarks)
    return {
        "model": model.path,
        "dtype": model.dtype,
        "attention": model.attention,
        "protocol": ", ".join(protocols),
        "budgets": f"{', '.join(f'{budget:g}' for budget in sweep.budgets)} ({sweep.budget_unit})",
        "grids": ", ".join(dict.fromkeys(grid.name for grid in sweep.grids)),
    }
