"""The number that an answer states, in digits or in words.

Words are English ("two hundred and five") and Chinese or Japanese numerals ("二百零五"); digits may be those of any
script, and stand between letters where the script puts no spaces ("图中有3只狗").
"""

import math
import re
from collections.abc import Sequence

from perpo.rewards.absence import says_none
from perpo.rewards.completions import half_width, without_marks

_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve"] + [
    stem + "teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")
]
_TENS = {
    stem + "ty": 10 * i for i, stem in enumerate(("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"), 2)
}
_WORDS = {word: i for i, word in enumerate(["zero", *_UNITS, *_TEENS])} | _TENS
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_VAGUE = re.compile(rf"\b(?:(?:{'|'.join(_SCALES)})s|half an?|and a half)\b")

# Scripts that put no spaces between words, or none between a number and its counter: Thai to Hangul. Their letters may
# stand next to a number ("有3只狗"); those of other scripts make it a part of a word ("B2").
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u3400-\u4dbf"
    r"\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_LETTER = rf"(?:[^\W{_UNSPACED}]|\d)"
_OF_MEASURE = r"(?:[mcdkµn]?m|in|ft|[mk]?g|lbs?|m?s|min|h|m?[lL]|[kMG]?Hz|kW|V|C|F|px|mph)\b"  # without a space: 25km
_EAST_DIGITS = {c: i for i, c in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
_EAST_SCALES = {"十": 10, "百": 100, "백": 100, "千": 1000, "천": 1000}
_EAST_SCALES |= dict.fromkeys("万萬만", 10**4) | dict.fromkeys("亿億억", 10**8) | dict.fromkeys("兆조", 10**12)
_EAST_SCALE = f"[{''.join(_EAST_SCALES)}]"
_COUNTERS = (
    "个個只隻条條头頭匹辆輛张張本把位名人朵棵颗顆架艘台臺支枝根件块塊座栋棟双雙对對扇盏盞瓶杯碗盘盤串间間层層幅粒"
    "株顶頂枚门門口羽つ冊"
)

# Digits that are part of a word or of something longer ("B2", "1.2.3", "3,5") are no number; "2-3" ends in 3, not −3.
# Thousands may be set apart by commas, apostrophes or spaces; what looks so and is not ("12 3456") is read as before.
_GROUPED = r"\d{1,3}+(?:(?:,\d{3})++|(?:['’ \u00a0\u2009\u202f]\d{3}(?!\d))++)(?:\.\d++)?+"
_DIGITS = re.compile(
    rf"(?<!{_LETTER})(?<![.第])(?<!\d,)"
    rf"[-−+]?+(?:{_GROUPED}|\d++(?:\.\d++)?+|\.\d++)(?:[eE][-+]?+\d{{1,3}}+)?+"
    rf"(?P<east>(?:\s?{_EAST_SCALE}++(?:\d++(?:\.\d++)?+)?+){{0,8}}+)"
    rf"(?:(?={_OF_MEASURE})|(?!{_LETTER}|[.,]\d))"
)
# Chinese and Japanese numerals: with what they count, or alone. "几" and "数" before or "多" after make them vague.
_NUMERAL = f"{''.join(_EAST_DIGITS)}{''.join(_EAST_SCALES)}"
_NUMERALS = re.compile(
    rf"(?<![几幾数數第{_NUMERAL}])([{_NUMERAL}]++)(?=\s?[{_COUNTERS}])(?!\s?[张張幅枚][图圖照])|^\W*+([{_NUMERAL}]++)\W*+$"
)
_SCALED = re.compile(rf"[\s-]({'|'.join(_SCALES)})\b")
_NUMBER_WORD = rf"(?:{'|'.join([*_WORDS, *_SCALES])})\b"
_NAMED = re.compile(rf"\b(?:an?\s+(?={'|'.join(_SCALES)}))?+{_NUMBER_WORD}(?:(?:\s+and\s+|[\s-]+){_NUMBER_WORD})*+")


def read_number(text: str) -> float | None:
    """The number that a text states: the last one in digits; without digits the last one in words.

    The last, because answers that reason end with their result. "1,234", "1 234", "3 million", "3万" and "two hundred
    and five" are one number each; words are English, or Chinese and Japanese numerals. None without a number, where
    it overflows, or where words say it roughly ("dozens", "two and a half", "两三只").
    """
    text = _plain(text)
    digits = None
    for digits in _DIGITS.finditer(text):  # noqa: B007 - the last one
        pass
    if digits is not None:
        return _in_digits(digits, text)
    words = re.sub(r"\bno[\s-]one\b", "nobody", text.lower())
    if _VAGUE.search(words):
        return None
    named = None
    for named in _NAMED.finditer(words):  # noqa: B007 - the last one
        pass
    if named is not None:
        return _spelt(re.findall(r"[a-z]++", named[0]))
    for named in _NUMERALS.finditer(text):  # noqa: B007 - the last one
        pass
    return None if named is None else _in_east_asian(list(named[1] or named[2]))


def _plain(text: str) -> str:
    """With digits and marks in ASCII, but for the Chinese comma: "3，4" is two numbers, as "3,4" need not be."""
    text = re.sub(r"(?<=[０-９])，(?=[０-９]{3})", ",", without_marks(text))
    return "，".join(half_width(part) for part in text.split("，"))


def _in_digits(found: re.Match[str], text: str) -> float | None:
    east = found["east"]
    digits = found[0].removesuffix(east)
    number = float(re.sub(r"[,'’\s]", "", digits).replace("−", "-"))
    if east:
        size = _in_east_asian([str(abs(number)), *re.findall(rf"{_EAST_SCALE}|[\d.]++", east)])
        number = math.nan if size is None else math.copysign(size, number)
    elif scale := _SCALED.match(text.lower(), found.end()):
        number *= _SCALES[scale[1]]
    return number if math.isfinite(number) else None


def _in_east_asian(tokens: Sequence[str]) -> float | None:
    """The value of digits and scales: 3万5千, 二百零五, 三百五 (350). None where they are no one number (三四)."""
    total = section = 0.0  # down to the last of 万, 亿, 兆, and since
    number: float | None = None  # what the next scale multiplies
    last = largest = 0  # the scale before, and the largest yet from 万 on
    zero = False  # since the last scale
    for token in tokens:
        scale = _EAST_SCALES.get(token)
        if scale is None:
            value = _EAST_DIGITS[token] if token in _EAST_DIGITS else float(token)
            if value == 0 and len(tokens) > 1:
                zero = True
            elif number is not None:
                return None
            else:
                number = value
            continue
        if scale < 10**4:
            section += (1 if number is None else number) * scale
        else:
            part = section + (number or 0)
            total = (total + part or 1) * scale if scale > largest else total + part * scale
            section, largest = 0.0, max(largest, scale)
        number, last, zero = None, scale, False
    if number is not None and last >= 100 and not zero and number < 10:
        number *= last // 10
    return total + section + (number or 0.0)


def _spelt(words: Sequence[str]) -> float | None:
    """The last number of a run of number words: 205 of two hundred and five, 3 of one, two, three."""
    total, least = 0, math.inf  # of thousands and more, and the smallest of those scales
    part, room = 0, 0  # what is below thousands, and what may be added to it: less than that
    for word in words:
        scale = _SCALES.get(word, 0)
        if scale > 100:
            total, least, part, room = total + max(part, 1) * scale, min(least, scale), 0, 1000
            if scale > least:
                return None
        elif scale:
            if part >= 100:
                return None
            part, room = max(part, 1) * scale, scale
        elif word in _WORDS:
            value = _WORDS[word]
            if not 0 < value < room:  # another number begins
                total, least, part = 0, math.inf, 0
            part += value
            room = 10 if value >= 20 else 0
    return float(total + part)


def read_count(text: str) -> int | None:
    """The whole number ≥ 0 that a text states, as `read_number`; without any number 0 where it says that there is none.

    "No dogs." says so, "no idea" does not: see `perpo.rewards.absence`.
    """
    value = read_number(text)
    if value is not None:
        return int(value) if value >= 0 and value == int(value) else None
    return 0 if says_none(text) and not (_VAGUE.search(text.lower()) or _DIGITS.search(_plain(text))) else None
