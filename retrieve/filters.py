"""`--where`: conditions on the manifest's columns, as in `split = 'val' and duration_s < 30`.

A condition is parsed as Python has it (and never run), and computed column by column: a million rows take milliseconds.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigError

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_QUOTED = re.compile(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")")


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
        where: Comparisons (`=`, `!=`, `<`, `<=`, `>`, `>=`, `in ('a', 'b')`, `is null`) joined by and, or, not and
            parentheses. Texts stand in quotes; a quote inside is doubled, a backslash means itself.

    Raises:
        ConfigError: If it is anything else, or compares texts with numbers.
    """
    find_columns(where, table.column_names)
    try:
        return _evaluate(_parse(where), table).to_numpy()
    except RecursionError as error:
        raise _refuse(where) from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"--where {where!r} compares what cannot be compared: {error}") from error


def _parse(where: str) -> ast.expr:
    # SQL's =, <>, null and quotes as Python has them.
    parts = _QUOTED.split(where)
    for place in range(0, len(parts), 2):
        text = re.sub(r"(?<![<>!=])=(?!=)", "==", parts[place]).replace("<>", "!=")
        text = re.sub(r"\b(AND|OR|NOT|IN|IS)\b", lambda match: match[0].lower(), text)
        parts[place] = re.sub(r"\bnull\b", "None", text, flags=re.IGNORECASE)
    for place in range(1, len(parts), 2):
        quote = parts[place][0]
        parts[place] = f" {parts[place][1:-1].replace(2 * quote, quote)!r}"  # the space: no prefix, as in r'a'
    try:
        tree = ast.parse("".join(parts).strip(), mode="eval").body
        is_condition = _is_condition(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise _refuse(where) from error
    if not is_condition:
        raise _refuse(where)
    return tree


def _is_condition(node: ast.expr) -> bool:
    """Whether there is nothing in it that could call or look anything up."""
    if isinstance(node, ast.BoolOp):
        return all(map(_is_condition, node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _is_condition(node.operand)
    return (
        isinstance(node, ast.Compare)
        and all(isinstance(left, ast.Name) or isinstance(right, ast.Name) for _, left, right in _pairs(node))
        and all(map(_is_operand, [node.left, *node.comparators]))
    )


def _is_operand(node: ast.expr) -> bool:
    if isinstance(node, ast.Tuple | ast.List):
        return all(map(_is_constant, node.elts))
    return isinstance(node, ast.Name) or _is_constant(node)


def _is_constant(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


def _refuse(where: str) -> ConfigError:
    shown = where if len(where) <= 200 else f"{where[:200]}..."
    return ConfigError(f"--where takes conditions such as \"split = 'val' and duration_s < 30\"; found {shown!r}")


def _evaluate(node: ast.expr, table: pa.Table) -> pa.ChunkedArray:
    """(rows,) bool, without nulls."""
    if isinstance(node, ast.BoolOp):
        join = pc.and_ if isinstance(node.op, ast.And) else pc.or_
        return reduce(join, (_evaluate(value, table) for value in node.values))
    if isinstance(node, ast.UnaryOp):  # no other than `not` was let through
        return pc.invert(_evaluate(node.operand, table))
    assert isinstance(node, ast.Compare)
    return reduce(pc.and_, (_compare(*pair, table).fill_null(False) for pair in _pairs(node)))


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, table: pa.Table) -> pa.ChunkedArray:
    if isinstance(op, ast.Is | ast.IsNot):
        if not isinstance(left, ast.Name) or not _is_null(right):
            raise TypeError("`is` goes with null alone")
        return table[left.id].is_null() if isinstance(op, ast.Is) else table[left.id].is_valid()
    if _is_null(left) or _is_null(right):
        raise TypeError("nothing equals a missing value; write `is null` or `is not null`")
    if isinstance(op, ast.In | ast.NotIn):
        return _look_up(op, left, right, table)
    if isinstance(left, ast.Tuple | ast.List) or isinstance(right, ast.Tuple | ast.List):
        raise TypeError("several values go with `in`")
    known = [_read_column(side, table) if isinstance(side, ast.Name) else None for side in (left, right)]
    type_ = next(column.type for column in known if column is not None)
    sides = [
        column if column is not None else pa.scalar(_read_constant(side, type_), type_)
        for column, side in zip(known, (left, right), strict=True)
    ]
    if sides[0].type != sides[1].type:
        raise TypeError("texts with numbers")
    return _COMPARISONS[type(op)](*sides)


def _look_up(op: ast.cmpop, left: ast.expr, right: ast.expr, table: pa.Table) -> pa.ChunkedArray:
    if not isinstance(left, ast.Name) or isinstance(right, ast.Name):
        raise TypeError("`in` wants a column, and values such as ('a', 'b')")
    column = _read_column(left, table)
    options = right.elts if isinstance(right, ast.Tuple | ast.List) else [right]  # ('a') is a text to Python
    values = [_read_constant(option, column.type) for option in options]
    is_member = pc.is_in(column, value_set=pa.array(values, column.type))
    return is_member if isinstance(op, ast.In) else pc.and_not(column.is_valid(), is_member)


def _pairs(node: ast.Compare) -> list[tuple[ast.cmpop, ast.expr, ast.expr]]:
    """`a < b <= c` is two comparisons."""
    operands = pairwise([node.left, *node.comparators])
    return [(op, left, right) for op, (left, right) in zip(node.ops, operands, strict=True)]


def _is_null(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _read_column(name: ast.Name, table: pa.Table) -> pa.ChunkedArray:
    """A column as texts or as float64, which all numbers of a manifest fit."""
    column = table[name.id]
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.cast(pa.float64())
    raise TypeError(f"{name.id} holds neither texts nor numbers")


def _read_constant(node: ast.expr, type_: pa.DataType) -> str | float:
    value = ast.literal_eval(node)
    if type_ == pa.string() and isinstance(value, str):
        return value
    if type_ == pa.float64() and type(value) in (int, float):
        return float(value)
    raise TypeError(f"{value!r} with {'texts' if type_ == pa.string() else 'numbers'}")
