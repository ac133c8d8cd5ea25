"""What is remembered of a model folder is what the real objects say, as long as files and libraries are the same."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, GenerationConfig

from nuwa.vlm import ADAPTERS, CheckpointError, LlavaAdapter, adapter_class, load_adapter
from nuwa.vlm import remembered as memories
from nuwa.vlm.processors import load_processor
from nuwa.vlm.remembered import FolderMemory, RememberedSettings, class_name, folder_memory

TESTBED = Path(__file__).parents[2] / "models/testbed"
QUESTION = "which digit is left of the red 7?"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TESTBED, tmp_path / "model"))


@pytest.fixture
def again(folder, tmp_path):
    """The memory of ``folder`` as another process finds it."""

    def open_memory() -> FolderMemory:
        memories._folder_memory.cache_clear()
        return folder_memory(folder, tmp_path / "memory")

    return open_memory


def forbid(*_: object, **__: object) -> None:
    raise AssertionError("the real object was made")


def same(remembered: RememberedSettings, real: object) -> int:
    """How many plain values agree; every one of the real settings must."""
    count = 0
    for name in dir(real):
        value = getattr(real, name, None)
        if name.startswith("__") or callable(value):
            continue
        if hasattr(value, "model_type"):
            count += same(getattr(remembered, name), value)
        elif value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)):
            assert getattr(remembered, name, None) == value, name
            count += 1
    return count


def test_settings_are_those_that_transformers_resolves(family, tmp_path):
    family.model.save_pretrained(tmp_path / "model")
    memory = FolderMemory(tmp_path / "model", "1", tmp_path / "memory")
    memory.config(), memory.generation()
    known = FolderMemory(tmp_path / "model", "1", tmp_path / "memory")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert same(known.config(), config) > 60
    assert known.config().get_text_config().hidden_size == config.get_text_config().hidden_size
    assert known.config().text_config.get_text_config().model_type == config.text_config.model_type
    assert same(known.generation(), GenerationConfig.from_pretrained(tmp_path / "model")) > 30


def test_what_is_known_is_answered_without_the_real_objects(folder, again, monkeypatch):
    first = again()
    assert first.faults(adapter_class) == []
    asked = LlavaAdapter(first.outline(LlavaAdapter), first.processor()).encode_prompt(QUESTION)
    first.generation(), first.save()
    for name in ("folder_faults", "load_processor", "generation_settings", "_empty"):
        monkeypatch.setattr(memories, name, forbid)
    monkeypatch.setattr(AutoConfig, "from_pretrained", forbid)
    known = again()
    vlm = LlavaAdapter(known.outline(LlavaAdapter), known.processor())
    assert known.faults(adapter_class) == [] and vlm.encode_prompt(QUESTION) == asked
    assert vlm.layers == 8 and vlm.grid.tokens == 144
    with pytest.raises(AssertionError, match="the real object was made"):
        vlm.encode_prompt("another question?")
    with pytest.raises(AttributeError, match="these settings have no 'sliding'"):
        known.config().text_config.sliding  # noqa: B018 (raises)


def test_an_outline_plans_as_the_loaded_model(folder, again):
    loaded, memory = load_adapter(folder), again()
    for _ in range(2):
        vlm = LlavaAdapter(memory.outline(LlavaAdapter), memory.processor())
        assert vlm.encode_prompt(QUESTION) == loaded.encode_prompt(QUESTION)
        assert (vlm.layers, vlm.layout, vlm.end_tokens, vlm.text.kinds) == (
            *(loaded.layers, loaded.layout, loaded.end_tokens, loaded.text.kinds),
        )
        assert class_name(vlm.processor.image_processor) == class_name(load_processor(folder).image_processor)
        assert vlm.processor.image_processor.to_dict() == loaded.processor.image_processor.to_dict()
        assert vlm.model.lm_head.weight.is_meta and vlm.tower.config.hidden_size == loaded.tower.config.hidden_size
        memory.save()
        memory = again()


def test_other_files_or_libraries_are_looked_at_anew(folder, again, monkeypatch):
    assert again().faults(adapter_class) == [] and again()._known["whole"]
    path = folder / "generation_config.json"
    whole, found = path.read_text(), path.stat()
    path.write_text(whole)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert "whole" not in again()._known
    again().faults(adapter_class)
    monkeypatch.setattr(memories, "_version", lambda name: "6.0")
    assert "whole" not in again()._known
    monkeypatch.undo()
    assert again()._known["whole"]
    path.write_text(json.dumps(json.loads(whole) | {"num_beams": 3}))
    (fault,) = again().faults(adapter_class)
    assert "num_beams = 3" in fault and "whole" not in again()._known
    path.write_text("{")
    with pytest.raises(CheckpointError, match="no valid JSON"):
        again().generation()


def test_only_the_folder_itself_is_looked_through(folder, again):
    """A user may name any folder, with a whole disk below it; links to nothing and into other people's are no fault here."""
    assert again().faults(adapter_class) == []
    (folder / "checkpoint-10/deeper").mkdir(parents=True)
    (folder / "checkpoint-10/model.safetensors").write_bytes(b"x")
    assert again()._known["whole"]
    (folder / "more.json").symlink_to(folder / "nowhere")
    assert "whole" not in again()._known
    (folder / "additional_chat_templates").mkdir()
    before = memories._stamp(folder)
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    assert memories._stamp(folder) != before


def test_a_plug_ins_family_is_looked_at_every_time(folder, again, monkeypatch):
    own = type("OwnAdapter", (LlavaAdapter,), {"__module__": "somebody.family"})
    monkeypatch.setattr(ADAPTERS, "_entries", dict(ADAPTERS) | {"llava": own})
    assert again().faults(adapter_class) == [] and "whole" not in again()._known


def test_a_damaged_memory_or_one_that_cannot_be_kept_is_none(folder, again, tmp_path):
    assert again().faults(adapter_class) == []
    (memo,) = (tmp_path / "memory").iterdir()
    for content in ("{", "[]", "{}"):
        memo.write_text(content)
        assert "whole" not in again()._known
    shutil.rmtree(tmp_path / "memory")
    (tmp_path / "memory").write_text("a file in the way")
    assert again().faults(adapter_class) == []


def test_texts_of_other_runs_go_where_there_are_too_many(folder, again, monkeypatch):
    first = again()
    vlm = LlavaAdapter(first.outline(LlavaAdapter), first.processor())
    for number in range(5):
        vlm.encode_prompt(f"{number}?")
    first.save()
    monkeypatch.setattr(memories, "TEXTS", 3)
    monkeypatch.setattr(memories.RememberedTexts, "asked", set())
    second = again()
    LlavaAdapter(second.outline(LlavaAdapter), second.processor()).encode_prompt("4?")
    second.save()
    assert len(again()._known["processors"]["pil"]["tokens"]) == 1
