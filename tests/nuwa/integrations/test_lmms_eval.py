"""The model of lmms-eval, by the interface of its abstract base class; where lmms-eval is installed, by the class itself.

docs/lmms_eval.md has what whole runs of the harness said.
"""

from __future__ import annotations

import abc
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from forked import begin
from PIL import Image

import nuwa

torch.set_num_threads(1)
TASK, SPLIT, GREEDY = "digits", "test", {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "top_p": 1.0}
TESTBED = Path(__file__).parents[3] / "models/testbed"
QUESTIONS = ["what digit is blue?", "how many digits are there?", "locate the red 3 on the left"]


class Interface(abc.ABC):
    """What lmms-eval 0.7 asks of a model: ``lmms_eval.api.model.lmms``."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *kept: self.kept.append(kept))
        self.kept: list[Any] = []

    @property
    def rank(self) -> int:
        return self._rank

    @abc.abstractmethod
    def loglikelihood(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until(self, requests: Any) -> Any: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: Any) -> Any: ...


@dataclass
class Request:
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def plugin():
    """The plug-in's module."""
    if importlib.util.find_spec("lmms_eval") is not None:
        yield importlib.import_module("nuwa.integrations.lmms_eval")
        return
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules["lmms_eval.api.model"].lmms = Interface
    yield importlib.import_module("nuwa.integrations.lmms_eval")
    for name in (*names, "nuwa.integrations.lmms_eval"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def pictures(scenes):
    return [Image.fromarray(scene.image) for scene in scenes[:3]]


def built(plugin, **given):
    return plugin.Nuwa(**{"pretrained": str(TESTBED), "device": "cpu", "batch_size": "2", **given})


@pytest.fixture(scope="module")
def pruned(plugin):
    return built(plugin, method="nuwa", average_tokens=16)


def requests_of(model, documents, settings=GREEDY):
    """A request a document, ``(images, text)``."""
    model.task_dict = {TASK: {SPLIT: documents}}
    asked = [settings] * len(documents) if isinstance(settings, dict) else settings
    return [
        Request((text, dict(asked[number]), lambda document: document[0], number, TASK, SPLIT))
        for number, (_, text) in enumerate(documents)
    ]


def test_the_harness_finds_the_model_by_its_name():
    (entry,) = importlib.metadata.entry_points(group="lmms_eval.models", name="nuwa") or [None]
    written = (TESTBED.parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nnuwa = "nuwa.integrations:lmms_eval_manifest"' in written
    assert entry is None or entry.value == "nuwa.integrations:lmms_eval_manifest"


def test_answers_are_those_of_the_library_call_in_the_order_of_the_requests(pruned, pictures):
    documents = [([pictures[row % 3]], QUESTIONS[row % 2]) for row in range(5)]
    settings = [GREEDY, {**GREEDY, "max_new_tokens": 2}, GREEDY, GREEDY, GREEDY]
    found = pruned.generate_until(requests_of(pruned, documents, settings))
    model = pruned.vlm
    expected = [
        nuwa.generate(
            model.model, model.processor, image, text, average_tokens=16, max_new_tokens=asked["max_new_tokens"]
        ).text
        for ((image,), text), asked in zip(documents, settings, strict=True)
    ]
    assert found == expected and len(set(found)) > 2


def test_the_placeholder_of_a_task_is_where_the_image_goes(pruned, pictures):
    plain, placed = [([pictures[0]], QUESTIONS[0])], [([pictures[0]], f"<image>\n{QUESTIONS[0]}")]
    assert pruned.generate_until(requests_of(pruned, placed)) == pruned.generate_until(requests_of(pruned, plain))


def test_several_images_stand_where_the_text_says_or_before_it(pruned, pictures):
    documents = [
        (pictures[:2], QUESTIONS[0]),
        (pictures[:2], f"<image><image>{QUESTIONS[0]}"),
        (pictures[:2], f"<image>\n{QUESTIONS[1]} <image>"),
    ]
    before, placed, between = pruned.generate_until(requests_of(pruned, documents))
    image, words = {"type": "image"}, {"type": "text", "text": QUESTIONS[1]}
    model = pruned.vlm
    (expected,) = nuwa.generate(
        model.model,
        model.processor,
        [pictures[:2]],
        [[{"role": "user", "content": [image, words, image]}]],
        average_tokens=16,
        max_new_tokens=GREEDY["max_new_tokens"],
    )
    assert before == placed and between == expected.text and before != between


def test_images_that_look_otherwise_among_others_do_so_here(plugin, tiny_onevision, photos, monkeypatch):
    vlm = tiny_onevision
    monkeypatch.setattr(plugin, "load_adapter", lambda *_, **__: vlm)
    model = built(plugin, method="unpruned")
    documents = [(photos[:2], "<image> is red <image> is blue ?"), (photos[:1], "how many ?")]
    found = model.generate_until(requests_of(model, documents))

    texts = [["image", "is red", "image", "is blue ?"], ["image", "how many ?"]]
    for (images, _), parts, answer in zip(documents, texts, found, strict=True):
        content = [{"type": "image"} if part == "image" else {"type": "text", "text": part} for part in parts]
        message = [{"role": "user", "content": content}]
        prompt = vlm.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        inputs = vlm.processor(images=[images], text=[prompt], return_tensors="pt")
        out = vlm.model.generate(**inputs, max_new_tokens=GREEDY["max_new_tokens"], do_sample=False)
        assert answer == vlm.decode_text(out[0, inputs["input_ids"].shape[1] :].tolist()) != ""


def test_answers_end_where_the_task_says(pruned, pictures):
    documents = [([pictures[0]], QUESTIONS[2])]
    (whole,) = pruned.generate_until(requests_of(pruned, documents))
    (cut,) = pruned.generate_until(requests_of(pruned, documents, {**GREEDY, "until": [whole[2:4], "\n\n"]}))
    assert cut == whole[: whole.index(whole[2:4])] and 0 < len(cut) < len(whole)
    (cut,) = pruned.generate_until(requests_of(pruned, documents, {**GREEDY, "until": whole[1]}))
    assert cut == whole[: whole.index(whole[1])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.7}, "generation_kwargs: temperature=0.7 is not done; nuwa decodes greedily: 0"),
        ({"do_sample": True}, "generation_kwargs: do_sample=True is not done; nuwa decodes greedily: False"),
        ({"num_beams": 3}, "generation_kwargs: num_beams=3 is not done; nuwa decodes greedily: 1"),
        (
            {"length_penalty": 2},
            "generation_kwargs: length_penalty=2 is not known; allowed: max_new_tokens, until, do_sample, temperature, "
            "num_beams, num_return_sequences, top_p, top_k",
        ),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of 1 or more"),
    ],
)
def test_settings_that_are_not_obeyed_are_refused_by_name(pruned, pictures, settings, message):
    documents = [([pictures[0]], QUESTIONS[0])] * 2
    with pytest.raises(ValueError) as caught:
        pruned.generate_until(requests_of(pruned, documents, [{**GREEDY, **settings}, GREEDY]))
    assert str(caught.value) == message


def test_documents_that_cannot_be_asked_are_named(pruned, pictures):
    for images, text, message in (
        ([], "?", "task digits, document 0 shows no image; nuwa answers about images: leave the task out"),
        (["film.mp4"], "?", "task digits, document 0 shows a str, no image; leave the task out"),
        (
            pictures[:1],
            "<image> or <image>?",
            "task digits, document 0 names 2 places for 1 image; leave the task out",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            pruned.generate_until(requests_of(pruned, [(images, text)]))
        assert str(caught.value) == message
    unread = [([pictures[0]], "?"), ([Image.new("I", (8, 8))], "?")]
    with pytest.raises(ValueError) as caught:
        pruned.generate_until(requests_of(pruned, unread))
    assert str(caught.value).startswith("task digits, document 1: ") and "no agreed white" in str(caught.value)
    for other in (pruned.loglikelihood, pruned.generate_until_multi_round):
        with pytest.raises(ValueError, match=r"^nuwa .*: choose tasks of output_type generate_until$"):
            other([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 3}, "model_args: max_new_tokens is not the model's to set; use --batch_size or --gen_kwargs"),
        ({"batch_size": "auto"}, "--batch_size auto must be a whole number"),
        ({"dtype": "half a byte"}, "dtype=half a byte is none of torch's; give auto, float32, bfloat16 or float16"),
        ({"average_tokens": None}, "method 'nuwa' needs average_tokens or retention, one of the two"),
        ({"stage2": {"layers": 3}}, "stage2: key 'layers' is unknown; allowed: layer, ratio, recycling, scorer; did you mean 'layer'?"),
    ],
)  # fmt: skip
def test_wrong_model_args_are_refused_before_the_weights_are_read(plugin, given, message):
    with pytest.raises(ValueError) as caught:
        built(plugin, **{"method": "nuwa", "average_tokens": 16, **given})
    assert str(caught.value) == message


def answer_a_share(plugin, documents, port: int, process: int, found: Path) -> None:
    """One of two processes, as a launcher begins it: the documents that are dealt to it, gathered as the harness does."""
    places = {"RANK": process, "LOCAL_RANK": process, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process this is a copy of

    model = built(plugin, method="nuwa", average_tokens=16, device=None)
    assert (model.rank, model._world_size, model.device.type) == (process, 2, "cpu")
    dealt = range(process, len(documents), 2)
    answers = model.generate_until([requests_of(model, documents)[number] for number in dealt])
    gathered: list[Any] = [None, None]
    torch.distributed.all_gather_object(gathered, list(zip(dealt, answers, strict=True)))
    with pytest.raises(ValueError) as caught:
        built(plugin, method="nuwa", average_tokens=16, device_map="auto")
    if process == 0:
        found.write_text(json.dumps({"answers": gathered, "refused": str(caught.value)}))


def test_two_processes_answer_their_shares_as_one_answers_all(plugin, pruned, pictures, tmp_path):
    documents = [([pictures[row % 3]], QUESTIONS[row % 2]) for row in range(5)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    found = tmp_path / "gathered.json"
    started = [
        begin(functools.partial(answer_a_share, plugin, documents, port, process, found)) for process in range(2)
    ]
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started] == [0, 0]

    said = json.loads(found.read_text())
    answers = [tuple(one) for share in said["answers"] for one in share]
    assert len(answers) == len(documents) == len(dict(answers)), "each once"
    assert [text for _, text in sorted(answers)] == pruned.generate_until(requests_of(pruned, documents))
    assert said["refused"] == (
        "model_args: device_map=auto spreads one model, and 2 processes have a model each; leave it out, or start one process"
    )
