"""One-token changes of Python source that should make a test fail: where they are and what they make of the text.

Text for people is left alone: strings, `raise` statements, annotations, and imports.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "in": "not in", "not in": "in", "is": "is not", "is not": "is",
}  # fmt: skip
INVERTED = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
OPERATORS = {"+": "-", "-": "+", "*": "//", "/": "*", "//": "*", "%": "*", "**": "*", "&": "|", "|": "&"}
SYMBOLS = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in",
    ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/",
    ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.BitAnd: "&", ast.BitOr: "|", ast.And: "and", ast.Or: "or",
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all", "all": "any"}
LEFT_ALONE = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert)


class Mutation(NamedTuple):
    """Bytes start..end of a file become `new`. line: counted from 1; old: what stood there."""

    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        """The changed file."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def mutations(source: bytes) -> list[Mutation]:
    """All that can be changed in a file, in the order of the text."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return sorted(set(finder.found), key=lambda m: (m.start, m.kind, m.new))


class _Finder:
    def __init__(self, source: bytes):
        self._source, self.found = source, []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        """Collect what can be changed in a node and below it."""
        if isinstance(node, LEFT_ALONE):
            return
        for kind, start, end, new in self._of(node):
            line = next(i for i, at in enumerate(self._starts) if at > start)
            self.found.append(Mutation(kind, line, start, end, self._source[start:end].decode(), new))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def _of(self, node: ast.AST) -> Iterator[tuple[str, int, int, str]]:
        match node:
            case ast.Compare():
                for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    symbol = SYMBOLS[type(op)]
                    yield from self._operator("comparison", left, right, symbol, COMPARISONS[symbol])
                    if symbol in INVERTED:
                        yield from self._operator("comparison", left, right, symbol, INVERTED[symbol])
            case ast.BinOp(op=op) if (symbol := SYMBOLS.get(type(op))) in OPERATORS:
                yield from self._operator("arithmetic", node.left, node.right, symbol, OPERATORS[symbol])
            case ast.BoolOp():
                symbol, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self._operator("and/or", left, right, symbol, other)
            case ast.UnaryOp(op=ast.Not()):
                yield "not", self._start(node), self._start(node) + len("not "), ""
            case ast.IfExp():
                yield "condition", *self._span(node.test), f"not ({self._text(node.test)})"
            case ast.Constant(value=bool(value)):
                yield "bool", *self._span(node), str(not value)
            case ast.Constant(value=int() | float() as value):
                yield "constant", *self._span(node), repr(value + 1)
                if value:
                    yield "constant", *self._span(node), repr(value - 1) if value >= 1 else "0.0"
            case ast.Return(value=ast.expr() as value) if self._text(value) != "None":
                yield "return", *self._span(value), "None"
            case ast.Call():
                yield from self._call(node)
            case ast.Slice():
                for bound in (node.lower, node.upper):
                    if bound is not None and not isinstance(bound, ast.Constant):
                        yield "slice", *self._span(bound), f"{self._text(bound)} + 1"

    def _call(self, node: ast.Call) -> Iterator[tuple[str, int, int, str]]:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if name in CALLS:
            end = self._end(node.func)
            yield "call", end - len(name), end, CALLS[name]
        plain = not node.keywords and not any(isinstance(arg, ast.Starred) for arg in node.args)
        if plain and len(node.args) == 2 and name not in CALLS and name not in ("isinstance", "getattr"):
            first, second = node.args
            between = self._source[self._end(first) : self._start(second)].decode()
            new = self._text(second) + between + self._text(first)
            yield "swapped arguments", self._start(first), self._end(second), new

    def _operator(
        self, kind: str, left: ast.expr, right: ast.expr, symbol: str, new: str
    ) -> Iterator[tuple[str, int, int, str]]:
        """The operator between two operands, which brackets and comments may surround."""
        start = self._end(left)
        between = self._source[start : self._start(right)].decode()
        word = rf"\b{symbol}\b".replace(" ", r"\s+") if symbol[0].isalpha() else re.escape(symbol)
        found = re.search(word, between)
        if found and "#" not in between:
            yield kind, start + found.start(), start + found.end(), new

    def _start(self, node: ast.expr) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.expr) -> int:
        return self._starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)

    def _span(self, node: ast.expr) -> tuple[int, int]:
        return self._start(node), self._end(node)

    def _text(self, node: ast.expr) -> str:
        return self._source[self._start(node) : self._end(node)].decode()
