"""What a change did to the trials that were measured, and which trials it may change at all."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a method takes from another's file by name.
BORROWED = {"nuwa.stage1.downsample": {"nuwa/stage1/pooling.py"}, "nuwa.stage1.vscan": {"nuwa/stage1/nuwa.py"}}
ADAPTERS = {
    "nuwa/vlm/llava.py": {"llava"},
    "nuwa/vlm/llava_next.py": {"llava_next"},
    "nuwa/vlm/qwen2_5_vl.py": {"qwen2_5_vl"},
    # Of these families no model is mutated.
    "nuwa/vlm/internvl.py": set(),
    "nuwa/vlm/llava_onevision.py": set(),
    "nuwa/vlm/qwen2_vl.py": set(),
    "nuwa/vlm/qwen3_vl.py": set(),
    "nuwa/vlm/received.py": set(),
}
# What a stage 2 runs because its settings say so, beside its scorer.
OPTIONAL = {"nuwa/stage2/coordinates.py": "coordinates", "nuwa/stage2/recycling.py": "recycling"}
# Parts of scorers in the file that holds several of them, and whose they are: the beginnings of `module:name`.
SCORER_PARTS = {
    "raters": ("nuwa.stage2.scorers:attention_raters", "nuwa.stage2.sparsevlm:"),
    "privileged": ("nuwa.stage2.coordinates:", "nuwa.stage2.without_rope:"),
    "rounded": ("nuwa.stage2.coordinates:", "nuwa.stage2.without_rope:", "nuwa.stage2.sparsevlm:"),
}


def verdict(change: Any, text: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What a change of a file's ``text`` did to every slot, and whether it may.

    ``kind``: ``new identity`` where a slot has one, ``no answers`` where nothing could be stored, else ``equal``.
    """
    said = {"change": str(change), "file": change.file, "kind": "no answers", "stale": [], "strayed": [], "ids": 0}
    if "error" in after:
        return said
    # A trial that cannot be planned any more has another identity or none; a family without a plan has no answer.
    touched = [name for name in before if after.get(name, {"id": ""})["id"] not in (before[name]["id"], None)]
    same = [name for name in before if name not in touched]
    # What raises leaves no answer that could be stored.
    raised = [name for name in same if not is_digest(after[name]["answers"])]
    stale = [name for name in same if name not in raised and after[name]["answers"] != before[name]["answers"]]

    scorers = {scorer for slot in before.values() for scorer in slot["scorers"]}
    function = _function_at(text, change.line)
    strayed = [name for name in touched if not may_touch(change.file, function, before[name], scorers)]
    kind = "new identity" if touched else "no answers" if raised else "equal"
    return said | {"kind": kind, "stale": stale, "strayed": strayed, "ids": len(touched)}


def is_digest(answers: str) -> bool:
    return len(answers) == 64 and set(answers) <= set("0123456789abcdef")


def may_touch(file: str, function: str, slot: Mapping[str, Any], scorers: set[str]) -> bool:
    """Whether a change of ``file`` may be a change of the slot: another's method, scorer or adapter may not.

    ``function``: the module's function or class that the change is in; a file may hold several of ``scorers``, which are
    written ``module:name``.
    """
    module, own = file.removesuffix(".py").replace("/", "."), slot["scorers"]
    if file in ADAPTERS:
        return slot["family"] in ADAPTERS[file]
    if file in OPTIONAL and OPTIONAL[file] in slot["options"]:
        return True
    if f"{module}:{function}" in scorers:
        return f"{module}:{function}" in own
    if module == "nuwa.stage2.scorers":
        parts = SCORER_PARTS.get(function)
        return parts is None or "coordinates" in slot["options"] or any(one.startswith(parts) for one in own)
    if file in OPTIONAL or any(one.startswith(f"{module}:") for one in scorers):
        return any(one.startswith(f"{module}:") for one in own)
    if file.startswith("nuwa/stage1/") and Path(file).stem not in ("registry", "__init__"):
        return module == slot["module"] or file in BORROWED.get(slot["module"], set())
    return True


def _function_at(text: str, line: int) -> str:
    """The function or class of a module that ``line`` is in; empty where there is none."""
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or line):
            return node.name
    return ""
