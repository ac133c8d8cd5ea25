"""Identity of code: what a result really ran, so that no stored result outlives the code it came from.

The *closure* of some functions is everything of this project they can reach: through the globals they name, defaults,
bases, annotations, methods called by a name that occurs, and what their modules call when they are imported. It is
walked from the live objects, so a decorator, a new module or a function moved to another file needs no list kept by hand.
Where a method is called by an attribute's name, every class of the closure that has a method of that name counts: too much
rather than too little.

Through a :class:`nuwa.registry.Registry`, and through the mappings in :data:`TABLES`, only the entries that are named
count: a trial is identified by its own method, scorer and adapter and by what all share.

Of each function the syntax tree counts, and constants by value. Docstrings, comments, layout, annotations and the
wording of messages (in ``raise``, ``assert``, ``warnings`` and ``logging`` calls, and in exception classes) have no
meaning, nor have statements that only check or refuse (:data:`REFUSING`). Other packages are known by name only; their versions are provenance of a result, and no part of its identity.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nuwa.registry import Registry

PACKAGE = "nuwa"
OURS = {PACKAGE}  # and the packages of plug-ins, once one of their entries is named
OTHERS = {*sys.stdlib_module_names, "numpy", "torch", "transformers"}
# Mappings of names to entries that are no Registry: module and name → the kind by which their entries are named.
TABLES = {"nuwa.methods.RECIPES": "method"}
_LOOKUPS = {"getattr", "hasattr", "attrgetter", "methodcaller"}
REFUSING = re.compile(r"_*(check|refuse)(_|$)")  # functions so named return nothing and change nothing
SPEAKING = {"log", "logger", "logging", "warnings"}  # calls of their attributes only say something

Names = Mapping[str, Iterable[str]]  # kind of a registry → the names that count


# Everything between an encoded image and an answer.
ANSWERING: tuple[str, ...] = (
    "grid",
    "signals",
    "selection",
    "layout",
    "positions",
    "schedule",
    "methods",
    "decoder",
    "stage1",
    "stage2",
    "vlm",
)


@functools.cache
def code_fingerprint(parts: tuple[str, ...] = ANSWERING) -> str:
    """Digest of the meaning of whole modules or folders of this package."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    for name in parts:
        files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
        for path in files:
            meaning = _spelled(_normalised(ast.parse(path.read_text())))
            digest.update(f"{path.relative_to(root).as_posix()}\n{meaning}\n".encode())
    return digest.hexdigest()


def closure(
    roots: Iterable[Any], names: Names | None = None, modules: Iterable[str] = (), without: Iterable[Any] = ()
) -> dict[str, str]:
    """Every piece of code that ``roots`` (functions, methods or classes) can reach → the digest of its meaning.

    A piece is called ``<module>:<qualified name>``. ``names``: the entries that count, by the registry's kind; of a
    registry whose kind is not listed all entries count. The package of an entry is walked like this one. ``modules``: modules beside this package's that are walked;
    those of the roots always are. ``without``: classes and functions that are taken for outside.
    """
    roots = tuple(roots)
    walk = _Walk(
        {kind: frozenset(chosen) for kind, chosen in (names or {}).items()},
        frozenset(modules) | {_unwrapped(root).__module__ for root in roots},
        frozenset(map(id, without)),
    )
    return walk.run(roots)


def digest_of(pieces: Mapping[str, str]) -> str:
    """One digest of a closure."""
    return hashlib.sha256("".join(f"{name} {pieces[name]}\n" for name in sorted(pieces)).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Reached:
    """What a piece leads to: objects, the attribute names it reads, and registries as ``(kind, entries)``."""

    objects: tuple[Any, ...] = ()
    attributes: frozenset[str] = frozenset()
    registries: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Piece:
    name: str
    digest: str
    reached: _Reached


@dataclasses.dataclass(frozen=True)
class _ClassPieces:
    """A class: its head (bases, decorators, fields) and its members, of which those that are called by name count."""

    head: _Piece
    members: Mapping[str, tuple[_Piece, ...]]
    always: frozenset[str]  # members that are called without being named


class _Walk:
    """One traversal; what is known of single objects is shared by all of them."""

    def __init__(self, names: Mapping[str, frozenset[str]], modules: frozenset[str], without: frozenset[int]) -> None:
        self.names, self.modules, self.without = names, modules, without
        self.pieces: dict[str, str] = {}
        self.seen: dict[int, Any] = {}  # by identity; the object is held so that no id is used twice
        self.imported: set[str] = set()  # modules
        self.waiting: list[Any] = []
        self.attributes: set[str] = set()
        self.dormant: dict[str, list[_Piece]] = {}  # members of classes whose names have not occurred

    def run(self, roots: Iterable[Any]) -> dict[str, str]:
        self.waiting.extend(map(_unwrapped, roots))
        while self.waiting:
            self._visit(self.waiting.pop())
        return self.pieces

    def _visit(self, target: Any) -> None:
        if id(target) in self.seen or id(target) in self.without or not self._is_ours(target):
            return
        self.seen[id(target)] = target
        if target.__module__ not in self.imported:
            self.imported.add(target.__module__)
            if (piece := _import_piece(sys.modules[target.__module__])) is not None:
                self._take(piece)
        if not isinstance(target, type):
            self._take(_function_piece(target))
            return
        described = _class_pieces(target)
        self._take(described.head)
        for name, members in described.members.items():
            if name in described.always or name in self.attributes:
                for member in members:
                    self._take(member)
            else:
                self.dormant.setdefault(name, []).extend(members)

    def _take(self, piece: _Piece) -> None:
        if piece.name in self.pieces:
            if self.pieces[piece.name] == piece.digest:
                return
            piece = dataclasses.replace(piece, name=f"{piece.name} {piece.digest[:8]}")  # two lambdas of one place
        self.pieces[piece.name] = piece.digest
        self._follow(piece.reached)

    def _follow(self, reached: _Reached) -> None:
        self.waiting += [target for target in reached.objects if id(target) not in self.seen]
        for name in reached.attributes - self.attributes:
            self.attributes.add(name)
            for member in self.dormant.pop(name, ()):
                self._take(member)
        for kind, entries in reached.registries:
            chosen = self.names.get(kind, frozenset(entries))
            for name in sorted(chosen & set(entries)):
                text, inside = _described(entries[name])
                # What a plug-in registered is of this project, and with it the package it comes from.
                OURS.update(map(_package_of, inside.objects))
                OURS.difference_update(OTHERS)
                entry = _Piece(f"{kind}:{name}", _sha(text), inside)
                self._take(entry)

    def _is_ours(self, target: Any) -> bool:
        module = getattr(target, "__module__", None) or ""
        return _may_be_walked(target) and (_in_package(module) or module in self.modules)


def _may_be_walked(target: Any) -> bool:
    """Whether it has code at all; an exception says what went wrong."""
    return isinstance(target, types.FunctionType) or (
        isinstance(target, type) and not issubclass(target, BaseException)
    )


def _in_package(module: str) -> bool:
    return module.partition(".")[0] in OURS


def _package_of(target: Any) -> str:
    return str(getattr(target, "__module__", None) or PACKAGE).partition(".")[0]


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unwrapped(target: Any) -> Any:
    """The function behind a bound method, a cache, a property or a decorator that wraps."""
    while True:
        if isinstance(target, (classmethod, staticmethod, types.MethodType)):
            target = target.__func__
        elif isinstance(target, functools.cached_property):
            target = target.func
        elif isinstance(target, property):
            target = target.fget
        elif not isinstance(target, type) and hasattr(target, "__wrapped__"):
            target = target.__wrapped__
        else:
            return target


# Single objects


@functools.cache
def _import_piece(module: types.ModuleType) -> _Piece | None:
    """What a module calls when it is imported, such as the registration of an attention kernel with another package.

    Null where it calls nothing. What it adds to registries of this project counts by entry.
    """
    texts, gathered = [], _Gathered()
    for statement in _tree(module).body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        owner = call.func.value if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
        named = vars(module).get(owner.id) if isinstance(owner, ast.Name) else None
        if not isinstance(call, ast.Call) or isinstance(named, Registry):
            continue
        tree = _normalised(ast.Module([statement], []))
        if tree.body:
            texts.append(_spelled(tree))
            gathered.add_tree(tree, vars(module), None, module)
    if not texts:
        return None
    return _Piece(f"{module.__name__}:import", _sha("\n".join([*texts, *gathered.bindings])), gathered.reached())


@functools.cache
def _function_piece(function: types.FunctionType) -> _Piece:
    """A function's syntax tree, what its global names mean, and its defaults by value."""
    module, code = sys.modules[function.__module__], function.__code__
    nodes = _definitions(module).get((code.co_firstlineno, code.co_name), [])
    name = f"{function.__module__}:{function.__qualname__}"
    if not nodes:  # made by a library, such as the methods of a dataclass
        return _Piece(name, _sha(name), _Reached())

    texts, gathered = [], _Gathered()
    for node in nodes:
        tree = _normalised(node)
        tree.decorator_list = []
        texts.append(_spelled(tree))
        gathered.add_tree(tree, function.__globals__, _globals_of(code), module)
        gathered.add_annotations(node, function.__globals__)
        texts += [_spelled(_normalised(one)) for one in _wrappers(function, node)]
        for one in _wrappers(function, node):
            gathered.add_tree(one, function.__globals__, None, module)

    # What no text shows: values that the function closes over or has by default.
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    for label, value in (
        *held.items(),
        ("defaults", function.__defaults__),
        ("keyword defaults", function.__kwdefaults__),
    ):
        gathered.add_value(label, value)
    return _Piece(name, _sha("\n".join([*texts, *gathered.bindings])), gathered.reached())


def _wrappers(function: types.FunctionType, node: ast.AST) -> list[ast.expr]:
    """The decorators of a function that put something around it: the name it has in its module is no longer it."""
    decorators = getattr(node, "decorator_list", [])
    live = function.__globals__.get(function.__qualname__)
    # What only refuses changes nothing that comes out, be it a statement or a wrapper.
    return [] if live is function or getattr(live, "only_refuses", False) else list(decorators)


@functools.cache
def _class_pieces(cls: type) -> _ClassPieces:
    module = sys.modules[cls.__module__]
    node = _classes(module).get(cls.__qualname__)
    name = f"{cls.__module__}:{cls.__qualname__}"
    if node is None:
        return _ClassPieces(_Piece(name, _sha(name), _Reached()), {}, frozenset())
    members, statements = _members(cls, node, module)

    head, gathered = [ast.unparse(base) for base in node.bases], _Gathered()
    for tree in [*(_normalised(one) for one in node.decorator_list), *statements]:
        head.append(_spelled(tree))
        gathered.add_tree(tree, vars(module), None, module, within=cls)
    gathered.add_annotations(node, vars(module))
    gathered.objects += [base for base in cls.__mro__[1:] if base is not object]

    # A base from elsewhere calls what it knows by name, as PyTorch calls forward.
    ours = (PACKAGE, cls.__module__.partition(".")[0])
    foreign = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ours and base not in _PLAIN]
    called = frozenset(
        member
        for member in members
        if (member.startswith("__") and member.endswith("__")) or any(hasattr(base, member) for base in foreign)
    )
    piece = _Piece(name, _sha("\n".join([*head, *gathered.bindings])), gathered.reached())
    return _ClassPieces(piece, members, called)


_PLAIN = {object, typing.Generic, typing.Protocol}


def _members(
    cls: type, node: ast.ClassDef, module: types.ModuleType
) -> tuple[dict[str, tuple[_Piece, ...]], list[ast.stmt]]:
    """Methods and constants of a class body by name, and the statements that count with the class itself.

    Fields of a dataclass, a named tuple or an enumeration are part of what the class is.
    """
    is_record = dataclasses.is_dataclass(cls) or issubclass(cls, (tuple, enum.Enum))
    members: dict[str, list[_Piece]] = {}
    statements: list[ast.stmt] = []
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            members.setdefault(statement.name, []).append(_method_piece(cls, statement, module))
            continue

        target = getattr(statement, "target", None) or (getattr(statement, "targets", None) or [None])[0]
        tree = _normalised(statement)
        if isinstance(target, ast.Name) and not is_record:
            gathered = _Gathered()
            gathered.add_tree(tree, vars(module), None, module, within=cls)
            text = "\n".join([_spelled(tree), *gathered.bindings])
            piece = _Piece(f"{cls.__module__}:{cls.__qualname__}.{target.id}", _sha(text), gathered.reached())
            members.setdefault(target.id, []).append(piece)
        elif not isinstance(tree, ast.Pass):
            statements.append(tree)

    return {name: tuple(pieces) for name, pieces in members.items()}, statements


def _method_piece(cls: type, node: ast.FunctionDef | ast.AsyncFunctionDef, module: types.ModuleType) -> _Piece:
    """A method with its decorators, which say how it is called."""
    tree, gathered = _normalised(node), _Gathered()
    decorators, tree.decorator_list = tree.decorator_list, []
    gathered.add_tree(tree, vars(module), _globals_of_method(cls, node), module)
    for decorator in decorators:
        gathered.add_tree(decorator, vars(module), None, module, within=cls)
    gathered.add_annotations(node, vars(module))
    text = "\n".join([_spelled(tree), *map(_spelled, decorators), *gathered.bindings])
    return _Piece(f"{cls.__module__}:{cls.__qualname__}.{node.name}", _sha(text), gathered.reached())


# Names


class _Gathered:
    """What syntax trees lead to, resolved in the module they stand in."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.attributes: set[str] = set()
        self.registries: list[tuple[str, Mapping[str, Any]]] = []
        self.bindings: list[str] = []  # what each global name means
        self.bound: set[str] = set()

    def reached(self) -> _Reached:
        """Each object once, and none that no walk would visit: walks are many, and what is gathered is kept."""
        objects = {id(target): target for target in map(_unwrapped, self.objects) if _may_be_walked(target)}
        return _Reached(tuple(objects.values()), frozenset(self.attributes), tuple(self.registries))

    def add_tree(
        self,
        tree: ast.AST,
        scope: Mapping[str, Any],
        allowed: frozenset[str] | None,
        module: types.ModuleType,
        within: type | None = None,
    ) -> None:
        """``allowed``: the names that are globals there; null: every name may be one.

        ``within``: the class whose body the tree is of, which may name its other members.
        """
        nodes = list(ast.walk(tree))
        named = {node.id for node in nodes if isinstance(node, ast.Name)}
        # Only where attributes are looked up by name may a string be one.
        by_name = not named.isdisjoint(_LOOKUPS)
        for node in nodes:
            if isinstance(node, ast.Attribute):
                self.attributes.add(node.attr)
                self._add_dotted(node, scope, allowed, by_name)
            elif isinstance(node, ast.Name):
                if within is not None and node.id in vars(within):
                    self.attributes.add(node.id)
                if (allowed is None or node.id in allowed) and node.id in scope:
                    self.add_value(node.id, scope[node.id], f"{module.__name__}.{node.id}", by_name)
            elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str):
                self.attributes.add(node.value)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(node, module)
        if "__file__" in named:
            self._add_data_files(tree, module)

    def _add_dotted(
        self, node: ast.Attribute, scope: Mapping[str, Any], allowed: frozenset[str] | None, by_name: bool
    ) -> None:
        """``module.name`` of a module of this package: the name is what counts."""
        path: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            path.insert(0, inner.attr)
            inner = inner.value
        if not isinstance(inner, ast.Name) or (allowed is not None and inner.id not in allowed):
            return
        value = scope.get(inner.id)
        for step, attribute in enumerate(path):
            if not (isinstance(value, types.ModuleType) and _in_package(value.__name__)):
                return
            label = f"{value.__name__}.{attribute}"
            value = getattr(value, attribute, None)
            if step == len(path) - 1 or not isinstance(value, types.ModuleType):
                self.add_value(label, value, label, by_name)

    def _add_import(self, node: ast.Import | ast.ImportFrom, module: types.ModuleType) -> None:
        """An import inside a function."""
        if isinstance(node, ast.Import) or node.module is None or not _in_package(node.module):
            return
        source = importlib.import_module(node.module)
        for alias in node.names:
            label = f"{source.__name__}.{alias.name}"
            self.add_value(label, getattr(source, alias.name, None), label)

    def _add_data_files(self, tree: ast.AST, module: types.ModuleType) -> None:
        """Files beside a module that finds them by ``__file__``: those whose names stand in the tree, by content."""
        folder = Path(module.__file__ or "").parent
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
                path = folder / node.value
                if path.is_file():
                    self.bindings.append(f"{node.value} {hashlib.sha256(path.read_bytes()).hexdigest()}")

    def add_annotations(self, node: ast.AST, scope: Mapping[str, Any]) -> None:
        """Classes that annotations name: they say whose methods are called; how they are written has no meaning."""
        for part in ast.walk(node):
            if not isinstance(part, (ast.arg, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            annotation = getattr(part, "annotation", None) or getattr(part, "returns", None)
            for name in ast.walk(annotation) if isinstance(annotation, ast.AST) else ():
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    value = scope.get(name.value)
                else:
                    value = scope.get(name.id) if isinstance(name, ast.Name) else None
                self.objects += [one for one in _types_in(value) if isinstance(one, type)]

    def add_value(self, label: str, value: Any, qualified: str = "", by_name: bool = False) -> None:
        """A global, a default or a closed-over variable called ``label``; ``by_name``: its strings may be attributes."""
        if label in self.bound:
            return
        self.bound.add(label)
        if label == "__file__" or (isinstance(value, types.ModuleType) and _in_package(value.__name__)):
            return  # by what is named of it
        text, inside = _described(value)
        if text == _UNKNOWN:
            text = self._add_assignment(label, qualified, text)
        self.bindings.append(f"{label} = {text}")
        self.objects += inside.objects
        self.registries += inside.registries
        self.attributes |= inside.attributes if by_name else set()

    def _add_assignment(self, label: str, qualified: str, text: str) -> str:
        """A value that cannot be told counts by the statement that makes it."""
        module = sys.modules.get(qualified.rpartition(".")[0])
        if module is None:
            return text
        for statement in _assignments(module).get(label, []):
            tree = _normalised(statement)
            text += _spelled(tree)
            self.add_tree(tree, vars(module), None, module)
        return text


def _types_in(value: Any) -> Iterator[Any]:
    """The classes an annotation's value is made of."""
    if isinstance(value, type) and not isinstance(value, types.GenericAlias):
        yield value
    for part in typing.get_args(value):
        yield from _types_in(part)


def _globals_of_method(cls: type, node: ast.FunctionDef | ast.AsyncFunctionDef) -> frozenset[str] | None:
    """As :func:`_globals_of`, of the method that ``node`` defines; null where it cannot be told."""
    held = vars(cls).get(node.name)
    accessors = (held.fget, held.fset, held.fdel) if isinstance(held, property) else (held,)
    for one in map(_unwrapped, filter(None, accessors)):
        code = getattr(one, "__code__", None)
        first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
        if code is not None and (code.co_firstlineno, code.co_name) == (first, node.name):
            return _globals_of(code)
    return None


def _globals_of(code: types.CodeType) -> frozenset[str]:
    """Names that a function, and the functions inside it, look up in their module."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return frozenset(own).union(*map(_globals_of, inner))


# Values

_UNKNOWN = "?"
_PRIMITIVES = (bool, int, float, complex, str, bytes, range, slice, type(...))


def _registry_kind(value: Any) -> str | None:
    """By what kind of name the entries of a registry are chosen; null: it is none."""
    if isinstance(value, Registry):
        return value.kind
    for qualified, kind in TABLES.items():
        module, _, name = qualified.rpartition(".")
        if isinstance(value, Mapping) and value is getattr(sys.modules.get(module), name, None):
            return kind
    return None


def _described(value: Any) -> tuple[str, _Reached]:
    """A value as text, the same in every process, and the objects of this project in it."""
    inside = _Gathered()
    return _text(value, inside), inside.reached()


def _text(value: Any, inside: _Gathered) -> str:
    if isinstance(value, enum.Enum):
        inside.objects.append(type(value))
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, _PRIMITIVES):
        if isinstance(value, str) and value.isidentifier():
            inside.attributes.add(value)
        return repr(value)

    if (kind := _registry_kind(value)) is not None:
        inside.registries.append((kind, value))
        inside.objects.append(type(value))
        return f"registry {kind}"
    for kinds, describe in _DESCRIPTIONS:
        if isinstance(value, kinds):
            return describe(value, inside)

    if dataclasses.is_dataclass(value):
        inside.objects.append(type(value))
        counted = [field for field in dataclasses.fields(value) if field.metadata.get("identity", True)]
        held = ", ".join(f"{field.name}={_text(getattr(value, field.name), inside)}" for field in counted)
        return f"{type(value).__module__}.{type(value).__qualname__}({held})"
    if typing.get_origin(value) is not None or type(value).__module__ == "typing":
        inside.objects += _types_in(value)
        return ", ".join(map(str, typing.get_args(value)))

    target = _unwrapped(value)
    if isinstance(target, (type, types.FunctionType, types.BuiltinFunctionType)):
        return _text(target, inside)
    return _UNKNOWN


def _callable_text(value: Any, inside: _Gathered) -> str:
    target = _unwrapped(value)
    inside.objects.append(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', repr(target))}"


def _mapping_text(value: Mapping[Any, Any], inside: _Gathered) -> str:
    return "{" + ", ".join(f"{_text(key, inside)}: {_text(one, inside)}" for key, one in value.items()) + "}"


def _sequence_text(value: Iterable[Any], inside: _Gathered) -> str:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        inside.objects.append(type(value))
    return f"{type(value).__name__}[" + ", ".join(_text(one, inside) for one in value) + "]"


def _partial_text(value: functools.partial, inside: _Gathered) -> str:
    return "partial " + _sequence_text([value.func, value.args, sorted(value.keywords.items())], inside)


def _path_text(value: Path, inside: _Gathered) -> str:
    """Where a file lies has no meaning; a data file of the project counts by content."""
    root = Path(__file__).parent
    if value.is_file() and value.resolve().is_relative_to(root):
        return f"{value.resolve().relative_to(root)} {hashlib.sha256(value.read_bytes()).hexdigest()}"
    return "path" if value.is_absolute() else repr(str(value))


_DESCRIPTIONS: tuple[tuple[Any, Callable[[Any, Any], str]], ...] = (
    ((type, types.FunctionType, types.BuiltinFunctionType, types.MethodType), _callable_text),
    (functools.partial, _partial_text),
    (types.ModuleType, lambda value, inside: value.__name__),
    (Mapping, _mapping_text),
    ((set, frozenset), lambda value, inside: "set" + str(sorted(_text(one, inside) for one in value))),
    ((list, tuple), _sequence_text),
    (Path, _path_text),
    (re.Pattern, lambda value, inside: f"{value.pattern!r} {int(value.flags)}"),
    ((torch.dtype, torch.device), lambda value, inside: str(value)),
    (torch.Tensor, lambda value, inside: f"{value.dtype} {value.tolist()}"),
    (np.ndarray, lambda value, inside: f"{value.dtype} {value.tolist()}"),
    (types.UnionType, lambda value, inside: " | ".join(_text(one, inside) for one in typing.get_args(value))),
)


# Syntax trees


@functools.cache
def _tree(module: types.ModuleType) -> ast.Module:
    return ast.parse(Path(inspect.getsourcefile(module) or "").read_text())


@functools.cache
def _definitions(module: types.ModuleType) -> dict[tuple[int, str], list[Any]]:
    """Functions and lambdas by their code's first line and name; lambdas of one line are not told apart."""
    definitions: dict[tuple[int, str], list[Any]] = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            definitions.setdefault((first, node.name), []).append(node)
        elif isinstance(node, ast.Lambda):
            definitions.setdefault((node.lineno, "<lambda>"), []).append(node)
    return definitions


@functools.cache
def _classes(module: types.ModuleType) -> dict[str, ast.ClassDef]:
    classes: dict[str, ast.ClassDef] = {}

    def gather(body: Iterable[ast.AST], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                classes[prefix + node.name] = node
                gather(node.body, f"{prefix}{node.name}.")

    gather(_tree(module).body, "")
    return classes


@functools.cache
def _assignments(module: types.ModuleType) -> dict[str, list[ast.stmt]]:
    """Module-level statements by the names they bind."""
    statements: dict[str, list[ast.stmt]] = {}
    for statement in _tree(module).body:
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    statements.setdefault(node.id, []).append(statement)
    return statements


class _Normaliser(ast.NodeTransformer):
    """Leaves out what has no meaning."""

    def _without_words(self, node: Any) -> Any:
        """A definition without docstring and bare strings."""
        node.body = [one for one in node.body if not _is_bare_string(one)] or [ast.Pass()]
        return self.generic_visit(node)

    visit_Module = visit_ClassDef = _without_words

    def visit_FunctionDef(self, node: Any) -> Any:
        node.returns = None
        return self._without_words(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            return self.generic_visit(ast.Assign(targets=[node.target], value=node.value))
        return ast.Expr(node.target)  # a field has a name and a place

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """What is raised counts, and nothing of what it says."""
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        node.msg = None
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Nothing of a statement that only refuses: a check decides whether there is a result, and not which."""
        called = node.value.func if isinstance(node.value, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return None if REFUSING.match(name) else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in SPEAKING:
            return _Wordless().visit(node)
        return self.generic_visit(node)


class _Wordless(ast.NodeTransformer):
    """Strings of a message."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")


def _is_bare_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _normalised(tree: Any) -> Any:
    return _Normaliser().visit(_copied(tree))


def _copied(node: Any) -> Any:
    """A tree that can be changed, of no place in a file; much faster than ``copy.deepcopy``."""
    if isinstance(node, list):
        return [_copied(one) for one in node]
    if not isinstance(node, ast.AST):
        return node
    copy = type(node)()
    for name in node._fields:
        value = getattr(node, name, None)
        setattr(copy, name, _copied(value) if isinstance(value, (ast.AST, list)) else value)
    return copy


_UNSPELLED = frozenset(("ctx", "kind", "type_comment", "type_params"))


def _spelled(node: Any) -> str:
    """A tree as text that is the same in every version of Python: fields that are empty are left out."""
    if isinstance(node, list):
        return "[" + ",".join(map(_spelled, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    held = [
        f"{name}={_spelled(value)}"
        for name in node._fields
        if name not in _UNSPELLED and (value := getattr(node, name, None)) is not None and value != []
    ]
    if isinstance(node, ast.Constant) and node.value is None:
        held = ["None"]
    return f"{type(node).__name__}({','.join(held)})"
