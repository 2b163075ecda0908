"""`--where`: conditions on the manifest's columns, as in `split = 'val' and duration_s < 30`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, options: value in options,
    ast.NotIn: lambda value, options: value not in options,
}
_QUOTED = re.compile(r"('(?:[^'\\]|\\.|'')*'|\"(?:[^\"\\]|\\.)*\")")


def find_columns(where: str, known: list[str]) -> list[str]:
    """The columns that a condition names.

    Raises:
        ConfigError: If it is no condition, or names a column that is not there.
    """
    names = sorted({node.id for node in ast.walk(_parse(where)) if isinstance(node, ast.Name)})
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--where names {', '.join(unknown)}; the columns are {', '.join(known)}")
    return names


def filter_rows(table: pa.Table, where: str) -> np.ndarray:
    """Which rows of a table fulfil a condition, (rows,) bool; where a value is missing, comparisons are false.

    Args:
        table: With the columns that the condition names.
        where: Comparisons (`=`, `!=`, `<`, `<=`, `>`, `>=`, `in ('a', 'b')`) joined by and, or, not and parentheses.

    Raises:
        ConfigError: If it is anything else, or compares texts with numbers.
    """
    condition = _parse(where)
    names = find_columns(where, table.column_names)
    columns = table.select(names).to_pylist() if names else [{}] * len(table)
    try:
        return np.array([_evaluate(condition, row) for row in columns], dtype=bool)
    except TypeError as error:
        raise ConfigError(f"--where {where!r} compares what cannot be compared: {error}") from error


def _parse(where: str) -> ast.expr:
    # SQL's = and <> as Python has them, outside of quotes.
    parts = _QUOTED.split(where)
    for place in range(0, len(parts), 2):
        text = re.sub(r"(?<![<>!=])=(?!=)", "==", parts[place]).replace("<>", "!=")
        parts[place] = re.sub(r"\b(AND|OR|NOT|IN)\b", lambda match: match[0].lower(), text)
    for place in range(1, len(parts), 2):
        if parts[place].startswith("'"):  # SQL's '' inside of quotes
            inner = parts[place][1:-1].replace("''", "\\'")
            parts[place] = f"'{inner}'"
    try:
        tree = ast.parse("".join(parts).strip(), mode="eval").body
    except SyntaxError as error:
        raise _refuse(where) from error
    _check(tree, where)
    return tree


def _check(node: ast.expr, where: str) -> None:
    """Refuse all but conditions: nothing that could call or look anything up."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            _check(value, where)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        _check(node.operand, where)
    else:
        is_plain = isinstance(node, ast.Compare) and all(map(_is_operand, _operands(node)))
        if not is_plain or any(type(op) not in _COMPARISONS for op in node.ops):  # type: ignore[attr-defined]
            raise _refuse(where)


def _is_operand(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple | ast.List):
        return all(_is_constant(element) for element in node.elts)
    return isinstance(node, ast.Name) or _is_constant(node)


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


def _refuse(where: str) -> ConfigError:
    return ConfigError(f"--where takes conditions such as \"split = 'val' and duration_s < 30\"; found {where!r}")


def _evaluate(node: ast.expr, row: dict[str, Any]) -> bool:
    if isinstance(node, ast.BoolOp):
        join = all if isinstance(node.op, ast.And) else any
        return join(_evaluate(value, row) for value in node.values)
    if isinstance(node, ast.UnaryOp):  # no other than `not` was let through
        return not _evaluate(node.operand, row)
    assert isinstance(node, ast.Compare)
    values = [row[part.id] if isinstance(part, ast.Name) else ast.literal_eval(part) for part in _operands(node)]
    if any(value is None for value in values):
        return False
    return all(_compare(op, *pair) for op, pair in zip(node.ops, pairwise(values), strict=True))


def _compare(op: ast.cmpop, left: Any, right: Any) -> bool:
    if isinstance(op, ast.In | ast.NotIn):
        right = tuple(right) if isinstance(right, tuple | list) else (right,)  # ('a') is a text to Python
    for one in right if isinstance(right, tuple) else (right,):
        if isinstance(left, str) != isinstance(one, str):
            raise TypeError(f"{left!r} with {one!r}")
    return _COMPARISONS[type(op)](left, right)


def _operands(node: ast.Compare) -> list[ast.expr]:
    return [node.left, *node.comparators]
