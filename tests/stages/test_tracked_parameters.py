"""DVC reruns a stage exactly when a parameter it reads has changed: what is read is tracked, what is tracked is read."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Where work runs and what it is logged to; neither changes a result.
RUNTIME = {"cluster", "tracking"}
# Loaded with the settings: stages whose results they may decide track them, whether they read the key or not.
LOADED = {"plugins"}
HANDED = re.compile(r"\bsettings: Settings\b")


def chains(path: Path) -> set[str]:
    """Every ``settings.<section>[.<key>]`` that ``path`` reads, following ``name = settings.<section>``."""
    tree = ast.parse(path.read_text())
    aliases: dict[str, str] = {}

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id, "" if node.id == "settings" else None)
        if isinstance(node, ast.Attribute) and (base := dotted(node.value)) is not None:
            return f"{base}.{node.attr}".lstrip(".")
        return None

    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in assignments:
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for target, value in zip(targets, values, strict=False):
            if isinstance(target, ast.Name) and (chain := dotted(value)):
                aliases[target.id] = chain
    found = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {".".join(chain.split(".")[:2]) for chain in found if chain}


def sources(stage: str) -> list[Path]:
    """The stage and the modules of pipelines it imports that are handed all settings."""
    path = ROOT / "stages" / f"{stage}.py"
    imported = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
    places = [ROOT / name.replace(".", "/") for name in imported if name and name.startswith("pipelines.")]
    modules = [place / "__init__.py" if place.is_dir() else place.with_suffix(".py") for place in places]
    return [path, *(module for module in modules if HANDED.search(module.read_text()))]


def covers(tracked: str, read: str) -> bool:
    return read == tracked or read.startswith(tracked + ".") or tracked.startswith(read + ".")


# `inputs` runs whatever has changed.
@pytest.mark.parametrize("name", [name for name in STAGES if name != "inputs"])
def test_a_stage_tracks_the_parameters_it_reads(name):
    tracked = set(STAGES[name].get("params", []))
    chained = set().union(*map(chains, sources(name)))
    read = {chain for chain in chained if chain.partition(".")[0] not in RUNTIME | LOADED}
    assert read, "a stage reads some parameter"
    untracked = {chain for chain in read if not any(covers(key, chain) for key in tracked)}
    assert not untracked, f"dvc.yaml: stage {name} reads {untracked} and does not track it"
    idle = {key for key in tracked - LOADED if not any(covers(key, chain) for chain in read)}
    assert not idle, f"dvc.yaml: stage {name} tracks {idle} and never reads it"


def test_what_a_stage_hands_its_settings_to_is_read_too():
    assert sources("sweep") == [ROOT / "stages/sweep.py", ROOT / "pipelines/sweep/engine.py"]
    assert "features" in chains(ROOT / "pipelines/sweep/engine.py")


def test_the_reader_sees_chains_and_names_for_them(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text("def s(settings):\n    plan, x = settings.sweep, settings.model.path\n    return plan.images, x\n")
    assert chains(path) == {"sweep", "sweep.images", "model", "model.path"}
