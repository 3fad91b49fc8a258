"""Questions: what a network's code asks of the sizes of its inputs, such as `h % 2 == 0`, which a graph has answered.

A graph captured with symbolic sizes is good for every size for which each question has the answer that it had in the
capture. A question is text in Python's syntax, of integer arithmetic and comparisons alone, so that a file can hold it.
"""

from __future__ import annotations

import ast
import math
import operator
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
_TORCH = os.path.dirname(torch.__file__) + os.sep
_SHAPE_RULES = tuple(
    os.path.join(_TORCH, *part.split("/"))
    for part in ("_meta_registrations.py", "_prims_common", "_prims/", "_refs", "_subclasses", "_decomp")
)
_OPS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "ops", "")
_MACHINERY = tuple(
    os.path.join(_TORCH, *part.split("/"))
    for part in (
        "fx/",
        "__init__.py",
        "utils/",
        "_compile.py",
        "_dynamo/",
        "_ops.py",
        "_library",
        "_logging",
        "export/",
    )
)


class UnknownQuestion(Exception):
    """It is no arithmetic of sizes; the message holds it."""


@contextmanager
def listening() -> Iterator[list[Any]]:
    """Around an export: the expressions of sizes that the code asks for, as they were answered.

    All of them, not only those that become guards of the export: what a shape rule has asked before is no guard again.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    asked: list[Any] = []
    evaluate = ShapeEnv.evaluate_expr

    def recorded(env: Any, question: Any, *args: Any, **kwargs: Any) -> Any:
        answer = evaluate(env, question, *args, **kwargs)
        if getattr(question, "free_symbols", None) and _decides(question, sys._getframe(1)):
            asked.append((question, answer))
        return answer

    ShapeEnv.evaluate_expr = recorded  # type: ignore[method-assign, assignment]
    try:
        yield asked
    finally:
        ShapeEnv.evaluate_expr = evaluate  # type: ignore[method-assign]


def _decides(question: Any, frame: Any) -> bool:
    """Tell whether the answer may decide which operators there are: it is not a shape rule that asks.

    Nor PyTorch's C++, whether a size is 0 or 1, which says how dense a tensor lies; a question of Python's goes by the
    methods of SymInt and SymBool, in torch/__init__.py.
    """
    by, decides = "", None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SHAPE_RULES) or (name.startswith(_OPS) and "fake" in frame.f_code.co_name):
            return False
        if decides is not None and not name.startswith(_OPS):
            return bool(decides)
        if decides is None and not name.startswith(_MACHINERY) and name != __file__ and "sympy" not in name:
            decides = by == torch.__file__ or not {0, 1}.intersection(question.args)
            if not name.startswith(_OPS):  # else it may be a helper of a shape rule of ours
                return decides
        by = name
        frame = frame.f_back
    return True


def questions_of(program: Any, asked: Sequence[Any]) -> tuple[str, ...]:
    """The questions behind an exported program, in the names of its symbols.

    Args:
        asked: what `listening` gave.
    """
    import sympy  # which export has loaded
    from torch.utils._sympy.printers import PythonPrinter

    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"]
    modes = [t.fake_mode for t in values if getattr(t, "fake_mode", None) is not None]
    if not modes:
        return ()
    env = modes[0].shape_env
    found = [
        q if a is True or a == sympy.true else ~q if a in (False, sympy.false) else sympy.Eq(q, a) for q, a in asked
    ]
    if _sizes_by_rules(program):
        found += [guard.expr for guard in env.guards]
    names = {str(symbol) for symbol in program.range_constraints}
    texts = []
    for question in dict.fromkeys(map(env.replace, found)):  # symbols that have turned out to be numbers are none
        symbols = {str(symbol) for symbol in question.free_symbols}
        alike = isinstance(question, sympy.Eq) and same_size(str(question.lhs), str(question.rhs))
        if symbols and symbols <= names and not alike:  # other symbols follow from data
            text = PythonPrinter().doprint(question)
            if len(symbols) > 1 or not _holds_from_two(text, *symbols):
                texts.append(text)
    return tuple(texts)


def _holds_from_two(question: str, name: str) -> bool:
    """Tell whether a question about one size is answered alike by all of 2 to 1024: a batch of 1 is tried by itself."""
    try:
        terms = terms_of([question], {name})
    except UnknownQuestion:
        return False
    return all(hold(terms, {name: size}) for size in range(2, 1025))


def _sizes_by_rules(program: Any) -> bool:
    """Tell whether sizes that a rule has computed with a case distinction may be arguments: a pool's, rounded up."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    pools = [node for node in nodes if "pool" in str(node.target)]
    rounded = any(True in (*node.args[3:], *node.kwargs.values()) for node in pools)
    return rounded and any(isinstance(node.meta.get("val"), torch.SymInt) for node in nodes)


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
