"""What lies where only params.yaml knows is digested, cheaply, and DVC runs again just what reads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import run_here

from nuwa.stage1.found_weights import user_store
from pipelines.files.digests import DigestMemo
from stages.inputs import inputs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "pope.parquet").write_bytes(b"first")
    return folder


def digest(tables: Path, memo: Path) -> str | None:
    memory = DigestMemo(memo)
    found = inputs({"prepare": {"tables": {"pope": str(tables)}}, "model": {"path": "m"}}, memory)
    memory.save()
    return found["tables"][str(tables)]


def test_a_replaced_table_changes_the_digest_and_a_touched_one_does_not(tables, tmp_path):
    memo = tmp_path / "memo.json"
    first = digest(tables, memo)
    os.utime(tables / "pope.parquet", ns=(1, 1))
    assert digest(tables, memo) == first
    (tables / "pope.parquet").write_bytes(b"other")
    changed = digest(tables, memo)
    assert changed is not None and changed != first
    (tables / "more.parquet").write_bytes(b"")
    assert digest(tables, memo) not in (first, changed)
    shutil.rmtree(tables)
    assert digest(tables, memo) is None


def test_files_are_not_read_again_while_size_and_time_stand_still(tables, tmp_path):
    memo, path = tmp_path / "memo.json", tables / "pope.parquet"
    first, state = digest(tables, memo), path.stat()
    path.write_bytes(b"FIRST")  # as long as before
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert digest(tables, memo) == first  # its bytes were not looked at
    memo.write_text("{torn")
    assert digest(tables, memo) != first  # a damaged memo costs reading again, and hides nothing


def test_weights_of_grids_and_of_searches_are_found_however_deep():
    params = {
        "sweep": {"grids": [{"parameters": {"weights": ["a.safetensors", "b.safetensors"]}}, {"parameters": {}}]},
        "search": {"swarm": {"space": {"parameters": {"weights": "c.safetensors"}}}},
        "pruner": {"data": "lessons.json", "images_folder": "photos"},
    }
    found = inputs(params, DigestMemo(Path("nowhere")))
    assert list(found["weights"]) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert list(found["lessons"]) == ["lessons.json"]
    assert inputs({"pruner": {"data": "scenes"}}, DigestMemo(Path("nowhere")))["lessons"] == {}


def test_weights_that_a_sweep_may_find_outside_are_digested_but_for_the_testbed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUWA_PRUNER", str(tmp_path / "store"))
    for path in ("store/a.safetensors", "checkpoints/pruner/b.safetensors", "models/pruner/lpm.safetensors"):
        Path(path).parent.mkdir(parents=True)
        Path(path).write_bytes(b"weights")
    Path("checkpoints/llava").mkdir()
    Path("models/llava").mkdir()

    def found(path: str, style: str = "llava_v1", method: str = "learnpruner") -> list[str]:
        params = {"model": {"path": path, "prompt_style": style}, "sweep": {"grids": [{"method": ["nuwa", method]}]}}
        return list(inputs(params, DigestMemo(Path("nowhere")))["weights"])

    stored, beside = str(tmp_path / "store/a.safetensors"), str(tmp_path / "checkpoints/pruner/b.safetensors")
    assert found("checkpoints/llava") == [beside, stored]
    assert found("models/llava") == found("llava-hf/llava-1.5-7b-hf") == [stored], "what DVC tracks is not told twice"
    assert found("checkpoints/llava", style="testbed") == found("checkpoints/llava", method="nuwa") == []
    monkeypatch.delenv("NUWA_PRUNER")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    user_store().mkdir(parents=True)
    (user_store() / "c.safetensors").write_bytes(b"weights")
    assert found("llava") == [str(user_store() / "c.safetensors")], "the folder that the library looks in"


@pytest.mark.parametrize(
    ("kind", "section", "key"),
    [
        ("weights", "model", "text_tower"),
        ("lessons", "pruner", "data"),
        ("grades", "evaluate", "grades"),
        ("tables", "prepare", "tables"),
        ("plugins", "plugins", None),
    ],
)
def test_what_is_replaced_under_one_name_is_seen(kind, section, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = {"pope": "held.py"} if key == "tables" else "held.py" if key else ["held"]
    params = {"model": {"path": "m"}} | ({section: {key: value}} if key else {section: value})
    if section == "model":
        params["model"] |= {"path": "m"}
    seen = []
    for content in (b"one", b"two", b"two"):
        Path("held.py").write_bytes(content)
        seen.append(inputs(params, DigestMemo(tmp_path / f"memo-{len(seen)}.json"))[kind]["held.py"])
    assert seen[0] is not None and seen[0] != seen[1] == seen[2]


def test_the_stage_is_light_and_its_files_are_what_others_depend_on(tmp_path):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "stages.inputs"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "pandas", "pyarrow", "nuwa"}
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for out in stages["inputs"]["outs"]:
        assert json.loads((tmp_path / out).read_text()) is not None
        assert any(out in stage.get("deps", []) for stage in stages.values())


def test_settings_that_are_none_are_one_line(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare: {seed: 2024-13-45}\n")
    done = run_here("stages.inputs", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: params.yaml: not YAML: '2024-13-45' is no timestamp in \"<unicode string>\", line 1, column 17: prepare: "
        "{seed: 2024-13-45} ^\n"
    )
