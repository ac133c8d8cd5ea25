"""``params.yaml`` as typed, validated settings.

Everything is checked before any work starts: unknown keys, types, ranges, names, budgets no schedule can reach. An
error is one line: the key, the value, what is allowed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import fsspec
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nuwa import UNPRUNED
from nuwa.methods import RECIPES, MethodSpec, specify
from nuwa.positions import PositionStrategy
from nuwa.signals import SIGNAL_NAMES
from pipelines.storage import ARROW_SCHEMES, is_uri
from pipelines.tables import BenchmarkName, hub_address

PARAMS_FILE = Path("params.yaml")
SCENES = "scenes"  # pruner.data
TESTBED_TASKS = ("refcoco", "refcocoplus", "refcocog", "pope", "gqa", "textvqa")
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Budget = Annotated[float, Field(gt=0)]
BudgetUnit = Literal["tokens", "share"]


def _of_a_known_scheme(place: str) -> str:
    if is_uri(place) and place.partition("://")[0] not in {*ARROW_SCHEMES, *fsspec.available_protocols()}:
        raise ValueError(
            f"{place!r} is of an unknown scheme; allowed: a folder, {', '.join(ARROW_SCHEMES)}, or a scheme of fsspec"
        )
    return place


Place = Annotated[str, Field(min_length=1), AfterValidator(_of_a_known_scheme)]


def budget_tokens(budget: float, unit: BudgetUnit, tokens: int) -> float:
    """A budget in average tokens, of images of ``tokens`` tokens; of shares the nearest whole number."""
    return float(round(budget * tokens)) if unit == "share" else budget


class SettingsError(ValueError):
    """A wrong ``params.yaml``; the message is one line a user can act on."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSettings(Section):
    """``path``: a folder or hub id ``from_pretrained`` loads. ``prompt_style``: see ``nuwa.benchmarks.STYLES``.

    ``conversation``, ``image_aspect_ratio``: see :class:`nuwa.vlm.Adapter`. ``dtype``: of the weights. ``attention``:
    the kernel of the language model; flash-attention needs half precision.
    """

    path: Annotated[str, Field(min_length=1)]
    prompt_style: Literal["llava_v1", "testbed"]
    conversation: Literal["template", "vicuna_v1"] = "template"
    image_aspect_ratio: Literal["processor", "pad"] = "processor"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"

    @model_validator(mode="after")
    def _flash_attention_in_half_precision(self) -> ModelSettings:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 needs dtype bfloat16 or float16, not float32")
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
    """The testbed's benchmark: ``images`` test scenes, each asked ``questions`` per benchmark, all from ``seed``.

    ``tables``, where given, are published tables instead: a benchmark's name, with split and variant
    (``refcoco/testA``, ``textvqa/validation:ocr``), and its folder or ``hub:organisation/dataset[/folder]@commit``.
    """

    seed: Seed
    images: Positive
    questions: dict[str, Positive]
    tables: dict[str, str] | None = None

    @property
    def names(self) -> list[str]:
        return list(self.questions if self.tables is None else self.tables)


class PhaseSettings(Section):
    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]


class TestbedSettings(Section):
    """How the testbed's model is trained. ``compile``: fuse layers with a C++ compiler (faster on a CPU)."""

    seed: Seed
    compile: bool
    vision: PhaseSettings
    language: PhaseSettings


class PrunerSettings(Section):
    """How LearnPruner's module is trained, on ``share`` of the training images; see ``nuwa.pruner.learner``.

    ``data``: ``scenes``, of which there are ``images`` (the testbed), or a file of instruction data as LLaVA publishes it,
    whose image paths begin in ``images_folder`` (null: the file's own) and whose sequences have at most ``max_tokens``.
    ``keep_share``: tokens that stay, as a share: of every image (``topk_ste``) or on average (``ratio_penalty``).
    ``recompute``: less memory for more time, with the same result.
    """

    seed: Seed
    data: Annotated[str, Field(min_length=1)] = SCENES
    images: Positive
    images_folder: Annotated[str, Field(min_length=1)] | None = None
    max_tokens: Positive = 2048
    share: Annotated[float, Field(gt=0, le=1)]
    sparsity: Literal["topk_ste", "ratio_penalty"]
    keep_share: Annotated[float, Field(gt=0, lt=1)]
    penalty_weight: Annotated[float, Field(gt=0)]
    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    recompute: bool = False

    @model_validator(mode="after")
    def _scenes_have_no_folder(self) -> PrunerSettings:
        if self.data == SCENES and self.images_folder is not None:
            raise ValueError(f"images_folder {self.images_folder!r} belongs to instruction data; data is {SCENES}")
        return self


def _place(name: str) -> int:
    """Signals in the order of ``SIGNAL_NAMES``; unknown ones last, to be refused."""
    return SIGNAL_NAMES.index(name) if name in SIGNAL_NAMES else len(SIGNAL_NAMES)


class FeatureSettings(Section):
    """``dtype`` of cached signals (``cls_attention``: always float32), images in a shard, images in a forward pass.

    ``keep``: the signals that are cached (``nuwa.signals``); a method that reads another one is refused.

    ``store``: where features are kept, a folder or a storage URI such as ``s3://bucket/features``; null: ``cache/``.
    """

    dtype: Literal["float16", "float32"]
    shard_images: Positive
    batch_size: Positive
    keep: tuple[Literal["features", "cls_attention", "keys", "similarity"], ...] = SIGNAL_NAMES
    store: Place | None = None

    @field_validator("keep", mode="before")
    @classmethod
    def _in_one_order(cls, names: Any) -> Any:
        if isinstance(names, list) and "features" not in names:
            raise ValueError("keep must hold features, which every method reads")
        return tuple(sorted(set(names), key=_place)) if isinstance(names, list) else names


class ClusterSettings(Section):
    """``address``: null runs on this machine, ``auto`` or ``host:port`` joins a Ray cluster; RAY_ADDRESS wins.

    ``workers``: actors, each holding one model on ``cpus`` CPUs (its thread count) and ``gpus`` GPUs.
    """

    address: str | None
    workers: Positive
    cpus: Positive
    gpus: Annotated[float, Field(ge=0)]

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


class GridEntry(Section):
    """One block of trials: every list is an axis, and the block is the product of its axes.

    ``budget`` defaults to ``sweep.budgets``. ``stage2_layer: off`` leaves stage 2 out; a list within the list, as in
    ``[[2, 4, 6]]``, is several cuts of one trial. ``parameters`` are the stage-1 method's own. ``where_reachable`` drops budgets the schedule cannot reach instead of refusing them.
    """

    name: str
    method: str | list[str]
    preset: str | list[str] | None = None
    position: PositionStrategy | list[PositionStrategy] = "pesp"
    budget: Budget | list[Budget] | None = None
    stage2_layer: int | Literal["off"] | list[int | Literal["off"] | list[int]] | None = None
    stage2_scorer: str | list[str] | None = None
    stage2_ratio: float | list[float] | None = None
    stage2_recycling: bool | list[bool] | None = None
    seed: Seed | list[Seed] = 0
    parameters: dict[str, Any] = Field(default_factory=dict)
    where_reachable: bool = False

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        """YAML 1.1 reads a bare ``off`` as False; here it is the word."""
        if isinstance(values, dict) and "stage2_layer" in values:
            layer = values["stage2_layer"]
            mend = lambda value: "off" if value is False else value  # noqa: E731
            values = {**values, "stage2_layer": [mend(v) for v in layer] if isinstance(layer, list) else mend(layer)}
        return values


class SweepSettings(Section):
    """``images``: how many of the test images are used, a seeded subset (null: all). ``unit_images``: images a work
    unit covers at most. ``store``: where answers are kept, a folder or a storage URI such as ``s3://bucket/results``;
    null: ``cache/``. ``quarantine``: whether trials with answers that cannot be made stop the pipeline or are left out.
    ``budget_unit``: budgets are average tokens, or shares of each image's own tokens.
    """

    benchmarks: Annotated[list[str], Field(min_length=1)]
    images: Positive | None
    subset_seed: Seed
    unit_images: Positive
    store: Place | None = None
    quarantine: Literal["refuse", "allow"] = "refuse"
    budget_unit: BudgetUnit = "tokens"
    budgets: Annotated[list[Budget], Field(min_length=1)]
    grids: Annotated[list[GridEntry], Field(min_length=1)]

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
        for entry in self.grids:
            for method in entry.method if isinstance(entry.method, list) else [entry.method]:
                if method not in RECIPES:
                    raise ValueError(
                        f"method {method!r} of grid {entry.name!r} is unknown; allowed: {', '.join(sorted(RECIPES))}"
                    )
            above = [budget for budget in _budgets(entry, self.budgets) if budget > 1]
            if self.budget_unit == "share" and above:
                raise ValueError(f"budget {above[0]:g} of grid {entry.name!r} must lie in (0, 1]: budget_unit is share")
        return self


class EvaluateSettings(Section):
    """Bootstrap over images: ``resamples`` draws from ``seed``."""

    resamples: Annotated[int, Field(ge=100)]
    seed: Seed


class ProfileSettings(Section):
    """What the ``profile`` stage times: every method at every share of the image's tokens, per batch and kernel.

    ``models``: folders or hub ids, whose weights are not needed. ``image_size``: width and height in pixels.
    """

    models: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    batch: Annotated[list[Positive], Field(min_length=1)]
    attention: Annotated[list[Literal["sdpa", "eager", "flash_attention_2"]], Field(min_length=1)]
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["cpu", "cuda"]
    threads: Positive
    image_size: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    text_before: Positive
    text_after: Positive
    output_tokens: Annotated[int, Field(ge=2)]
    repeats: Positive

    @model_validator(mode="after")
    def _methods_exist(self) -> ProfileSettings:
        for method in self.methods:
            if method not in RECIPES or method == UNPRUNED:
                known = ", ".join(sorted(set(RECIPES) - {UNPRUNED}))
                raise ValueError(f"methods: {method!r} is unknown; allowed: {known} (unpruned is always timed)")
        if "flash_attention_2" in self.attention and self.dtype == "float32":
            raise ValueError("attention flash_attention_2 needs dtype bfloat16 or float16, not float32")
        return self


class AxisSettings(Section):
    """Values a search may take for one hyper-parameter: a list of choices, or a range.

    A range whose ends are both whole numbers is searched in whole numbers. ``log``: evenly in orders of magnitude.
    """

    choices: list[Any] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

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
    """What a swarm search varies: ``parameters`` of the stage-1 method by name, and stage 2's."""

    parameters: dict[str, AxisSettings] = Field(default_factory=dict)
    stage2_layer: AxisSettings | None = None
    stage2_scorer: AxisSettings | None = None
    stage2_ratio: AxisSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _off_is_a_word(cls, values: Any) -> Any:
        """As in a grid, a bare ``off`` among the layers is the word."""
        if isinstance(values, dict) and isinstance(layers := values.get("stage2_layer"), list):
            values = {**values, "stage2_layer": ["off" if layer is False else layer for layer in layers]}
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
    """A search over one method's hyper-parameters at one budget: ``trials`` of them, ``batch`` at a time.

    ``objective``: the mean retention that is maximised, of one family or (``mean``) of all with equal weight.
    """

    method: str
    preset: str | None = None
    position: PositionStrategy = "pesp"
    budget: Budget
    objective: Literal["mean", "grounding", "vqa"]
    trials: Positive
    batch: Positive
    space: SpaceSettings

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
    ``confidence``: see :mod:`pipelines.racing`. ``cost``: the column of ``trials.parquet`` by which trials cost more or
    less.
    """

    seed: Seed
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    confidence: Annotated[float, Field(ge=0.5, lt=1)]
    cost: Literal["average_tokens", "flops"]
    swarm: SwarmSettings | None

    @model_validator(mode="after")
    def _shares_rise_to_everything(self) -> SearchSettings:
        if self.shares != sorted(set(self.shares)) or self.shares[-1] != 1:
            raise ValueError(f"shares {self.shares} must rise and end with 1.0, all of the images")
        return self


class ReportSettings(Section):
    headline_budget: Budget


class TrackingSettings(Section):
    """MLflow: ``uri`` null is a local SQLite file; MLFLOW_TRACKING_URI wins."""

    uri: str | None
    experiment: str

    @property
    def resolved_uri(self) -> str | None:
        return os.environ.get("MLFLOW_TRACKING_URI") or self.uri


class Settings(Section):
    model: ModelSettings
    prepare: PrepareSettings
    testbed: TestbedSettings
    pruner: PrunerSettings
    features: FeatureSettings
    cluster: ClusterSettings
    sweep: SweepSettings
    evaluate: EvaluateSettings
    profile: ProfileSettings
    search: SearchSettings
    report: ReportSettings
    tracking: TrackingSettings

    @model_validator(mode="after")
    def _sections_agree(self) -> Settings:
        asked, prepared = self.sweep, self.prepare
        for text in prepared.questions:
            name = BenchmarkName.parse(text)
            if name.table not in TESTBED_TASKS:
                raise ValueError(f"prepare.questions: {text!r} is unknown; allowed: {', '.join(TESTBED_TASKS)}")
            _known(f"prepare.questions: {text!r}", name)
        for text, location in (prepared.tables or {}).items():
            _known(f"prepare.tables: {text!r}", BenchmarkName.parse(text))
            try:
                hub_address(location)
            except ValueError as error:
                raise ValueError(f"prepare.tables.{text}: {error}") from None
        key = "prepare.questions" if prepared.tables is None else "prepare.tables"
        for text in asked.benchmarks:
            if text not in prepared.names:
                raise ValueError(f"sweep.benchmarks: {text!r} is not in {key}; add it there")
        if prepared.tables is None and asked.images is not None and asked.images > prepared.images:
            raise ValueError(f"sweep.images = {asked.images}: prepare.images makes {prepared.images}")
        budgets = {budget for entry in asked.grids for budget in _budgets(entry, asked.budgets)}
        if self.report.headline_budget not in budgets:
            known = ", ".join(f"{budget:g}" for budget in sorted(budgets))
            raise ValueError(
                f"report.headline_budget = {self.report.headline_budget:g} is swept by no grid; swept: {known}"
            )
        swarm = self.search.swarm
        if swarm is not None and asked.budget_unit == "share" and swarm.budget > 1:
            raise ValueError(f"search.swarm.budget = {swarm.budget:g} must lie in (0, 1]: sweep.budget_unit is share")
        rungs, outside = len(self.search.shares) - 1, 1 - self.search.confidence
        if self.evaluate.resamples * outside < rungs:
            raise ValueError(
                f"search.confidence = {self.search.confidence:g} over {rungs} rungs needs evaluate.resamples of at least "
                f"{math.ceil(rungs / outside - 1e-6)}, not {self.evaluate.resamples}"
            )
        return self


def _known(where: str, name: BenchmarkName) -> None:
    try:
        name.benchmark()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _budgets(entry: GridEntry, usual: list[float]) -> list[float]:
    chosen = entry.budget if entry.budget is not None else usual
    return chosen if isinstance(chosen, list) else [chosen]


def _line(error: dict[str, Any]) -> str:
    """One validation error as one line: key, value, what is allowed."""
    key = (
        ".".join(str(part) for part in error["loc"] if not str(part).startswith(("list[", "function-", "literal[")))
        or "params"
    )
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; see docs/params.md for the keys that exist"
    if error["type"] == "missing":
        return f"{key}: missing; see docs/params.md for its meaning"
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # sections that do not agree: the message names its own key
        return message
    return f"{key}: {message}" if error["type"] == "value_error" else f"{key} = {error['input']!r}: {message}"


def load_settings(path: Path = PARAMS_FILE) -> Settings:
    """Read and validate ``path``; raises :class:`SettingsError` with one line that names the first fault."""
    if not path.exists():
        raise SettingsError(f"{path}: no such file; run from the repository's top folder")
    return parse_settings(path.read_text(), str(path))


def parse_settings(text: str, source: str) -> Settings:
    """Validate the text of a ``params.yaml``; ``source`` names it in the error."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise SettingsError(f"{source}: must hold a mapping of sections: {', '.join(Settings.model_fields)}")
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(f"{source}: {_line(error.errors()[0])}") from None
