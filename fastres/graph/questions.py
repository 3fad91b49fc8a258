"""Questions: what a network's code asks of the sizes of its inputs, such as `h % 2 == 0`, which a graph has answered.

A graph captured with symbolic sizes is good for every size for which each question has the answer that it had in the
capture. A question is text in Python's syntax, of integer arithmetic and comparisons alone, so that a file can hold it.
"""

from __future__ import annotations

import ast
import math
import operator
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

_OPERATORS: dict[type, Any] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.Not: operator.not_},
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge},
}
_FUNCTIONS: dict[str, Any] = {"max": max, "min": min, "abs": abs, "float": float, "torch.sym_float": float}
_FUNCTIONS |= {f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")}
_LONGEST = 2000  # characters of a question

# Where torch computes shapes and strides, which it does alike for the graph's operators at any size. What is asked
# anywhere else, in the network's code or in torch.nn's, decided which operators there are.
_SHAPE_RULES = tuple(
    os.path.join(os.path.dirname(torch.__file__), *part.split("/"))
    for part in ("_meta_registrations.py", "_prims_common", "_prims/", "_refs", "_subclasses", "_decomp")
)


class UnknownQuestion(Exception):
    """It is no arithmetic of sizes; the message holds it."""


def questions_of(program: Any) -> tuple[str, ...]:
    """What the code asked of the sizes in an exported program, in the names of its symbols.

    Raises:
        UnknownQuestion: one of them is not of integer arithmetic.
    """
    from torch.utils._sympy.printers import PythonPrinter  # with sympy, which export has loaded

    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    modes = [t.fake_mode for t in values if getattr(t, "fake_mode", None) is not None]
    asked: list[str] = []
    for guard in modes[0].shape_env.guards if modes else []:
        place = getattr(guard.sloc, "framework_loc", None)
        question = modes[0].shape_env.replace(guard.expr)  # symbols that have turned out to be numbers are none
        if question.free_symbols and not str(getattr(place, "filename", "")).startswith(_SHAPE_RULES):
            asked.append(PythonPrinter().doprint(question))
    for symbol, range_ in program.range_constraints.items():
        if range_.lower > 2:
            asked.append(f"{symbol} >= {int(range_.lower)}")
        if range_.upper < 1 << 40:
            asked.append(f"{symbol} <= {int(range_.upper)}")
    return tuple(dict.fromkeys(asked))


def terms_of(questions: Sequence[str], names: set[str]) -> tuple[Any, ...]:
    """The questions as `hold` takes them: a name, a number, or a function and its terms.

    Raises:
        UnknownQuestion: one is no question about sizes of these names; the message holds it.
    """
    found = []
    for question in questions:
        try:
            if len(question) > _LONGEST:
                raise UnknownQuestion
            found.append(_term(ast.parse(question, mode="eval").body, names))
        except (UnknownQuestion, SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            raise UnknownQuestion(str(question)[:200]) from None
    return tuple(found)


def hold(terms: Sequence[Any], sizes: Mapping[str, int]) -> bool:
    """Tell whether every question has the answer yes for these sizes, which a compiler may see as symbols."""
    try:
        for term in terms:
            if not _value(term, sizes):
                return False
    except (ArithmeticError, ValueError):
        return False
    return True


@lru_cache(maxsize=4096)
def same_size(one: int | str, other: int | str) -> bool:
    """Tell whether two sizes, numbers or expressions of symbols, are the same for every size of the images.

    `(h + 1) // 2` and `(h - 1) // 2 + 1` are. Expressions are of sums and quotients with small periods: those that
    agree from 2 to 200 do.
    """
    if one == other or not isinstance(one, str) or not isinstance(other, str):
        return one == other
    names = {node.id for text in (one, other) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    try:
        terms = terms_of((one, other), names)
    except UnknownQuestion:
        return False
    ranks = {name: rank for rank, name in enumerate(sorted(names))}
    tried = [{name: 2 + (n * (1 + 12 * rank)) % 199 for name, rank in ranks.items()} for n in range(199)]
    try:
        return all(_value(terms[0], sizes) == _value(terms[1], sizes) for sizes in tried)
    except ArithmeticError:
        return False


def same_shape(*shapes: Any) -> bool:
    """Tell whether these shapes, of numbers and expressions, are the same; None is none."""
    first = shapes[0]
    if first is None or any(shape is None or len(shape) != len(first) for shape in shapes):
        return False
    return all(same_size(a, b) for shape in shapes[1:] for a, b in zip(first, shape, strict=True))


def _value(term: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(term, str):
        return sizes[term]
    if isinstance(term, tuple):
        return term[0](*[_value(part, sizes) for part in term[1:]])
    return term


def _term(node: Any, names: set[str]) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return name
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], _term(left, names), _term(right, names)
        case ast.UnaryOp(op, operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], _term(operand, names)
        case ast.BoolOp(op, values):
            return _every if isinstance(op, ast.And) else _some, *[_term(value, names) for value in values]
        case ast.Compare(left, [op], [right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)], _term(left, names), _term(right, names)
        case ast.Call(func, args, []) if ast.unparse(func) in _FUNCTIONS and args:
            return _FUNCTIONS[ast.unparse(func)], *[_term(arg, names) for arg in args]
    raise UnknownQuestion


def _every(*answers: Any) -> bool:
    return all(answers)


def _some(*answers: Any) -> bool:
    return any(answers)
