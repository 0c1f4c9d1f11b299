"""Numbers in a tokenised answer, as exact fractions: digits, words, signs, fractions, percentages.

Nothing is rounded and no unit is converted. A token is a text or, once read, a `Fraction`.
"""

import re
from fractions import Fraction

Token = str | Fraction

_UNIT_WORDS = "zero one two three four five six seven eight nine"
_TEEN_WORDS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TEN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = {word: value for value, word in enumerate(_UNIT_WORDS.split())}
_SMALL = _UNITS | {word: value for value, word in enumerate(_TEEN_WORDS.split(), start=10)}
_TENS = {word: 10 * value for value, word in enumerate(_TEN_WORDS.split(), start=2)}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_MINUS = ("-", "minus", "negative")
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)(?:e[+-]?\d{1,2}(?!\w))?)"
    r"|[^\W\d_]+|\S"
)
_LONGEST_NUMBER = 40  # characters; far beyond any solution, and a bound on the arithmetic that a policy can ask for


def tokenise(text: str) -> list[Token]:
    """Lower-case `text` as numbers, words and single symbols; digits are read, commas between thousands included."""
    tokens: list[Token] = []
    for match in _TOKEN.finditer(text):
        number = match["number"]
        is_short = number is not None and len(number) <= _LONGEST_NUMBER
        tokens.append(Fraction(number.replace(",", "")) if is_short else match[0])
    return tokens


def read_numbers(tokens: list[Token]) -> tuple[Token, ...]:
    """`tokens` with every number as one fraction: "minus twenty-one", "1 1/2", "3/4", "50 percent", "5 million"."""
    tokens = _read_words(tokens)
    result: list[Token] = []
    start = 0
    while start < len(tokens):
        value, end = _read_signed(tokens, start, after=result[-1] if result else None)
        if value is None:
            result.append(tokens[start])
            start += 1
        else:
            result.append(value)
            start = end
    return tuple(result)


def _at(tokens: list[Token], index: int) -> Token | None:
    return tokens[index] if index < len(tokens) else None


def _read_words(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
    start = 0
    while start < len(tokens):
        value, end = _read_scaled(tokens, start)
        result.append(tokens[start] if value is None else Fraction(value))
        start = start + 1 if value is None else end
    return result


def _read_below_hundred(tokens: list[Token], start: int) -> tuple[int | None, int]:
    word = _at(tokens, start)
    if word in _TENS:
        unit = start + 2 if _at(tokens, start + 1) == "-" else start + 1
        if value := _UNITS.get(_at(tokens, unit)):
            return _TENS[word] + value, unit + 1
        return _TENS[word], start + 1
    return _SMALL.get(word), start + 1


def _read_below_thousand(tokens: list[Token], start: int) -> tuple[int | None, int]:
    value, end = _read_below_hundred(tokens, start)
    if value is None and _at(tokens, start) == "hundred":
        value, end = 1, start
    if value and _at(tokens, end) == "hundred":
        value, end = value * 100, end + 1
        rest, rest_end = _read_below_hundred(tokens, _skip_and(tokens, end))
        if rest:
            value, end = value + rest, rest_end
    return value, end


def _read_scaled(tokens: list[Token], start: int) -> tuple[int | Fraction | None, int]:
    """The longest number that begins at `start` in words, or in digits with a scale word ("1.5 million")."""
    if isinstance(first := tokens[start], Fraction):
        scale = (_SCALES | {"hundred": 100}).get(_at(tokens, start + 1))
        return (first, start + 1) if scale is None else (first * scale, start + 2)
    total, last_scale, end = None, 10**12, start
    while True:
        begin = end if total is None else _skip_and(tokens, end)
        part, part_end = _read_below_thousand(tokens, begin)
        if part is None and total is None and _at(tokens, begin) in _SCALES:
            part, part_end = 1, begin
        scale = _SCALES.get(_at(tokens, part_end), 1)
        if part is None or part * scale >= last_scale:
            return total, end
        total, last_scale = (total or 0) + part * scale, scale
        end = part_end if scale == 1 else part_end + 1
        if scale == 1:
            return total, end


def _skip_and(tokens: list[Token], index: int) -> int:
    return index + 1 if _at(tokens, index) == "and" else index


def _read_signed(tokens: list[Token], start: int, after: Token | None) -> tuple[Fraction | None, int]:
    # "5-3" and "x - 3" subtract; a sign stands first, or after a symbol that is not a closing bracket
    may_be_sign = after is None or (isinstance(after, str) and not after.isalnum() and after not in (")", "]", "}"))
    if tokens[start] in _MINUS and may_be_sign:
        value, end = _read_unsigned(tokens, start + 1)
        return (None if value is None else -value), end
    return _read_unsigned(tokens, start)


def _read_unsigned(tokens: list[Token], start: int) -> tuple[Fraction | None, int]:
    whole = _at(tokens, start)
    if not isinstance(whole, Fraction):
        return None, start
    value, end = _read_ratio(tokens, start)
    if end == start + 1 and whole.denominator == 1:
        ratio, ratio_end = _read_ratio(tokens, start + 1)
        if ratio_end == start + 4 and 0 < ratio < 1:
            value, end = whole + ratio, ratio_end
    for sign in (["%"], ["percent"], ["per", "cent"]):
        if tokens[end : end + len(sign)] == sign:
            return value / 100, end + len(sign)
    return value, end


def _read_ratio(tokens: list[Token], start: int) -> tuple[Fraction | None, int]:
    """n/d, or n alone where no fraction is meant: a date such as 1/2/2020, a division by zero."""
    number, slash, divisor = _at(tokens, start), _at(tokens, start + 1), _at(tokens, start + 2)
    if not isinstance(number, Fraction):
        return None, start
    is_date = _at(tokens, start + 3) == "/" or (start > 0 and tokens[start - 1] == "/")
    if slash == "/" and isinstance(divisor, Fraction) and divisor != 0 and not is_date:
        return number / divisor, start + 3
    return number, start + 1
