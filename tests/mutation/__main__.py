"""``python -m mutation``: draw changes, measure each in a process of its own, and say what they came to.

The process that forks has loaded the packages this project builds on, and nothing of the project itself; each child
imports the project from a copy with one line changed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("nuwa", "pipelines", "stages")
TOO_LONG_S = 900
# What a method or scorer takes from another's file by name.
BORROWED = {"nuwa.stage1.downsample": {"nuwa/stage1/pooling.py"}, "nuwa.stage1.vscan": {"nuwa/stage1/nuwa.py"}}
SCORER_FILES = {"nuwa/stage2/dart.py", "nuwa/stage2/sparsevlm.py", "nuwa/stage2/without_rope.py"}
ADAPTERS = {
    "nuwa/vlm/llava.py": {"llava"},
    "nuwa/vlm/llava_next.py": {"llava_next"},
    "nuwa/vlm/qwen2_5_vl.py": {"qwen2_5_vl"},
}


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child process, or ``{"error": ...}`` for one that raises, dies or takes too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        signal.alarm(TOO_LONG_S)
        try:
            result = work()
        except BaseException as error:
            result = {"error": "".join(traceback.format_exception_only(error)).strip()}
        with os.fdopen(writer, "w") as sink:
            json.dump(result, sink)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as source:
        text = source.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else {"error": "the process died"}


def measured(
    tree: Path, world: Any, before: Mapping[str, Any] | None, *, answers: bool = True
) -> dict[str, dict[str, Any]]:
    """:func:`mutation.world.measure` by the project below ``tree``; called in a child."""
    from mutation.world import measure

    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    os.chdir(tree)
    import nuwa

    assert Path(nuwa.__file__).is_relative_to(tree)
    return measure(world, before, answers=answers)


def verdict(change: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What a change did to every slot, and whether it may."""
    if "error" in after:
        return {"change": str(change), "kind": "no answers", "stale": [], "strayed": [], "ids": 0}
    # A trial that cannot be planned any more has another identity or none; a family without a plan has no answer.
    touched = [name for name in before if after.get(name, {"id": ""})["id"] not in (before[name]["id"], None)]
    same = [name for name in before if name not in touched]
    # What raises leaves no answer that could be stored.
    raised = [name for name in same if not _is_digest(after[name]["answers"])]
    stale = [name for name in same if name not in raised and after[name]["answers"] != before[name]["answers"]]
    strayed = [name for name in touched if not may_touch(change.file, before[name])]
    kind = "new identity" if touched else "no answers" if raised else "equal"
    return {"change": str(change), "kind": kind, "stale": stale, "strayed": strayed, "ids": len(touched)}


def _is_digest(answers: str) -> bool:
    return len(answers) == 64 and set(answers) <= set("0123456789abcdef")


def may_touch(file: str, slot: Mapping[str, Any]) -> bool:
    """Whether a change of ``file`` may be a change of the slot: another's method, scorers or adapter may not."""
    if file in ADAPTERS:
        return slot["family"] in ADAPTERS[file]
    if file == "nuwa/stage2/scorers.py":  # what scorers of other files build on stands there too
        return slot["scorer"] is not None
    if file in SCORER_FILES:
        return slot["scorer"] == file.removesuffix(".py").replace("/", ".")
    if file.startswith("nuwa/stage1/") and Path(file).stem not in ("registry", "__init__"):
        own = f"{slot['module'].replace('.', '/')}.py"
        return file == own or file in BORROWED.get(slot["module"], set())
    return True


def copy_of_the_project(target: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def prepared_world(folder: Path) -> Any:
    """Made in a child of its own by the project as it is; what comes back is pickled, and of other packages."""
    from mutation.models import tiny_models
    from mutation.world import make_world

    return make_world(folder, tiny_models())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", action="append", help="only files whose path contains this")
    parser.add_argument("--edits", type=Path, help="JSON: name → file, old and new text; says which slots each changes")
    parser.add_argument("--log", type=Path, help="a line of JSON a change")
    options = parser.parse_args()
    sys.dont_write_bytecode = True
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        world = prepared_world(Path(folder))
        tree = copy_of_the_project(Path(folder) / "tree")
        before = in_child(lambda: measured(tree, world, None))
        if "error" in before:
            sys.exit(f"the project as it is cannot be measured: {before['error']}")
        edits = json.loads(options.edits.read_text()) if options.edits else {}
        edited = {name: slots_changed_by(edit, tree, world, before) for name, edit in edits.items()}
        results = try_changes(tree, world, before, options)
    summary = summarised(results, before, time.monotonic() - began) | {"edits": edited}
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    sys.exit(1 if summary["stale"] or summary["strayed"] else 0)


def slots_changed_by(edit: Mapping[str, str], tree: Path, world: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Slots whose identity an edit of the source changes; ``old`` is empty for a file that is new."""
    path = tree / edit["file"]
    whole = path.read_text() if edit["old"] else ""
    assert edit["old"] in whole
    path.write_text(whole.replace(edit["old"], edit["new"], 1) if edit["old"] else edit["new"])
    try:
        after = in_child(lambda: measured(tree, world, before, answers=False))
    finally:
        path.write_text(whole) if edit["old"] else path.unlink()
    if "error" in after:
        return after
    changed = [name for name in before if after.get(name, {}).get("id") != before[name]["id"]]
    return {"changed": len(changed), "slots": len(before), "features": _features(before) != _features(after)}


def _features(slots: Mapping[str, Any]) -> set[str]:
    return {slot["id"].partition(" ")[0] for slot in slots.values()}


def try_changes(tree: Path, world: Any, before: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    from mutation.changes import draw

    files = sorted({file for slot in before.values() for file in slot["files"] if (tree / file).is_file()})
    files = [file for file in files if not options.file or any(part in file for part in options.file)]
    results = []
    for change in draw(tree, files, options.changes, options.seed):
        path = tree / change.file
        whole = path.read_text()
        path.write_text(change.applied(whole))
        try:
            after = in_child(lambda: measured(tree, world, before))
        finally:
            path.write_text(whole)
        results.append(verdict(change, before, after) | {"file": change.file})
        if options.log:
            with options.log.open("a") as log:
                log.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
    return results


def summarised(results: list[dict[str, Any]], before: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    kinds = [result["kind"] for result in results]
    return {
        "changes": len(results),
        "files": len({result["file"] for result in results}),
        "slots": len(before),
        "answered": sum(_is_digest(slot["answers"]) for slot in before.values()),
        **{kind: kinds.count(kind) for kind in ("new identity", "equal", "no answers")},
        "stale": [f"{result['change']}: {', '.join(result['stale'])}" for result in results if result["stale"]],
        "strayed": [f"{result['change']}: {', '.join(result['strayed'])}" for result in results if result["strayed"]],
        "seconds": round(seconds),
    }


if __name__ == "__main__":
    main()
