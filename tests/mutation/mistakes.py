"""The mistakes that one can make in a line: every one-line mutant of a source text.

    a < b    a <= b        a + b    a - b        and    or        if x    if not (x)        3    4
    a is b   a is not b    a * b    a / b        x(y)   pass      -x      x                 True False

Never inside what a program says (strings, what is raised or logged), in what only a type checker reads, or in a named
constant of a module, whose value is a choice.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
}  # fmt: skip
UNTESTABLE_HERE = ("cuda", "gpu", "pin_memory", "logging", "log.")
"""Words of lines that no test on a CPU can judge, or that only say something."""


@dataclass(frozen=True)
class Mistake:
    """`line` (from 1) of a file reads `after` instead of `before`; `statement` is the line its statement begins on."""

    line: int
    statement: int
    before: str
    after: str


def mistakes(source: str) -> list[Mistake]:
    """All of a file, in order; each is still Python."""
    lines = source.splitlines()
    body = [s for s in ast.parse(source).body if not isinstance(s, ast.Assign | ast.AnnAssign)]
    found = dict.fromkeys(_of_body(body, lines))
    return [m for m in found if m.before != m.after and not _untestable(m.before) and _is_python(lines, m)]


def _untestable(line: str) -> bool:
    return any(word in line.lower() for word in UNTESTABLE_HERE)


def _is_python(lines: list[str], m: Mistake) -> bool:
    changed = [*lines[: m.line - 1], m.after, *lines[m.line :]]
    try:
        compile("\n".join(changed), "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _of_body(body: list[ast.stmt], lines: list[str]) -> Iterator[Mistake]:
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield from _of_body(statement.body, lines)
            case (
                ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Import() | ast.ImportFrom() | ast.Raise() | ast.Assert()
            ):
                continue
            case _:
                yield from _of_statement(statement, lines)


def _of_statement(statement: ast.stmt, lines: list[str]) -> Iterator[Mistake]:
    at = statement.lineno
    match statement:
        case ast.Expr(value=ast.Call()) if statement.end_lineno == at:
            yield Mistake(at, at, lines[at - 1], lines[at - 1][: statement.col_offset] + "pass")
        case ast.Expr(value=ast.Constant()):
            return  # a docstring
        case ast.If(test=test) | ast.While(test=test) if test.end_lineno == test.lineno:
            text = _text(test, lines)
            yield _replaced(test, lines, f"not ({text})", at)
        case ast.AugAssign(op=op) if type(op) in ARITHMETIC and statement.end_lineno == at:
            old, new = ARITHMETIC[type(op)]
            yield Mistake(at, at, lines[at - 1], lines[at - 1].replace(f"{old}=", f"{new}=", 1))
        case _:
            pass
    for name, value in ast.iter_fields(statement):
        if name in ("body", "orelse", "finalbody"):
            yield from _of_body(value, lines)
        elif name == "handlers":
            for handler in value:
                yield from _of_body(handler.body, lines)
        elif name == "cases":
            for case in value:
                yield from _of_body(case.body, lines)
        elif name != "annotation":
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _of_expression(child, lines, at)


def _of_expression(node: ast.AST, lines: list[str], at: int) -> Iterator[Mistake]:
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.expr) and node.lineno == node.end_lineno:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in COMPARISONS:
                yield from _between(left, right, *COMPARISONS[type(op)], lines, at)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                yield from _between(left, right, *ARITHMETIC[type(op)], lines, at)
            case ast.BoolOp(op=op, values=[left, right]):
                swap = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                yield from _between(left, right, *swap, lines, at)
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield _replaced(node, lines, _text(operand, lines), at)
            case ast.Constant(value=bool(value)):
                yield _replaced(node, lines, str(not value), at)
            case ast.Constant(value=int(value)):
                yield _replaced(node, lines, str(value + 1), at)
            case ast.Constant(value=float(value)):
                yield _replaced(node, lines, repr(value * 2 if value else 1.0), at)
            case _:
                pass
    for child in ast.iter_child_nodes(node):
        yield from _of_expression(child, lines, at)


def _between(left: ast.expr, right: ast.expr, old: str, new: str, lines: list[str], at: int) -> Iterator[Mistake]:
    """The operator between two expressions of one line."""
    line = lines[left.lineno - 1]
    begin, end = _column(line, left.end_col_offset or 0), _column(line, right.col_offset)
    middle = line[begin:end]
    if old in middle:
        yield Mistake(left.lineno, at, line, line[:begin] + middle.replace(old, new, 1) + line[end:])


def _replaced(node: ast.expr, lines: list[str], new: str, at: int) -> Mistake:
    line = lines[node.lineno - 1]
    begin, end = _column(line, node.col_offset), _column(line, node.end_col_offset or 0)
    return Mistake(node.lineno, at, line, line[:begin] + new + line[end:])


def _text(node: ast.expr, lines: list[str]) -> str:
    line = lines[node.lineno - 1]
    return line[_column(line, node.col_offset) : _column(line, node.end_col_offset or 0)]


def _column(line: str, offset: int) -> int:
    """Python counts a node's place in bytes of UTF-8."""
    return len(line.encode()[:offset].decode())
