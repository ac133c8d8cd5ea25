"""Whatever the accelerators are asked they answer as the CPU does, and nothing stands on the wrong device."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import set_module_tensor_to_device
from pretended_device import Accelerator, Placed, on_device
from transformers import PreTrainedModel

from nuwa import generate
from nuwa.methods import RECIPES, specify
from nuwa.positions import STRATEGIES
from nuwa.stage1 import get_method
from nuwa.stage1.learnpruner import Lpm, save_lpm
from nuwa.stage2 import SCORERS
from nuwa.vlm import Adapter, adapt
from pipelines.features.store import FeatureStore
from pipelines.profiling import MethodTimer, WorkloadSize
from pipelines.settings import SweepSettings
from pipelines.sweep.answers import Words, answer_unit, read_encoded
from pipelines.sweep.trials import Layouts, expand
from pipelines.sweep.units import UnitExample, WorkUnit

FAMILIES = ["tiny_vlm", "tiny_next", "tiny_qwen"]
NEEDS_RESIZING = {"downsample"}
NEEDS_CLS = {name for name in RECIPES if get_method(RECIPES[name].stage1).reads_cls}
NEEDS_TEXT_TOWER = {"cdpruner"}
REFUSED = {
    "tiny_vlm": NEEDS_TEXT_TOWER,
    "tiny_next": NEEDS_TEXT_TOWER | NEEDS_RESIZING,
    "tiny_qwen": NEEDS_TEXT_TOWER | NEEDS_RESIZING | NEEDS_CLS,
}
# What a method does with an image's signals is done of LLaVA-NeXT view by view: some that merge, draw, cut and cut often
# show that; every one runs with a CLS token and, of those that can, without.
OF_VIEWS = {"unpruned", "nuwa", "pooling", "random", "fastv", "sparsevlm"}
EVERYWHERE = [
    (family, method)
    for family in FAMILIES
    for method in sorted((OF_VIEWS if family == "tiny_next" else RECIPES.keys()) - REFUSED[family])
]
QUESTIONS = [["what is on the left ?", "what is red"], ["where is the cat ?"]]
NEW_TOKENS = 2  # one of the pass over the prompt, one of a step
# The published ones ask for more layers than tiny models have.
DEPTHS = {name: {"layer": [1, 3, 5]} for name in ("sparsevlm", "sparsevlm_v2")}


def answers(vlm: Adapter, model: PreTrainedModel, photos, method: str, **options):
    if method in DEPTHS:
        options["stage2"] = DEPTHS[method]
    found = generate(
        model,
        vlm.processor,
        photos,
        QUESTIONS,
        method=method,
        retention=None if method == "unpruned" else 0.7,
        max_new_tokens=NEW_TOKENS,
        **options,
    )
    return [[(one.tokens, one.kept, one.kept_last) for one in mine] for mine in found]


@pytest.fixture(scope="session")
def photos(photos):
    """Two of one layout."""
    return photos[:6:5]


@functools.cache
def shared_on_device(model: PreTrainedModel) -> PreTrainedModel:
    """A copy on the first device for all tests that change nothing of it."""
    return on_device(model)


@pytest.fixture
def weights(tiny, tmp_path):
    """``parameters`` of a method on a family: a pruning module for its encoder where one is read."""

    def made(vlm: Adapter, method: str) -> dict[str, str]:
        if method != "learnpruner":
            return {}
        torch.manual_seed(1)
        path = tmp_path / "lpm.safetensors"
        save_lpm(Lpm(vlm.signal_widths(vlm.model.config)["features"]), path, vlm.encoder_identity, {})
        return {"weights": str(path)}

    return made


# --- one device


@pytest.mark.parametrize(("family", "method"), EVERYWHERE)
def test_every_method_answers_as_on_the_cpu(family, method, tiny, photos, weights):
    vlm = tiny(family)
    options = {"parameters": weights(vlm, method)}
    expected = answers(vlm, vlm.model, photos, method, **options)
    with Accelerator():
        assert answers(vlm, shared_on_device(vlm.model), photos, method, **options) == expected


# Methods above score by these on this family.
BY_METHODS = {
    RECIPES[method].stage2[""].scorer
    for family, method in EVERYWHERE
    if family == "tiny_qwen" and "" in RECIPES[method].stage2
}


@pytest.mark.parametrize(
    "options",
    [{"stage2": {"scorer": name}} for name in SCORERS if name not in BY_METHODS]
    + [{"position": name} for name in STRATEGIES],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_every_scorer_and_position_answers_as_on_the_cpu(options, tiny_qwen, photos):
    expected = answers(tiny_qwen, tiny_qwen.model, photos, "nuwa", **options)
    with Accelerator():
        assert answers(tiny_qwen, shared_on_device(tiny_qwen.model), photos, "nuwa", **options) == expected


# --- layers on two devices


def spread(model: PreTrainedModel, rotary: str) -> PreTrainedModel:
    """A copy as ``from_pretrained(..., device_map=...)`` leaves it: upper half, norm and head on the second device."""
    first, second = "pretended:0", "pretended:1"
    model, inside = copy.deepcopy(model), "model.language_model."
    layers = range(len(model.model.language_model.layers))
    places = {f"model.{name}": first for name, _ in model.model.named_children() if name != "language_model"}
    # LLaVA-NeXT's newline is in no module.
    places |= {f"model.{name}": first for name, _ in model.model.named_parameters(recurse=False)}
    places |= {f"{inside}layers.{layer}": first if layer < len(layers) // 2 else second for layer in layers}
    places |= {f"{inside}embed_tokens": first, f"{inside}norm": second, "lm_head": second}
    places[f"{inside}rotary_emb"] = rotary
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        (place,) = [place for part, place in places.items() if f"{name}.".startswith(f"{part}.")]
        set_module_tensor_to_device(model, name, place)
    return dispatch_model(model, places, main_device=first, skip_keys="past_key_values")


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match")  # they name parameters too
@pytest.mark.parametrize(
    ("family", "method", "rotary"),  # either place of the rotary tables with and without cuts
    [
        *((family, method, rotary) for family in FAMILIES for method, rotary in (("unpruned", 0), ("nuwa", 1))),
        ("tiny_vlm", "fastv", 0),
        ("tiny_next", "pyramiddrop", 1),
        ("tiny_qwen", "sparsevlm", 0),
    ],
)
def test_split_models_answer_as_on_the_cpu(family, method, rotary, tiny, photos):
    vlm = tiny(family)
    expected = answers(vlm, vlm.model, photos, method)
    with Accelerator():
        split = spread(vlm.model, f"pretended:{rotary}")
        assert {one.device.index for one in split.parameters()} == {0, 1}
        assert answers(vlm, split, photos, method) == expected


# --- the pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sweep_reads_signals_on_the_cpu_and_answers_on_the_device(family, tiny, photos, tmp_path):
    vlm = tiny(family)
    photos = dict(zip(["one", "two"], photos, strict=False))
    encoded = dict(zip(photos, vlm.encode_images(list(photos.values())), strict=True))
    layouts = Layouts.of([one.layout for one in encoded.values()], vlm.dynamic)
    methods = sorted({"nuwa", "fastv", "pooling", "downsample"} - REFUSED[family])
    settings = SweepSettings(
        benchmarks=["pope"],
        images=None,
        subset_seed=0,
        unit_images=2,
        budget_unit="share" if vlm.dynamic else "tokens",
        budgets=[0.7 if vlm.dynamic else 90],
        grids=[{"name": "all", "method": methods}],
    )
    trials = tuple(expand(settings, layouts, vlm.layers))
    examples = tuple(UnitExample(image, image, image, "what is red ?", NEW_TOKENS) for image in photos)

    def predictions(vlm: Adapter, folder):
        store = FeatureStore(folder, "store")
        for name, photo in photos.items():
            (one,) = (found.to("cpu", torch.float16) for found in vlm.encode_images([photo]))
            store.write([name], {key: value[None] for key, value in one.signals.items()}, one.layout)
        store.refresh()

        def again(names):
            return lambda grid: vlm.encode_resized([photos[name] for name in names], grid)

        groups = read_encoded(store, list(photos), vlm.encoder_identity, again if vlm.resizes else None)
        assert not any(isinstance(view.features, Placed) for group in groups for view in group.views)
        answered = answer_unit(vlm, groups, WorkUnit(trials, examples), Words(vlm))
        assert not answered.failed
        tables = answered.tables("unit")
        return tables["predictions"], tables["kept"]

    expected = predictions(vlm, tmp_path / "cpu")
    with Accelerator():
        assert predictions(adapt(on_device(vlm.model), vlm.processor), tmp_path / "device") == expected
    assert expected[0].num_rows == len(trials) * len(examples)


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_are_timed_on_the_device(family, tiny):
    vlm = adapt(on_device(tiny(family).model), tiny(family).processor)
    vlm.end_tokens = ()
    clock = None if family == FAMILIES[0] else lambda work: 0.0  # one by its own, which does all work once more
    with Accelerator():
        bench = MethodTimer(vlm, WorkloadSize(1, (64, 48), 3, 4, 2), 1, clock)
        rows = [bench.time_method(specify("nuwa", budget=0.8 * bench.layout.tokens)), bench.time_stock()]
    assert [row["method"] for row in rows] == ["nuwa", "stock generate"]
