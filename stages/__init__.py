"""One thin module a DVC stage: ``python -m stages.<name>``.

This file is imported before the stage's own module and its libraries, which take seconds: ``--help`` says what the stage
does and ends, and arguments a stage does not know are refused, before anything else happens.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

# stages that take words
USAGE = {
    "plan": "[EXPERIMENT]",
    "experiment": "EXPERIMENT",
    "compare": "A B [TABLE.csv]",
    "grades": "[ADDRESS MODEL]",
    "dashboard": "PORT",
}


def _answer_help_and_refuse_arguments(argv: list[str]) -> None:
    """``argv``: as Python was started with it (``sys.orig_argv``)."""
    started = next((place for place, word in enumerate(argv) if word.startswith("stages.")), None)
    if started is None or not started or argv[started - 1] != "-m":
        return
    name, arguments = argv[started].removeprefix("stages."), argv[started + 1 :]
    source = Path(__file__).with_name(f"{name}.py")
    if not source.is_file():
        return

    usage = f"usage: python -m stages.{name} {USAGE.get(name, '')}".rstrip()
    if {"-h", "--help"} & set(arguments):
        print(
            f"{usage}\n\n{ast.get_docstring(ast.parse(source.read_text()))}\n\nSettings: params.yaml, docs/params.md."
        )
        sys.exit(0)
    unknown = [word for word in arguments if word.startswith("-") or name not in USAGE]
    if unknown:
        print(f"error: {unknown[0]!r} is not an argument of this stage; {usage}", file=sys.stderr)
        sys.exit(2)


_answer_help_and_refuse_arguments(sys.orig_argv)


def _check_libraries(argv: list[str]) -> None:
    """Refuse libraries that answers are not right with, before any stage could say it in one line."""
    if "stages.inputs" in argv:  # always runs, takes a fraction of a second, and loads no model
        return
    try:
        import nuwa  # noqa: F401 (on import it refuses versions that it does not know)
    except ImportError as error:
        if type(error).__name__ != "UnsupportedVersion":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


_check_libraries(sys.orig_argv)
