"""Spelling of values: which texts are numbers, which are codes, and which mean the same.

Text is a number if it follows one grammar, without underscores or digits of other scripts. A
number whose spelling carries more than its value is a code: 007 is not 7, and programs do not
write 100000 as 1E5 (those that shorten it write 1e+05, or 1.0E5).
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal

#: the grammar of numbers, for the regular expressions of Python and of polars
NUMBER = r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:inf|infinity))"
#: pairs of values that form a boolean
TRUTH = ({"false", "true"}, {"0", "1"})
_LEADING_ZERO = re.compile(r"[+-]?0[0-9].*")
_BARE_EXPONENT = re.compile(r"[0-9]+[eE][0-9]+")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"[+-]?([0-9]+|[0-9]{1,3}(\.[0-9]{3})+),[0-9]+")
#: whole numbers whose points group thousands, unless they are numbers with three decimals
_POINTS = re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})*")
#: numbers with a currency, a percent sign, groups by blanks or apostrophes, or a typographic minus
_MARKED = re.compile(
    r"[-+\u2212]?\s?[$\u20ac\xa3\xa5]?\s?[-\u2212]?"
    r"(?:[1-9][0-9]{0,2}(?:[ \xa0\u2009\u202f'\u2019,][0-9]{3})+|0|[1-9][0-9]*)"
    r"(?:\.[0-9]+|,[0-9]{1,2})?\s?[%$\u20ac\xa3\xa5]?"
)
_FURTHEST = 40  # decimal places from the point, beyond which a number is not written out


def is_number(text: str) -> bool:
    """Return whether a text is a number, or a code that looks like one."""
    return re.fullmatch(NUMBER, text) is not None


def codes(values: Iterable[str]) -> list[str]:
    """Return the values of a column that look like numbers and are codes.

    >>> codes(["007", "100"]), codes(["1E5", "17"]), codes(["1E5", "1.5"]), codes(["0.5", "0"])
    (['007'], ['1E5'], [], [])
    """
    numbers = [value for value in values if is_number(value)]
    zeros = {value for value in numbers if _LEADING_ZERO.fullmatch(value)}
    bare = {value for value in numbers if _BARE_EXPONENT.fullmatch(value)} - zeros
    if any(re.search(r"[.+-]", value) for value in numbers if value not in zeros):
        bare = set()  # measurements, some in a short notation
    return sorted(zeros | bare)


def canonical(text: str) -> str:
    """Return the canonical spelling of a number, of true and false, or of accented letters.

    >>> [canonical(text) for text in ("1.0", "+1", "1.50", "1e-3", "TRUE", "007", "1E5", "Rom")]
    ['1', '1', '1.5', '0.001', 'true', '007', '1E5', 'Rom']
    """
    text = unicodedata.normalize("NFC", text)
    if text.lower() in ("true", "false"):
        return text.lower()
    if not is_number(text) or _LEADING_ZERO.fullmatch(text) or _BARE_EXPONENT.fullmatch(text):
        return text
    value = Decimal(text)
    if not value.is_finite() or abs(value.adjusted()) > _FURTHEST:
        return text
    plain = format(value, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def places_of(values: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the index of each value among some classes, in any spelling; omit unknown values.

    If two classes mean false and true, 0 and 1 are spellings of them.

    >>> places_of(["2.0", "2", "3"], ["1", "2"]), places_of(["TRUE", "0"], ["False", "True"])
    ({'2.0': 1, '2': 1}, {'TRUE': 1, '0': 0})
    """
    exact = {name: place for place, name in enumerate(classes)}
    plain: dict[str, int | None] = {}
    for name, place in exact.items():
        key = canonical(name)
        plain[key] = None if key in plain else place  # 1.1 and 1.10 differ, and 1.100 is neither
    if plain.keys() in TRUTH:
        for word, number in (("false", "0"), ("true", "1")):
            plain[word] = plain[number] = plain.get(word, plain.get(number))
    found = {value: exact.get(value, plain.get(canonical(value))) for value in values}
    return {value: place for value, place in found.items() if place is not None}


def spellings(values: Iterable[str]) -> list[str]:
    """Return the distinct values of a category, sorted, with one spelling of each.

    Numbers with decimals are distinct as they are written, because 1.1 and 1.10 may be versions.

    >>> spellings(["1", "1.0", "True", "true", "1.1", "1.10"])
    ['1', '1.1', '1.10', 'true']
    """
    found: dict[str, str] = {}
    for value in sorted({*values}):
        plain = canonical(value)
        key = value if "." in plain else plain
        if key not in found or value == plain:
            found[key] = value
    return sorted(found.values())


def thousands_advice(values: Sequence[str]) -> str:
    """Return a warning if the points in numbers may group thousands, as in much of Europe, else
    "".

    This is so if each point is followed by three digits, and no number begins with 0.

    >>> thousands_advice(["1.007", "850"])
    '1.007 is read with three decimals; if the point groups thousands, write 1007'
    >>> thousands_advice(["0.125", "1.007"]), thousands_advice(["850", "12"])
    ('', '')
    """
    if not all(_POINTS.fullmatch(value) for value in values):
        return ""
    found = next((value for value in values if "." in value), None)
    if found is None:
        return ""
    plain = found.replace(".", "")
    return f"{found} is read with three decimals; if the point groups thousands, write {plain}"


def number_advice(values: Iterable[str]) -> str:
    """Return advice on numbers with commas, blanks, currencies or the like; "" for other texts.

    >>> number_advice(["1,5", "2,25"]), number_advice(["$12.50"]), number_advice(["12:50"])
    ('write 1.5, not 1,5', 'write 12.50, not $12.50', '')
    """
    values = list(values)
    if all(_THOUSANDS.fullmatch(value) for value in values):
        if any(value.count(",") > 1 or "." in value for value in values):
            return "write 1250, not 1,250"
        plain = values[0].replace(",", "")
        return (
            f"write {plain} if its comma groups thousands, and {values[0].replace(',', '.')} if"
            " it is a decimal comma"
        )
    if all(_POINTS.fullmatch(value) for value in values):
        return f"write {values[0].replace('.', '')}, not {values[0]}"
    if all(_DECIMAL_COMMA.fullmatch(value) for value in values):
        grouped = any("." in value for value in values)
        return "write 1250.5, not 1.250,5" if grouped else "write 1.5, not 1,5"
    if all(_MARKED.fullmatch(value) for value in values):
        plain = re.sub(r",([0-9]{1,2})(?![0-9])", r".\1", values[0].replace("\u2212", "-"))
        return f"write {re.sub(r'[^-+0-9.]', '', plain)}, not {values[0]}"
    return ""
