"""Answers in text: the text of a completion, and the tagged, boxed, `####` or last-number answer within it.

Pure functions over strings, shared by rewards, tasks and evaluation. They never raise on odd text: what is not there
is None. Deciding whether an answer is right is left to the rewards, algebra to `math_verify`.
"""

from __future__ import annotations

import numbers
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo.rewards.notation import FRACTION_SLASH, plain
from grpo.rewards.number import LONGEST_EXPONENT, LONGEST_NUMBER, SCALES, stated_number

_MIXED = re.compile(rf"(?:(?<![0-9A-Za-z.,])([0-9]{{1,9}})\s*)?(?<![0-9.])(-?[0-9.]+){FRACTION_SLASH}(-?[0-9.]+)")
_SCIENTIFIC = re.compile(
    r"(?<![0-9A-Za-z_./^])(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(?:\\times|\\cdot|[×·⋅*xX])\s*)?10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*([-+]?)\s*([0-9]{1,3})\s*\}|([-+]?)([0-9]{1,3})(?![0-9]))"
)
_SCALED = re.compile(
    rf"(?<![0-9A-Za-z_./])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s{{0,3}}({'|'.join(SCALES)})s?\b",
    re.IGNORECASE,
)
_EXPONENT_OF_WORD = re.compile(r"(?<=[A-Za-z)}])\s*\^\s*(?:\{\s*-?[0-9]+\s*\}|-?[0-9])")
_SUBSCRIPT = re.compile(r"_\s*\{[0-9A-Za-z]{1,20}\}")
_IN_EXPRESSION = re.compile(r"(?:\^\s*\{?|[0-9A-Za-z)}]\s?\*\*|\\sqrt\s*\{?|√|\bsqrt\(?)\s*[-+]?\s*$")
_BRACES = re.compile(
    r"(?P<box>\\(?:boxed|fbox)\s*)(?:(?P<open>\{)|(?P<bare>[^\s{}\\]+))|\\.|(?P<lone>\{)|(?P<close>\})", re.DOTALL
)
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![0-9A-Za-z_)\]}])[-+])?      # a minus after a word or a number is a hyphen or a subtraction
    (?:[$€£¥₹]\s?(?P<inner>[-+])?)?
    (?P<value>
        (?<![0-9A-Za-z_])(?<![0-9]\.)         # not the tail of x2, H2O or 1.2.3
        (?: [0-9]{1,3}(?:,[0-9]{3})+(?![0-9]) | [0-9]+ ) (?:\.[0-9]+)?
      | (?<![0-9A-Za-z_.])\.[0-9]+
    )
    (?P<exponent>[eE][-+]?[0-9]+(?![0-9A-Za-z]))?
    """,
    re.VERBOSE,
)


def completion_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """The text of a completion: itself, or the content of the last message of a conversation."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def is_no_answer(gold: Any) -> bool:
    """Whether a gold answer is missing: None, NaN or text without a visible character."""
    if isinstance(gold, str):
        return not gold.strip()
    return gold is None or (isinstance(gold, numbers.Real) and gold != gold)


def xml_answer(text: str) -> str:
    """The text after the last `<answer>`, cut at the next `</answer>`, stripped; without a tag, the whole text."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def hash_answer(text: str) -> str | None:
    """The text after the last `####`, stripped, as GSM8K marks its answers; commas are kept."""
    _, mark, rest = text.rpartition("####")
    return rest.strip() if mark else None


def boxed_answer(text: str) -> str | None:
    r"""The content of the last LaTeX `\boxed{...}` (or `\fbox`) whose braces close; `\boxed 7` gives "7"."""
    last: tuple[int, str] | None = None
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    for token in _BRACES.finditer(text):
        if token["bare"]:
            last = (token.start(), token["bare"].rstrip("$."))
        elif token["open"] or token["lone"]:
            open_braces.append(token.end() if token["box"] else None)
        elif token["close"] and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, text[start : token.start()].strip())
    return last[1] if last else None


def last_number(text: str) -> Fraction | None:
    r"""The last number written in `text`, exactly; None when there is none, it is a division by zero, or it stands in
    an exponent or a root.

    Read are signs (Unicode minus too), thousands however they are separated, decimals, exponents such as `1.5e-3` and
    `1.5 \times 10^{-3}`, "2 million", `3/4`, `\frac{3}{4}`, `2\frac{1}{2}` and digits of any script. Currency, percent
    signs and units are passed over: "50%" is 50. A comma that does not part thousands parts numbers, so "3,14" ends in
    14. Letters and numbers beyond LONGEST_NUMBER and LONGEST_EXPONENT are not read.
    """
    text = _MIXED.sub(_plain_fraction, plain(text))
    text = _SCALED.sub(_scaled, _SCIENTIFIC.sub(_scientific, text))
    text = _EXPONENT_OF_WORD.sub("", _SUBSCRIPT.sub("", text))
    matches = list(_NUMBER.finditer(text))
    if not matches or _IN_EXPRESSION.search(text[max(matches[-1].start() - 20, 0) : matches[-1].start()]):
        return None
    number = _value(matches[-1])
    if len(matches) > 1 and number is not None and _is_denominator(text, matches):
        top = _value(matches[-2])
        return top / number if top is not None and number != 0 else None
    return number


def final_number(text: str) -> Fraction | None:
    r"""The number a completion answers with: what its last `<answer>` states, else its last `\boxed`, else the line
    after its last `####`; without such a marker the last number of the text.

    The first marker that is there decides: an `<answer>` without a number has no number, whatever else was written.
    What it states is `number.stated_number`'s: an expression or a list is no number.
    """
    marked = marked_answer(text)
    return last_number(text) if marked is None else stated_number(marked)


def marked_answer(text: str) -> str | None:
    r"""The text at the first of the places `<answer>`, `\boxed` and `####` that there is; a box in it counts."""
    if "<answer>" in text:
        answer = xml_answer(text)
        boxed = boxed_answer(answer)
        return answer if boxed is None else boxed
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    marked = hash_answer(text)
    return None if marked is None else marked.partition("\n")[0]


def same_number(
    number: Fraction | str | None, gold: Fraction | str | None, tolerance: float = 0.0, relative_tolerance: float = 0.0
) -> bool:
    """Whether two numbers, or the last numbers of two texts, differ by no more than the wider tolerance.

    `tolerance` is in the numbers' units, `relative_tolerance` a share of `gold`; both as they are written, 0.1
    being 1/10. False where either number is missing.
    """
    number = last_number(number) if isinstance(number, str) else number
    gold = last_number(gold) if isinstance(gold, str) else gold
    if number is None or gold is None:
        return False
    return abs(number - gold) <= max(Fraction(str(tolerance)), Fraction(str(relative_tolerance)) * abs(gold))


def _plain_fraction(match: re.Match[str]) -> str:
    """`a/b` for a fraction; a whole number written before it is added to it."""
    whole, top, bottom = match.groups()
    if whole is None:
        return f"{top}/{bottom}"
    if re.fullmatch("[0-9]{1,9}", top) and re.fullmatch("[0-9]{1,9}", bottom):
        return f"{int(whole) * int(bottom) + int(top)}/{bottom}"
    return f"{whole} {top}/{bottom}"


def _scientific(match: re.Match[str]) -> str:
    r"""`1.5e-3` for `1.5 \times 10^{-3}`."""
    return f"{match[1] or 1}e{match[2] or match[4] or ''}{match[3] or match[5]}"


def _scaled(match: re.Match[str]) -> str:
    """`2e6` for "2 million"."""
    return f"{match[1]}e{len(str(SCALES[match[2].lower()])) - 1}"


def _value(match: re.Match[str]) -> Fraction | None:
    exponent = match["exponent"] or ""
    if len(match["value"]) > LONGEST_NUMBER or len(exponent.lstrip("eE+-")) > LONGEST_EXPONENT:
        return None
    number = Fraction(match["value"].replace(",", "") + exponent)
    return -number if (match["sign"] == "-") != (match["inner"] == "-") else number


def _is_denominator(text: str, matches: list[re.Match[str]]) -> bool:
    """Whether the last two numbers form a fraction, and not the end of a date such as 1/2/2024."""
    top, bottom = matches[-2:]
    joined = text[top.end() : bottom.start()] == "/" and bottom["sign"] is None
    return joined and not text[: top.start()].endswith("/") and not text[bottom.end() :].startswith("/")


def extracted_answer(text: str) -> str | None:
    """The answer that a person would read from a completion: between answer tags, in a box, or the last number."""
    if "<answer>" in text:
        return xml_answer(text)
    boxed = boxed_answer(text)
    number = final_number(text)
    return boxed if boxed is not None else None if number is None else str(number)
