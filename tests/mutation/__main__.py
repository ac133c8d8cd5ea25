"""``python -m mutation``: draw changes, measure each in a process of its own, and say what they came to.

The process that forks has loaded the packages this project builds on, and nothing of the project itself; each child
imports the project from a copy with one line changed. With ``--log`` all that was measured is kept: the same command on
the same code goes on from there.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mutation.verdicts import is_digest, verdict

ROOT = Path(__file__).parents[2]
PACKAGES = ("nuwa", "pipelines", "stages")
CPU_SECONDS = 90  # of one change: what never ends gives no answer


def in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a child process, or ``{"error": ...}`` for one that raises, dies or takes too long."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        sys.dont_write_bytecode = True
        gc.disable()  # nothing lives long here, and all that the parent holds would be looked through
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


def copy_of_the_project(target: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(target, quiet=2)
    return target


@contextlib.contextmanager
def rewritten(path: Path, text: str) -> Iterator[None]:
    """A file that says ``text`` for a while; afterwards it is what it was, or gone."""
    whole, known = (path.read_bytes(), path.stat()) if path.exists() else (None, None)
    path.write_text(text)
    try:
        yield
    finally:
        if whole is None or known is None:
            path.unlink()
        else:
            path.write_bytes(whole)
            os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))  # so that what was compiled still counts


def prepared_world(folder: Path, options: argparse.Namespace) -> Any:
    """What is measured; all that is in it is of other packages."""
    from mutation.models import save_pruner, tiny_models
    from mutation.world import make_world

    world = make_world(folder, tiny_models(options.families), options.small)
    save_pruner(*world.models["llava"][:2], world.pruner)
    return world


def main() -> None:
    summary = run(parsed())
    print(json.dumps(summary, indent=1, ensure_ascii=False))
    sys.exit(1 if summary["stale"] or summary["strayed"] else 0)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, change, measure again; what it came to."""
    with tempfile.TemporaryDirectory() as folder:
        world = prepared_world(Path(folder), options)
        tree = copy_of_the_project(Path(folder) / "tree")
        before = in_child(lambda: measured(tree, world, None))
        if "error" in before:
            sys.exit(f"the project as it is cannot be measured: {before['error']}")
        edits = json.loads(options.edits.read_text()) if options.edits else {}
        edited = {name: slots_changed_by(edit, tree, world, before) for name, edit in edits.items()}
        results, missed = try_changes(tree, world, before, options)
    return summarised(results, before) | {"not hit": missed, "edits": edited}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of ``arguments``, or of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changes", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", action="append", help="only files whose path contains this")
    parser.add_argument("--families", nargs="+", help="of models; all there are")
    parser.add_argument("--small", action="store_true", help="a few trials of every kind")
    parser.add_argument("--edits", type=Path, help="JSON: name → file, old and new text; says which slots each changes")
    parser.add_argument("--log", type=Path, help="a line of JSON a change; what stands there is not measured again")
    return parser.parse_args(arguments)


def slots_changed_by(edit: Mapping[str, str], tree: Path, world: Any, before: Mapping[str, Any]) -> dict[str, Any]:
    """Slots whose identity an edit of the source changes; ``old`` is empty for a file that is new."""
    path = tree / edit["file"]
    whole = path.read_text() if edit["old"] else ""
    assert edit["old"] in whole
    with rewritten(path, whole.replace(edit["old"], edit["new"], 1) if edit["old"] else edit["new"]):
        after = in_child(lambda: measured(tree, world, before, answers=False))
    if "error" in after:
        return after
    changed = [name for name in before if after.get(name, {}).get("id") != before[name]["id"]]
    return {"changed": len(changed), "slots": len(before), "features": _features(before) != _features(after)}


def _features(slots: Mapping[str, Any]) -> set[str]:
    return {slot["id"].partition(" ")[0] for slot in slots.values()}


def try_changes(
    tree: Path, world: Any, before: Mapping[str, Any], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[str]]:
    """The verdict on every change that is drawn, and the files that none was drawn of."""
    from mutation.changes import draw

    files = sorted({file for slot in before.values() for file in slot["files"] if (tree / file).is_file()})
    files = [file for file in files if not options.file or any(part in file for part in options.file)]
    drawn = draw(tree, files, options.changes, options.seed)
    known = logged(options.log, code_of(tree))

    results = []
    for change in drawn:
        if str(change) not in known:
            path = tree / change.file
            whole = path.read_text()
            with rewritten(path, change.applied(whole)):
                after = in_child(lambda: measured(tree, world, before))
            known[str(change)] = verdict(change, whole, before, after)
            if options.log:
                with options.log.open("a") as log:
                    log.write(json.dumps(known[str(change)], ensure_ascii=False) + "\n")
        results.append(known[str(change)])
    return results, sorted(set(files) - {change.file for change in drawn})


def logged(log: Path | None, code: str) -> dict[str, dict[str, Any]]:
    """What was measured already; a log of other code is begun anew."""
    if log is None:
        return {}
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines or json.loads(lines[0]) != {"code": code}:
        log.write_text(json.dumps({"code": code}) + "\n")
        return {}
    return {result["change"]: result for result in map(json.loads, lines[1:])}


def code_of(tree: Path) -> str:
    """Digest of all that is changed and of all that measures."""
    digest = hashlib.sha256()
    for path in sorted([*tree.rglob("*.py"), *Path(__file__).parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def summarised(results: list[dict[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    kinds = [result["kind"] for result in results]
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "changes": len(results),
        "files": len({result["file"] for result in results}),
        "slots": len(before),
        "answered": sum(is_digest(slot["answers"]) for slot in before.values()),
        **{kind: kinds.count(kind) for kind in ("new identity", "equal", "no answers")},
        "stale": [f"{result['change']}: {', '.join(result['stale'])}" for result in results if result["stale"]],
        "strayed": [f"{result['change']}: {', '.join(result['strayed'])}" for result in results if result["strayed"]],
        "CPU seconds": round(sum(one.ru_utime + one.ru_stime for one in spent)),
    }


if __name__ == "__main__":
    main()
