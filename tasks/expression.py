"""The exact value of an arithmetic expression written by a model, without running it.

Only integers, + - * / and brackets are understood; names, calls, powers and everything else make it no expression.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from fractions import Fraction

LONGEST = 200
"""Characters that are looked at: brackets nested deeper than this allows would exhaust Python's parser."""


def evaluate(expression: str) -> tuple[Fraction, Counter[int]] | None:
    """The value of `expression`, and how often each number stands in it; None if it is none, or divides by zero.

    A right-hand side ("3 + 4 = 7") is ignored, and the signs × ÷ − count as * / -.
    """
    expression = " ".join(expression.split("=")[0].translate(str.maketrans("×÷−", "*/-")).split())
    if len(expression) > LONGEST or not re.fullmatch(r"[\d +\-*/()]+", expression, re.ASCII):
        return None
    used: Counter[int] = Counter()
    try:
        return value(ast.parse(expression, mode="eval").body, used), used
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def value(node: ast.expr, used: Counter[int]) -> Fraction:
    """The value of a parsed expression; adds its numbers to `used`. Raises ValueError for anything but + - * /."""
    match node:
        case ast.Constant(value=int() as number):
            used[number] += 1
            return Fraction(number)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return value(left, used) + value(right, used)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return value(left, used) - value(right, used)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return value(left, used) * value(right, used)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return value(left, used) / value(right, used)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand, used)
    raise ValueError("not a plain arithmetic expression")


def last_expression(text: str) -> str | None:
    """The last stretch of `text` that is an expression of two numbers or more; None without one."""
    runs = re.findall(r"[\d \t+\-*/()×÷−]+", text, re.ASCII)
    for run in reversed(runs):
        run = run.lstrip("+-*/ \t")  # the mark of a list item
        result = evaluate(run)
        if result is not None and result[1].total() > 1:
            return run
    return None
