"""`--filter`: which objects are reported, by a condition on their measurements that is parsed, never run."""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from darcnn.runtime.errors import UsageError

__all__ = ["RowFilter", "parse_filter"]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_JOINT = ("mean_intensity", "std_intensity")  # without a channel: the mean over all channels
_NO_MEASUREMENTS = ("id", "geometry")  # ids are given to what the filter keeps
_EXAMPLE = 'use a condition such as "mean_intensity < 140 and area_px > 20"'


@dataclass(frozen=True, slots=True)
class RowFilter:
    """A condition on the columns of the table of objects."""

    text: str
    tree: ast.expr

    def require_known(self, units: tuple[str, ...], *, where: object, fix: str) -> None:
        """Refuse a condition on columns in `units` that are not known; `fix` is the option that tells.

        Raises:
            UsageError: it names such a column.
        """
        names = sorted({node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)})
        unknown = [name for name in names if name.endswith(units)]
        if unknown:
            raise UsageError(
                f"{unknown[0]} is not known of {where}, which tells no pixel size",
                where="--filter",
                fix=f"pass {fix}, or use columns in pixels",
            )

    def keep(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return which rows of `table` satisfy the condition, (N,); what is not known satisfies none."""
        with np.errstate(all="ignore"):
            return _is_true(self.tree, table, negated=False)


def parse_filter(text: str, columns: list[str]) -> RowFilter:
    """Return the condition that `text` states.

    Names of columns, numbers, `< <= > >= == !=`, `+ - * /`, `and or not` and parentheses; `mean_intensity`
    and `std_intensity` without a channel stand for the mean over all. The paper drops findings by such a
    rule (DARCNN, section 4).

    Args:
        text: what the user wrote.
        columns: of the table of objects.
    Raises:
        UsageError: it is no such condition, or names a column that is not there or is no measurement.

    >>> table = pa.table({"area_px": [5, 30], "mean_intensity_DAPI": [90.0, 150.0]})
    >>> parse_filter("area_px > 20 or mean_intensity < 100", table.column_names).keep(table)
    array([ True,  True])
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as err:
        raise UsageError(f"{text!r} is no condition", where="--filter", fix=_EXAMPLE) from err
    if not isinstance(tree, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        raise UsageError(f"{text!r} is neither true nor false", where="--filter", fix=_EXAMPLE)
    measured = [name for name in columns if name not in _NO_MEASUREMENTS]
    for node in ast.walk(tree):
        _check(node, text, measured)
    _check_kinds(tree, text)
    return RowFilter(text, tree)


def _check(node: ast.AST, text: str, columns: list[str]) -> None:
    if isinstance(node, ast.Name):
        if node.id not in columns and not (node.id in _JOINT and _of(node.id, columns)):
            raise UsageError(f"no column {node.id}", where="--filter", fix=f"use {', '.join(columns)}")
        return
    is_number = (
        isinstance(node, ast.Constant)
        and isinstance(node.value, (int, float))
        and not isinstance(node.value, bool)
        and abs(node.value) <= sys.float_info.max
    )
    is_sign = isinstance(node, (ast.Not, ast.USub))
    known = (ast.Compare, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.BinOp, ast.Load)
    if not (
        is_number
        or is_sign
        or isinstance(node, known)
        or type(node) in _COMPARISONS
        or type(node) in _ARITHMETIC
    ):
        raise UsageError(f"{text!r} holds more than a condition", where="--filter", fix=_EXAMPLE)


def _check_kinds(node: ast.expr, text: str, *, wants_truth: bool = True) -> None:
    """Refuse numbers where a condition must be, and conditions where a number must be."""
    if isinstance(node, ast.Name):  # either: a column may hold truths, such as `truncated`
        return
    is_truth = isinstance(node, (ast.Compare, ast.BoolOp)) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )
    if is_truth != wants_truth:
        raise UsageError(f"{text!r} is neither true nor false", where="--filter", fix=_EXAMPLE)
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.expr):
            _check_kinds(part, text, wants_truth=is_truth and not isinstance(node, ast.Compare))


def _is_true(node: ast.expr, table: pa.Table, *, negated: bool) -> NDArray[np.bool_]:
    """Return for which rows a condition, or its opposite if `negated`, holds whatever is not known.

    A comparison with what is not known is neither true nor false (Kleene's logic).
    """
    match node:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _is_true(operand, table, negated=not negated)
        case ast.BoolOp(op=joint, values=parts):
            join = np.logical_and if isinstance(joint, ast.And) != negated else np.logical_or
            return np.asarray(join.reduce([_is_true(part, table, negated=negated) for part in parts]))
        case ast.Compare():
            sides = [_number(side, table) for side in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            found = np.logical_and.reduce([_COMPARISONS[type(op)](a, b) for op, a, b in pairs])
            known = np.logical_and.reduce([~np.isnan(side) for side in sides])
            return np.asarray(known & (~found if negated else found))
        case ast.Name():
            column = _number(node, table)
            return np.asarray(~np.isnan(column) & ((column == 0) == negated))
    raise AssertionError(f"{node} was let through")


def _number(node: ast.expr, table: pa.Table) -> NDArray[np.float64]:
    """Return what an expression is worth in each row, NaN where that is not known."""
    match node:
        case ast.Constant(value=value):
            return np.full(table.num_rows, value, np.float64)
        case ast.Name():
            names = [node.id] if node.id in table.column_names else _of(node.id, table.column_names)
            return np.asarray(np.mean([_as_written(table[name]) for name in names], axis=0))
        case ast.UnaryOp(operand=operand):
            return -_number(operand, table)
        case ast.BinOp(left=left, op=sign, right=right):
            return np.asarray(_ARITHMETIC[type(sign)](_number(left, table), _number(right, table)))
    raise AssertionError(f"{node} was let through")


def _as_written(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return a column as the CSV has it: 0.9 is 0.9, and not the float32 beside it."""
    written = column.cast(pa.string()).cast(pa.float64()) if column.type == pa.float32() else column
    return np.asarray(written.to_numpy().astype(np.float64))


def _of(name: str, columns: list[str]) -> list[str]:
    return [column for column in columns if column.startswith(f"{name}_")]
