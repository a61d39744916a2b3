"""Reward expressions: `0.5 * (watch_s > 10) + 5 * like`, a whitelist of Python's syntax over behaviours, evaluated on whole columns.

There are numbers, behaviours, `+ - *`, division by a number, comparisons (1 or 0), `min`, `max` and `log1p`, which is 0 below 0. Interval
arithmetic says how large each part can become, in the 32 bits that it is evaluated in: rounding is monotone, so that no value leaves its
interval, and where all intervals are finite the expression is, whatever a client sends.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from functools import cache, reduce
from typing import Any

import numpy as np

from esrl_ray.vocabulary import Floats

MAX_LENGTH = 2_000
MAX_DEPTH = 100  # brackets, signs and summands inside each other: Python's own stack ends at some 300 of them
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_Interval = tuple[np.float32, np.float32]
_MOST = float(np.finfo(np.float32).max)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "min": lambda *values: reduce(np.minimum, values),
    "max": lambda *values: reduce(np.maximum, values),
    "log1p": lambda value: np.log1p(np.maximum(value, np.float32(0))),
}
RESERVED = frozenset(_FUNCTIONS)
"""Names that no behaviour may have."""
_ALLOWED = f"there are numbers, behaviours, + - *, division by a number, comparisons, {', '.join(_FUNCTIONS)}"
_INSTEAD = {
    ast.BoolOp: "`and` is a product of comparisons, `or` the max of them",
    ast.IfExp: "multiply by a comparison",
    ast.Pow: "write a product",
    ast.Not: "turn the comparison round",
}


@cache
def parse(text: str, names: tuple[str, ...]) -> ast.expr:
    """Read and check an expression.

    Args:
        text: The expression.
        names: Behaviours that it may use.

    Raises:
        ValueError: it is not one; the message names the column and what is allowed.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{len(text)} characters, at most {MAX_LENGTH}")
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        at = f" at column {error.offset}" if isinstance(error, SyntaxError) and error.offset is not None else ""
        raise ValueError(f"not an expression{at}: {text!r}; {_ALLOWED}") from error
    if (depth := _depth(node)) > MAX_DEPTH:
        raise ValueError(f"{depth} parts inside each other, at most {MAX_DEPTH}: put brackets round halves of a long sum")
    _check(node, names)
    if not used(node):
        raise ValueError(f"{text!r} uses no behaviour")
    return node


def used(node: ast.expr) -> set[str]:
    """Behaviours in an expression."""
    functions = {id(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in functions}


def evaluate(node: ast.expr, columns: Mapping[str, Any]) -> Floats:
    """Value of an expression for whole columns, float32; columns and results have one shape."""
    match node:
        case ast.Constant(value=int() | float() as number):
            value: Any = np.float32(number)
        case ast.Name(id=name):
            value = columns[name]
        case ast.UnaryOp(op=op, operand=operand):
            value = -evaluate(operand, columns) if isinstance(op, ast.USub) else evaluate(operand, columns)
        case ast.BinOp(left=left, op=op, right=right):
            value = _ARITHMETIC[type(op)](evaluate(left, columns), evaluate(right, columns))
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [evaluate(side, columns) for side in (left, *others)]
            holds = (_COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
            value = reduce(np.logical_and, holds).astype(np.float32)
        case ast.Call(func=ast.Name(id=name), args=args):
            value = _FUNCTIONS[name](*(evaluate(argument, columns) for argument in args))
    return value  # type: ignore[no-any-return]  # what `parse` lets through is one of these


def bounds(node: ast.expr, ranges: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Smallest and largest value that `evaluate` cannot pass, given the ranges of its behaviours.

    Raises:
        ValueError: a part of the expression can exceed what 32 bits hold, infinity times 0 would be no number.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = _interval(node, {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()})
    return float(low), float(high)


def _interval(node: ast.expr, ranges: Mapping[str, _Interval]) -> _Interval:
    found = np.float32(0), np.float32(1)  # of a comparison
    match node:
        case ast.Constant(value=int() | float() as number):
            found = np.float32(number), np.float32(number)
        case ast.Name(id=name):
            found = ranges[name]
        case ast.UnaryOp(op=op, operand=operand):
            low, high = _interval(operand, ranges)
            found = (-high, -low) if isinstance(op, ast.USub) else (low, high)
        case ast.BinOp(left=left, op=op, right=right):
            (a, b), (c, d) = _interval(left, ranges), _interval(right, ranges)
            c, d = (d, c) if isinstance(op, ast.Sub) else (c, d)
            corners = [(a, c), (b, d), *([(a, d), (b, c)] if isinstance(op, ast.Mult | ast.Div) else [])]
            values = [_ARITHMETIC[type(op)](x, y) for x, y in corners]
            found = min(values), max(values)
        case ast.Compare(left=left, comparators=others):
            for side in (left, *others):
                _interval(side, ranges)
        case ast.Call(func=ast.Name(id=name), args=args):
            lows, highs = zip(*(_interval(argument, ranges) for argument in args), strict=True)
            found = _FUNCTIONS[name](*lows), _FUNCTIONS[name](*highs)  # all of them are monotone
    if not np.isfinite(found).all():
        raise ValueError(f"{ast.unparse(node)!r} can exceed {_MOST:.1e}, the most that 32 bits hold, with the caps of the behaviours")
    return found


def summands(node: ast.expr) -> list[tuple[float, ast.expr]]:
    """An expression as a sum of coefficient x part; a part without behaviours is the number 1."""
    if not used(node):
        return [(float(evaluate(node, {})), ast.Constant(1.0))]
    found = [(1.0, node)]
    match node:
        case ast.UnaryOp(op=op, operand=operand):
            found = _times(-1.0 if isinstance(op, ast.USub) else 1.0, operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = summands(left) + summands(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            found = summands(left) + _times(-1.0, right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if not used(left):
            found = _times(float(evaluate(left, {})), right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right) if not used(right):
            found = _times(float(evaluate(right, {})), left)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            found = _times(1.0 / float(evaluate(right, {})), left)
    return found


def first_threshold(node: ast.expr) -> tuple[str, float] | None:
    """The first comparison `behaviour > number` in an expression, if there is one."""
    for part in ast.walk(node):
        match part:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Gt()], comparators=[above]) if not used(above):
                return name, float(evaluate(above, {}))
    return None


def _times(factor: float, node: ast.expr) -> list[tuple[float, ast.expr]]:
    return [(factor * coefficient, part) for coefficient, part in summands(node)]


def _may_be_zero(node: ast.expr) -> bool:
    low, high = bounds(node, {})
    return low <= 0 <= high


def _depth(node: ast.AST) -> int:
    """Levels of parts inside each other, without going down by calls."""
    levels, level = 0, [node]
    while level := [inner for outer in level for inner in ast.iter_child_nodes(outer)]:
        levels += 1
    return levels


def _check(node: ast.expr, names: tuple[str, ...]) -> None:
    """Refuse what is not on the list, and what could give no finite number."""
    at = f"at column {node.col_offset + 1}"
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            if not abs(number) <= _MOST:
                raise ValueError(f"{str(number)[:20]} {at} is no number of 32 bits")
        case ast.Name(id=name):
            if name not in names:
                near = difflib.get_close_matches(name, [*names, *_FUNCTIONS], 1)
                raise ValueError(f"undeclared behaviour {name!r} {at}; nearest: {near[0] if near else ', '.join(names)}")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            _check(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            _check(left, names)
            _check(right, names)
            if isinstance(op, ast.Div) and (used(right) or _may_be_zero(right)):
                raise ValueError(f"division by {ast.unparse(right)!r} {at}: divide by a number other than 0")
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
            for side in (left, *others):
                _check(side, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            if len(args) != 1 if name == "log1p" else len(args) < 2:
                raise ValueError(f"{name} {at} has {len(args)} arguments, expected {'1' if name == 'log1p' else 'at least 2'}")
            for argument in args:
                _check(argument, names)
        case _:
            kinds = (type(node), type(getattr(node, "op", None)))
            instead = next((f": {_INSTEAD[kind]}" for kind in kinds if kind in _INSTEAD), "")
            raise ValueError(f"{ast.unparse(node)!r} {at} is not allowed{instead}; {_ALLOWED}")
