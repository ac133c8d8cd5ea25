"""One-line changes of meaning, drawn from a seed: of numbers, operators, conditions, calls, and statements left out."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "+", ast.Pow: "*"}
NAMES = {
    "argmax": "argmin", "argmin": "argmax", "amax": "amin", "amin": "amax", "max": "min", "min": "max", "sum": "mean",
    "mean": "sum", "cumsum": "cumprod", "floor": "ceil", "ceil": "floor", "exp": "abs", "softmax": "log_softmax",
    "zeros": "ones", "ones": "zeros",
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """``old`` → ``new`` in line ``line`` (from 1) of ``file``, from column ``column`` on (bytes)."""

    file: str
    line: int
    column: int
    old: str
    new: str

    def applied(self, text: str) -> str:
        lines = text.split("\n")
        content = lines[self.line - 1].encode()
        end = self.column + len(self.old.encode())
        assert content[self.column : end].decode() == self.old
        lines[self.line - 1] = (content[: self.column] + self.new.encode() + content[end:]).decode()
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.old} → {self.new}"


def draw(root: Path, files: Sequence[str], count: int, seed: int) -> list[Change]:
    """``count`` changes, as evenly over ``files`` (below ``root``) as they have lines that can be changed."""
    generator = random.Random(seed)
    order = sorted(files)
    generator.shuffle(order)  # few changes are not always of the same files
    possible, meaning = {}, {}
    for file in order:
        text = (root / file).read_text()
        listed = list(dict.fromkeys(changes_of(file, text)))
        generator.shuffle(listed)
        possible[file], meaning[file] = listed, (text, ast.dump(ast.parse(text)))
    chosen: list[Change] = []
    while len(chosen) < count and any(possible.values()):
        for file in order:
            # Most candidates are never drawn: only those that are get parsed.
            while possible[file] and len(chosen) < count:
                change = possible[file].pop()
                if _means_something_else(change, *meaning[file]):
                    chosen.append(change)
                    break
    return chosen


def _means_something_else(change: Change, text: str, meaning: str) -> bool:
    """Whether the changed text still parses, and to something else than ``meaning``, a dump of its tree."""
    try:
        return ast.dump(ast.parse(change.applied(text))) != meaning
    except (SyntaxError, AssertionError):
        return False


def changes_of(file: str, text: str) -> Iterator[Change]:
    """Every candidate for a change of one line that this module knows; some do not parse, or change nothing."""
    lines = text.split("\n")
    for node in _meaningful(ast.parse(text)):
        for start, old, new in _replacements(node, lines):
            yield Change(file, start[0], start[1], old, new)


def _meaningful(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but annotations, docstrings, imports, and what errors and assertions say."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "msg", "exc", "cause", "type_params"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST) or isinstance(node, (ast.Import, ast.ImportFrom, ast.Assert)):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            yield node
            yield from _meaningful(node)


Replacement = tuple[tuple[int, int], str, str]  # line and column, old, new


def _replacements(node: ast.AST, lines: Sequence[str]) -> Iterator[Replacement]:
    if getattr(node, "lineno", None) is None or node.lineno != node.end_lineno:
        return
    start, old = (node.lineno, node.col_offset), _text(node, lines)
    match node:
        case ast.Constant(value=bool()):
            yield start, old, str(not node.value)
        case ast.Constant(value=int()):
            yield start, old, str(node.value + 1)
        case ast.Constant(value=float()):
            yield start, old, repr(node.value * 1.5 + 0.25)
        case ast.Compare(ops=[op]):
            yield start, old, f"{_text(node.left, lines)} {COMPARISONS[type(op)]} {_text(node.comparators[0], lines)}"
        case ast.BinOp() if type(node.op) in OPERATORS:
            yield start, old, f"{_text(node.left, lines)} {OPERATORS[type(node.op)]} {_text(node.right, lines)}"
        case ast.BoolOp(values=[first, second]):
            word = "or" if isinstance(node.op, ast.And) else "and"
            yield start, old, f"{_text(first, lines)} {word} {_text(second, lines)}"
        case ast.UnaryOp():
            yield start, old, f"({_text(node.operand, lines)})"
        case ast.IfExp():
            yield (
                start,
                old,
                f"({_text(node.orelse, lines)} if {_text(node.test, lines)} else {_text(node.body, lines)})",
            )
        case ast.Attribute(attr=name) if name in NAMES:
            yield start, old, f"{_text(node.value, lines)}.{NAMES[name]}"
        case ast.Name(id=name) if name in ("max", "min"):
            yield start, old, NAMES[name]
        case ast.Expr() | ast.AugAssign():
            yield start, old, "pass"


def _text(node: ast.AST, lines: Sequence[str]) -> str:
    return lines[node.lineno - 1].encode()[node.col_offset : node.end_col_offset].decode()
