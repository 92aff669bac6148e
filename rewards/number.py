r"""The number that a text states, if it states one and nothing else: a gold answer, or what stands in its place.

Read are signs, currency, thousands however they are separated, decimals, repeating ones too, exponents and `3 \times
10^8`, fractions, mixed numbers, "2 million", units (`5\text{ cm}^2`, "60 km/h"), percent ("50%" is 50), an equals sign
before it and words around it. An expression, a list, a range, an interval or a numeral in another base is no number:
None, so that nobody is rewarded for a number that merely occurs in it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from grpo.rewards.notation import FRACTION_SLASH, plain, without_emphasis

LONGEST_NUMBER = 300
"""Characters of a number that is still read; a longer run of digits is noise, and costly to compute with."""
LONGEST_EXPONENT = 3
"""Digits of an exponent that is still read."""
LONGEST_STATEMENT = 2000
"""Characters of a text that is looked at."""

DOLLARS = re.compile(r"(?:(?<![A-Za-z])(?:US|AU|CA|HK|NZ|[ACSR])\s?)?\$")
"""A dollar of money, or LaTeX's around a formula: neither changes a number."""
CURRENCY = (
    r"(?:[€£¥₹₩₽₺฿₫₪₱₦¢]|\\(?:pounds|euro|yen|cents?)(?![A-Za-z])"
    r"|(?:USD|EUR|GBP|INR|JPY|CNY|RMB|CHF|CAD|AUD|Rs|Rp)(?![A-Za-z])\.?)"
)
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
EXPONENT = (
    r"\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(?P<{0}>[-+]?\s*[0-9]+)\s*\}|\(\s*(?P<{0}_round>[-+]?[0-9]+)\s*\)|(?P<{0}_bare>[-+]?[0-9]+))"
)
SCALES = {
    "thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
NUMBER = re.compile(
    rf"""
    (?P<sign>(?:[-+]|negative\s|minus\s)?)\s*(?:{CURRENCY}\s*)*(?P<inner>[-+]?)\s*
    (?:
        10 {EXPONENT.replace("{0}", "power")}
      | (?:(?P<whole>[0-9]+)\s*(?:and\s+)?)?? (?P<top>-?{DECIMAL})\s*{FRACTION_SLASH}\s*(?P<bottom>-?{DECIMAL})
      | (?:(?P<whole_2>[0-9]+)\s+(?:and\s+)?)? (?P<top_2>{DECIMAL})\s*/\s*(?P<bottom_2>{DECIMAL})
      | (?P<spaced>[1-9][0-9]{{0,2}}(?:\ [0-9]{{3}})+(?![0-9])(?:\.[0-9]+|,[0-9]{{1,2}}(?![0-9]))?)
      | (?P<decimal>{DECIMAL})
        (?: [eE](?P<e>[-+]?[0-9]+) | \s*(?:\\times|\\cdot|[×·⋅*xX])\s*10 {EXPONENT.replace("{0}", "times")} )?
    )
    (?:\s*(?P<scale>{"|".join(SCALES)})s?(?![A-Za-z]))?
    """,
    re.VERBOSE | re.IGNORECASE,
)

ATTACHED = frozenset(
    "st nd rd th mm cm dm km nm in ft yd mi mg kg gm lb lbs oz ml mL cl dl kl ms ns hr hrs min mins sec secs mph kph "
    "kmh kmph fps rpm Hz kHz MHz GHz Pa kPa MPa eV keV MeV GeV kJ MJ kW MW kV mV mA kN mol cents dollars usd eur rad "
    "deg ha GB MB KB TB".split()
)
"""Units that are known without a space before them, where other letters would be a product of variables."""
UNIT_LETTERS = frozenset("mgshLlNJWVAKCFTBHdu")
"""Single letters that are units and not variables."""
NOT_UNITS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt root pi mod det lim max min gcd "
    "lcm alpha beta gamma theta phi lambda or and to plus minus times over squared cubed choose factorial divided "
    "through infinity less more than by if when where with but not".split()
)
ATOM = re.compile(
    r"""\s*(?:
        (?P<joint>[-/*·⋅()×]|\\cdot(?![A-Za-z])|\\times(?![A-Za-z]))
      | (?P<sign>°\s*[CFK]?(?![A-Za-z])|%|‰|′|″|Ω|\\(?:Omega|ohm)(?![A-Za-z])|\\(?:prime)(?![A-Za-z])|[$€£¥₹₩₽₺฿₫₪₱¢])
      | (?P<word>(?:\\mu\s*|[µμ])?[^\W\d_]+\.?)
    )
    (?P<power>\s*\^\s*(?:\{\s*-?\s*[0-9]\s*\}|-?[0-9]))?
    """,
    re.VERBOSE,
)
RELATION = re.compile(r"=|≈|≃|≅|\\(?:approx|simeq|cong|doteq|sim)(?![A-Za-z])")
NO_STATEMENT = re.compile(r"[<>≤≥≠±∓∈|]|\\(?:leq?|geq?|lt|gt|neq?|pm|mp|in|cup|cap|infty|notin)(?![A-Za-z])|\\[{}|]")
OPERATION = re.compile(r"[\^+*/]|\S\s*-|[0-9]\s*[A-Za-z]|\\(?:frac|sqrt|times|cdot)")
SEPARATE = re.compile(r"[,;\n]|\b(?:or|and)\b|\\(?:quad|text)")
CUE = re.compile(
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|got|get|gets|has|have|totals?|costs?|makes?|so|therefore|thus|hence|"
    r"answer|result|approximately|about|roughly|around|exactly|only)\b|(?<=[^\W\d_)]):(?=\s)|[→⇒]"
    r"|\\(?:Rightarrow|implies|therefore)(?![A-Za-z])),?\s*",
    re.IGNORECASE,
)
PLAIN_NUMBER = re.compile(r"[0-9][0-9.,/]*")
PROSE = re.compile(r"[^\W\d_]{3,}")


def stated_number(text: str) -> Fraction | None:
    """The number that `text` states, exactly; None where it states none, or anything else than one number."""
    if len(text) > LONGEST_STATEMENT:
        text = text.rstrip()[-LONGEST_STATEMENT:].rpartition("\n")[2]
    text = without_emphasis(text).strip()
    whole = _statement(plain(text))
    if whole is not None or "\n" not in text:
        return whole
    return _statement(plain(text.rpartition("\n")[2].strip()))


def gold_number(text: str) -> Fraction | None:
    """As `stated_number`, for a gold answer, in which "5!" is a factorial and no exclamation."""
    return None if re.search(r"[0-9)}]\s*!", text) else stated_number(text)


def _statement(text: str) -> Fraction | None:
    """The number that `text`, in plain notation, states."""
    text = _bare(text)
    if NO_STATEMENT.search(text):
        return None
    value = _one_number(text)
    if value is not None:
        return value
    if RELATION.search(text):
        return _right_side(text)
    return _in_words(text)


def _bare(text: str) -> str:
    """`text` without what only surrounds it: dollar signs, brackets, quotes, bullets, a full stop."""
    text = DOLLARS.sub(" ", text)
    before = None
    while before != text:
        before = text
        text = text.strip().strip("\"'“”‘*`_#~").strip()
        text = text.rstrip(".,;:!?").rstrip()
        for opening, closing in ("()", "[]", "{}"):
            if text.startswith(opening) and text.endswith(closing):
                text = text[1:-1]
            elif text.endswith(closing) and opening not in text:
                text = text[:-1]
            elif text.startswith(opening) and closing not in text:
                text = text[1:]
    return text


def _one_number(text: str) -> Fraction | None:
    """The value of a number with its currency and unit; None where `text` is anything else."""
    match = NUMBER.match(text)
    if match is None or not _is_unit(text[match.end() :]):
        return None
    return _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of what NUMBER matched; None where it is too long to be one, or divides by zero."""
    power = match["power"] or match["power_round"] or match["power_bare"]
    times = match["times"] or match["times_round"] or match["times_bare"] or match["e"]
    exponent = (power or times or "0").replace(" ", "")
    if len(match[0]) > LONGEST_NUMBER or len(exponent.lstrip("+-")) > LONGEST_EXPONENT:
        return None
    top = match["top"] or match["top_2"]
    bottom = match["bottom"] or match["bottom_2"]
    if power:
        value = Fraction(1)
    elif top:
        if Fraction(bottom) == 0 or (match["whole"] and top.startswith("-")):
            return None
        value = Fraction(match["whole"] or match["whole_2"] or 0) + Fraction(top) / Fraction(bottom)
    else:
        value = Fraction((match["spaced"] or match["decimal"]).replace(" ", "").replace(",", "."))
    value *= Fraction(10) ** int(exponent) * SCALES.get((match["scale"] or "").lower(), 1)
    negative = (match["sign"].strip().lower() in ("-", "negative", "minus")) != (match["inner"] == "-")
    return -value if negative else value


def _is_unit(text: str) -> bool:
    """Whether `text`, what follows a number, is nothing or its unit: words and signs with exponents."""
    position, joined = 0, True
    attached = text[:1].strip() != ""
    text = text.rstrip()
    while position < len(text):
        atom = ATOM.match(text, position)
        if atom is None or atom.end() == position:
            return False
        word = (atom["word"] or "").rstrip(".")
        if word and not (_is_attached_unit(word) if attached and position == 0 else _is_word_of_unit(word)):
            return False
        joined = atom["joint"] is not None
        if joined and atom["power"] and atom["joint"] != ")":
            return False
        position = atom.end()
    return not joined or not text or text.endswith(")")


def _is_attached_unit(word: str) -> bool:
    """Whether letters right behind a number are its unit and not variables."""
    if word.lower() in NOT_UNITS:
        return False
    return not word.isascii() or len(word) > 4 or word in UNIT_LETTERS or word in ATTACHED or word.lower() in ATTACHED


def _is_word_of_unit(word: str) -> bool:
    if word.startswith(("\\", "µ", "μ")) or not word.isascii():
        return True
    return word in UNIT_LETTERS if len(word) == 1 else word.lower() not in NOT_UNITS


def _right_side(text: str) -> Fraction | None:
    """The number behind the last equals sign, where what is before it is a name or a calculation."""
    first, *rest = RELATION.split(text)
    *between, last = rest
    if any(SEPARATE.search(part) for part in between):
        return None
    if not between and _is_equation(first):
        return None
    return _one_number(_bare(last)) if last.strip() else None


def _is_equation(side: str) -> bool:
    """Whether the left side of an equation is to be solved for a letter, and is no name ("AB", "f(2)", "the sum")."""
    side = re.sub(r"\([^()]*\)|_(?:\{\w*\}|\w)", "", side)
    letter = re.search(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", side)
    return letter is not None and OPERATION.search(side) is not None


def _in_words(text: str) -> Fraction | None:
    """The number that a sentence gives: what follows its last "is" or the like, or the only number in it."""
    if "\\" in text or "^" in text:
        cut = list(CUE.finditer(text))
        return _one_number(_bare(text[cut[-1].end() :])) if cut else None
    for cue in reversed(list(CUE.finditer(text))):
        value = _one_number(_bare(text[cue.end() :]))
        if value is not None:
            return value
    written = list(PLAIN_NUMBER.finditer(text))
    if len(written) != 1 or not PROSE.search(text):
        return None
    start, end = written[0].span()
    beside = text[max(start - 1, 0) : start] + text[end : end + 1]
    match = NUMBER.match(text, start)
    return None if match is None or re.search(r"[A-Za-z_+*/^]", beside) else _signed(_value(match), text[:start])


def _signed(value: Fraction | None, before: str) -> Fraction | None:
    """`value` with the sign that ends the text `before` it, where that is none of a word's hyphens."""
    return -value if value is not None and re.search(r"(?:^|\s)-\s?$", before) else value
