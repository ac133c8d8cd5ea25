"""Identity of code: what changes a result changes it, and nothing else does."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import textwrap

import pytest

from nuwa import source
from nuwa.methods import RECIPES
from nuwa.source import TABLES, closure, digest_of
from nuwa.stage1 import METHODS
from nuwa.stage2 import SCORERS

NUMBERS = itertools.count()
PROGRAM = '''
"""What this is."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import math as maths
from collections import ChainMap
from pathlib import Path
from typing import NamedTuple

from nuwa.registry import Registry

log = logging.getLogger(__name__)
SCALE = 2
TABLE = {"a": 1, "b": [2, 3]}
UNUSED = 1
THINGS = Registry("thing")


class Wrong(ValueError):
    def __init__(self, value):
        super().__init__(f"{value} is wrong")


@dataclasses.dataclass(frozen=True)
class Point:
    """A point."""

    x: int = 1
    y: int = dataclasses.field(default=2)

    @property
    def length(self) -> float:
        return maths.hypot(self.x, self.y)

    def never_called(self) -> int:
        return 1

    def by_name(self) -> int:
        return 3


class Base:
    factor = 2
    title = "a base"

    def scaled(self, value):
        return value * self.factor

    def __call__(self, value):
        return value


class Derived(Base):
    def scaled(self, value):
        return super().scaled(value) + 1


class Pair(NamedTuple):
    first: int
    second: int


def check_size(value, most):
    if value > most:
        raise Wrong(value)


def helper(value: int, step: int = 1) -> int:
    """Adds."""
    # a comment
    assert value is not None, "no value"
    check_size(value, 100)
    if value < 0:
        message = value
        raise Wrong(message)
    log.info("%s is fine", value)
    return value + step


@functools.cache
def cached(value):
    return value * SCALE


def twice(function):
    @functools.wraps(function)
    def both(*arguments):
        return function(*arguments) * 2

    return both


@twice
def wrapped(value):
    return value


def first_thing(value):
    return value + 10


def second_thing(value):
    return value + 20


def kernel(value):
    return value * 7


THINGS.add("first", first_thing)
THINGS.add("second", second_thing)
KERNELS = ChainMap()  # as another package's
KERNELS.update(first=kernel)


def run(point: Point, name: str) -> float:
    """Runs."""
    held = [helper(one) for one in TABLE["b"]]
    total = sum(held) + point.length + cached(3) + wrapped(1) + Derived().scaled(2)
    total += THINGS.look_up(name)(1) + getattr(point, "by_name")() + Pair(1, second=2).first
    return total + len(Path(__file__).with_name("words.txt").read_text())
'''
BASE = textwrap.dedent(PROGRAM)


def identity(folder, text, names=("first",), words="one two"):
    """The identity of ``run`` in a module of this text."""
    name, folder = "program", folder / str(next(NUMBERS))  # a folder of its own: no compiled file is taken for another
    folder.mkdir()
    path = folder / f"{name}.py"
    path.write_text(text)
    (folder / "words.txt").write_text(words)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    try:
        return digest_of(closure([module.run], {"thing": names}))
    finally:
        del sys.modules[name]


MEANINGLESS = {
    "a docstring": ('"""Adds."""', '"""Adds a step to a value."""'),
    "a module's docstring": ('"""What this is."""', '"""What this really is."""'),
    "a comment": ("# a comment", "# another comment"),
    "an empty line": ("SCALE = 2\n", "\n\nSCALE = 2\n\n"),
    "an annotation": ("value: int, step: int = 1) -> int", "value: float, step: 'int | None' = 1) -> float"),
    "a field's annotation": ("x: int = 1", "x: float = 1"),
    "the words of an assertion": ('"no value"', '"there is no value"'),
    "the words of an error": ("is wrong", "is not right"),
    "what an error is told": ("raise Wrong(message)", 'raise Wrong(f"{message!r}")'),
    "the words of a log line": ('"%s is fine", value', '"all is fine: %s", value'),
    "a constant nobody reads": ("UNUSED = 1", "UNUSED = 2"),
    "a label nobody reads": ('title = "a base"', 'title = "the base"'),
    "a method nobody calls": ("return 1\n", "return 4\n"),
    "a registered thing that is not named": ("value + 20", "value + 21"),
    "another registered thing": ('THINGS.add("second"', 'THINGS.add("third", helper)\nTHINGS.add("second"'),
    "what a check refuses": ("if value > most", "if value >= most"),
    "a check more": ("check_size(value, 100)", "check_size(value, 100)\n    check_size(step, 9)"),
    "a check less": ("    check_size(value, 100)\n", ""),
    "layout": ("total = sum(held) + point.length", "total = (\n        sum(held)) + point.length"),
}
MEANINGFUL = {
    "a constant": ("SCALE = 2", "SCALE = 3"),
    "a value in a table": ('"b": [2, 3]', '"b": [2, 4]'),
    "a default": ("step: int = 1", "step: int = 2"),
    "an operator": ("value + step", "value - step"),
    "a comparison": ("value < 0", "value <= 0"),
    "what an assertion says": ("assert value is not None", "assert value is None"),
    "a cached function": ("value * SCALE", "value * SCALE * 2"),
    "a decorator's body": ("* 2\n\n    return both", "* 3\n\n    return both"),
    "a decorator left out": ("@twice\ndef", "def"),
    "a property by its name": ("maths.hypot(self.x, self.y)", "maths.hypot(self.x, 1)"),
    "a field's default": ("x: int = 1", "x: int = 2"),
    "a field more": ("    x: int = 1", "    w: int = 1\n    x: int = 1"),
    "the order of fields": ("first: int\n    second: int", "second: int\n    first: int"),
    "a method of a base": ("value * self.factor", "value / self.factor"),
    "an attribute of a base": ("factor = 2", "factor = 3"),
    "an override": ("super().scaled(value) + 1", "super().scaled(value) + 2"),
    "an override left out": ("    def scaled(self, value):\n        return super().scaled(value) + 1", "    pass"),
    "a method called by a string": ("return 3\n", "return 5\n"),
    "a method with two underscores": ("value):\n        return value\n", "value):\n        return value + 1\n"),
    "a named registered thing": ("value + 10", "value + 11"),
    "another function under a name": ('"first", first_thing', '"first", second_thing'),
    "what is registered with another package": ("value * 7", "value * 8"),
    "the name under which it is": ("update(first=", "update(second="),
    "an import": ("import math as maths", "import numpy as maths"),
    "a comprehension": ("helper(one) for one", "helper(one, 2) for one"),
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    assert identity(folder, BASE) == identity(folder, BASE), "the same text is the same"
    return identity(folder, BASE)


@pytest.mark.parametrize("edit", MEANINGLESS)
def test_what_has_no_meaning_changes_nothing(tmp_path, usual, edit):
    old, new = MEANINGLESS[edit]
    assert BASE.count(old) >= 1
    assert identity(tmp_path, BASE.replace(old, new, 1)) == usual


@pytest.mark.parametrize("edit", MEANINGFUL)
def test_what_has_meaning_changes_the_identity(tmp_path, usual, edit):
    old, new = MEANINGFUL[edit]
    assert BASE.count(old) >= 1
    assert identity(tmp_path, BASE.replace(old, new, 1)) != usual


def test_a_data_file_counts_by_content(tmp_path, usual):
    assert identity(tmp_path, BASE, words="one three") != usual


PLUG_IN = """
import helped_by as helped

def registered(value):
    return helped.helper(value)
"""


@pytest.mark.parametrize("edit", ["nothing", "its own function", "a function it takes from its package"])
def test_what_a_plug_in_registers_counts_with_its_package(tmp_path, monkeypatch, edit):
    """An entry that another package registers, and the helper it calls by its module."""
    monkeypatch.setattr(source, "OURS", {"nuwa"})
    base = BASE.replace('THINGS.add("first", first_thing)', 'import plugged\nTHINGS.add("first", plugged.registered)')

    def plugged_in(folder, own=PLUG_IN, helper="def helper(value):\n    return value + 10\n"):
        (folder / "plugged").mkdir(parents=True)
        (folder / "plugged" / "__init__.py").write_text(own.replace("import helped_by", "import plugged.helped_by"))
        (folder / "plugged" / "helped_by.py").write_text(helper)
        monkeypatch.syspath_prepend(str(folder))
        try:
            return identity(folder, base)
        finally:
            for name in ("plugged", "plugged.helped_by"):
                sys.modules.pop(name, None)

    changes = {
        "nothing": {},
        "its own function": {"own": PLUG_IN.replace("(value)\n", "(value + 1)\n")},
        "a function it takes from its package": {"helper": "def helper(value):\n    return value + 11\n"},
    }
    assert (plugged_in(tmp_path / "one") == plugged_in(tmp_path / "two", **changes[edit])) == (edit == "nothing")


def test_other_names_are_another_identity(tmp_path, usual):
    assert identity(tmp_path, BASE, names=("second",)) != usual


def test_tables_of_names_exist():
    """A table that was renamed would count whole, and every method would be all methods."""
    for qualified in TABLES:
        module, _, name = qualified.rpartition(".")
        assert isinstance(getattr(sys.modules[module], name), dict)


def stage1(method):
    names = {"stage-1 method": [RECIPES[method].stage1], "method": [method], "stage-2 scorer": []}
    return closure([METHODS[RECIPES[method].stage1].select], names)


def test_a_method_is_known_by_its_own_files():
    """Of the methods' files each reaches its own, and what it imports from another by name."""
    borrowed = {"downsample": {"pooling"}}
    for method in METHODS:
        files = {name.partition(":")[0].removeprefix("nuwa.stage1.") for name in stage1(method)}
        own = METHODS[method].select.__module__.removeprefix("nuwa.stage1.")
        others = {other.select.__module__.removeprefix("nuwa.stage1.") for other in METHODS.values()} - {own}
        reached = files & others
        assert own in files
        assert reached <= borrowed.get(method, reached if len(reached) <= 1 else set()), (method, reached)


def test_scorers_are_known_by_their_own_functions():
    pieces = {name: closure([scorer.score]) for name, scorer in SCORERS.items()}
    for name in ("attention_raters", "attention_raters_by_distance"):
        assert "nuwa.stage2.scorers:raters" in pieces[name]
    for name in set(SCORERS) - {"attention_raters", "attention_raters_by_distance"}:
        assert "nuwa.stage2.scorers:raters" not in pieces[name]
