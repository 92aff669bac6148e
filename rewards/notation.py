r"""One plain notation for the ways in which numbers are written: Markdown, LaTeX, Unicode, and scripts other than ours.

`plain` gives text in which digits are 0 to 9, a minus is "-", thousands are not separated, a fraction is `3⁄4`, and no
command of LaTeX is left that only sets type. It decides nothing about what the text means; `number.py` does.
"""

from __future__ import annotations

import re
import unicodedata

EMPHASIS = re.compile(r"(?<![\w*`~])(\*{1,3}|_{1,3}|`{1,3}|~~)(?=\S)([^\n]{1,200}?)(?<=\S)\1(?![\w*`~])")
FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
TAG = re.compile(r"</?(?:b|i|em|strong|u|code|mark|span|p|br)\s*/?>", re.IGNORECASE)
RAISED = re.compile(r"<sup>\s*([^<>]{1,20})\s*</sup>", re.IGNORECASE)

FRACTION_SLASH = "\u2044"
MINUS_SIGNS = "\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d"
RAISED_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
LETTERS = {ord(sign): "-" for sign in MINUS_SIGNS} | {
    ord("，"): ",", ord("．"): ".", ord("％"): "%", ord("٪"): "%", ord("＄"): "$", ord("￥"): "¥", ord("￡"): "£",
    ord("٫"): ".", ord("٬"): "\u202f", ord("’"): "'", ord("＋"): "+", ord("＝"): "=", ord("：") : ":", ord("／"): "/",
    ord("∕"): "/", ord("º"): "°", ord("˚"): "°", ord("ｅ"): "e",
}  # fmt: skip

SETS_TYPE = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|textsf|emph|underline|mbox|hbox|boxed|fbox|bf|rm"
    r"|math(?:rm|bf|it|sf|tt|cal|ord)|operatorname|bm|boldsymbol|displaystyle)\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
NOTHING = re.compile(
    r"\\(?:left|right|big|Big|bigg|Bigg|displaystyle|textstyle|scriptstyle|limits|nolimits|bf|rm|it)(?![A-Za-z])"
    r"|\\!\s*|\\[()\[\]]"
)
SPACE = re.compile(r"\\(?:quad|qquad|thinspace|enspace|space|hspace\s*\{[^{}]*\})(?![A-Za-z])|\\[;: ]|(?<!\\)~")
DEGREES = re.compile(r"\^\s*\{\s*(?:\\(?:circ|degree)|o)\s*\}|\^?\s*\\(?:circ|degree)(?![A-Za-z])")
ORDINAL = re.compile(r"(?<=[0-9])\s*\^\s*(?:\{\s*(?:st|nd|rd|th)\s*\}|(?:st|nd|rd|th)(?![A-Za-z]))")
ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([0-9]))"
FRACTION = re.compile(rf"\\[dtc]?frac(?![A-Za-z]){ARGUMENT}{ARGUMENT}")
OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
DECIMAL = re.compile(r"\s*(-?)\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*")
UNIT_WORD = re.compile(r"\s*[^\W\d_]+(?:\s*\^\s*\{?-?[0-9]\}?)?\s*")

GAP = r"(?:\{,\}|,?\\,|[\u00a0\u2009\u202f\u2007'_])"
GROUPS = re.compile(rf"(?<![0-9A-Za-z_])([0-9]{{1,3}}(?:{GAP}[0-9]{{3}})+)(?![0-9])(?:,([0-9]{{1,2}})(?![0-9,]))?")
GAP_OF_DECIMALS = re.compile(r"(?<=[0-9]{3})(?:\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
COMMAS = re.compile(r"(?<![0-9A-Za-z_.,])([1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![0-9]|,[0-9])")
INDIAN = re.compile(r"(?<![0-9A-Za-z_.,])([1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3})(?![0-9]|,[0-9])")
DOTS = re.compile(r"(?<![0-9A-Za-z_.,])([1-9][0-9]{0,2}(?:\.[0-9]{3}){2,})(?:,([0-9]+))?(?![0-9]|[.,][0-9])")
DOTS_AND_COMMA = re.compile(r"(?<![0-9A-Za-z_.,])([1-9][0-9]{0,2}(?:\.[0-9]{3})+),([0-9]+)(?![0-9]|[.,][0-9])")
REPEATING = re.compile(
    r"([0-9]{1,20})\.([0-9]{0,20})(?:\\(?:overline|bar|dot)\s*(?:\{([0-9]{1,20})\}|([0-9]))|\(([0-9]{1,20})\))"
)


def without_emphasis(text: str) -> str:
    """`text` without Markdown's marks for bold, italics and code, and HTML's for them; `2**3` is no such mark."""
    text = FENCE.sub("", RAISED.sub(r"^{\1}", text))
    text = TAG.sub("", text)
    for _ in range(3):  # bold around italics around code
        text, count = EMPHASIS.subn(r"\2", text)
        if not count:
            break
    return text


def plain(text: str) -> str:
    """`text` in the plain notation."""
    text = ascii_digits(text.translate(LETTERS))
    text = text.replace("\\$", "$").replace("\\%", "%").replace("\\dots", "...").replace("\\ldots", "...")
    text = NOTHING.sub("", DEGREES.sub("°", text))
    for _ in range(4):  # boxes around bold around units
        text, count = SETS_TYPE.subn(r" \1 ", text)
        if not count:
            break
    text = GAP_OF_DECIMALS.sub("", GROUPS.sub(ungrouped, text))
    for pattern in (COMMAS, INDIAN):
        text = pattern.sub(lambda match: match[1].replace(",", ""), text)
    for pattern in (DOTS, DOTS_AND_COMMA):
        text = pattern.sub(lambda match: match[1].replace(".", "") + (f".{match[2]}" if match[2] else ""), text)
    text = ORDINAL.sub("", SPACE.sub(" ", text.replace("\\,", " ")))
    text = REPEATING.sub(repeating, text)
    return OVER.sub(fraction, FRACTION.sub(fraction, text))


def ungrouped(match: re.Match[str]) -> str:
    """A number without what separates its thousands; a comma behind it parts decimals, where none parts thousands."""
    whole, decimals = re.sub(GAP, "", match[1]), match[2]
    if decimals is None:
        return whole
    return f"{whole},{decimals}" if "," in match[1] else f"{whole}.{decimals}"


def ascii_digits(text: str) -> str:
    """Digits of every script as 0 to 9, raised ones as an exponent, and `½` as `1⁄2`."""
    if text.isascii():
        return text
    text = re.sub("[⁺⁻]?[⁰¹²³⁴-⁹]+", lambda match: f"^{{{match[0].translate(RAISED_DIGITS)}}}", text)
    return "".join(letter if letter.isascii() else one_letter(letter) for letter in text)


def one_letter(letter: str) -> str:
    digit = unicodedata.decimal(letter, None)
    if digit is not None:
        return str(digit)
    if unicodedata.category(letter) == "No" and FRACTION_SLASH in (parts := unicodedata.normalize("NFKC", letter)):
        top, _, bottom = parts.partition(FRACTION_SLASH)
        return f"\\frac{{{top}}}{{{bottom}}}"
    return letter


def fraction(match: re.Match[str]) -> str:
    """`3⁄4` for a fraction of two numbers, `m/s` for one of units; any other as it is."""
    parts = [part for part in match.groups() if part is not None]
    numbers = [DECIMAL.fullmatch(part) for part in parts]
    if len(parts) == 2 and all(numbers):
        top, bottom = (number[1] + number[2] for number in numbers if number)
        behind = " " if match.string[match.end() : match.end() + 1].isdecimal() else ""
        before = " " if match.string[max(match.start() - 1, 0) : match.start()].isalnum() else ""
        return f"{before}{top}{FRACTION_SLASH}{bottom}{behind}"
    if len(parts) == 2 and all(UNIT_WORD.fullmatch(part) for part in parts):
        return f" {parts[0].strip()}/{parts[1].strip()} "
    return match[0]


def repeating(match: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as the fraction that it is."""
    whole, fixed, again = match[1], match[2], match[3] or match[4] or match[5]
    scale = 10 ** len(fixed) * (10 ** len(again) - 1)
    top = int(whole + fixed + again) - int(whole + fixed)
    return f"{top}{FRACTION_SLASH}{scale}"
