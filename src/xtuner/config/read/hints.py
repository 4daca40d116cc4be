"""Hints for common syntax errors in settings files."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import unicodedata
from collections.abc import Callable

_FULL_WIDTH = {
    "“": '"', "”": '"', "‘": "'", "’": "'", "「": '"', "」": '"', "『": '"', "』": '"',
    "《": '"', "》": '"', "、": ",", "。": ".", "【": "[", "】": "]", "〔": "(", "〕": ")",
    "−": "-", "–": "-", "—": "-", "\u3000": " ", "\xa0": " ", "`": "'",
}  # fmt: skip
"""Characters that Chinese input methods and word processors write, and their replacements; see
`_replacement` for the others."""
_NAMES = {
    "−": "the minus sign −",
    "–": "the dash –",
    "—": "the dash —",
    "\u3000": "a full-width space",
    "\xa0": "a non-breaking space",
    "`": "the backtick `",
}
_BACKSLASH = (
    "a backslash in quotes begins an escape such as \\n; write the path with / "
    "('C:/data/a.csv'), or double each backslash"
)
_COMMA = "write a comma between the two items"
_IN_YAML = "“”‘’「」＂＇，、：；［］｛｝【】＃\u3000\xa0"
"""Those that stand where YAML takes another character; others are often part of a text."""
OPENING_QUOTES = "“‘「『"

_TEXTS = re.compile(
    r"\'{3}.*?\'{3}|\"{3}.*?\"{3}|'(?:\\.|[^'\\\n])*'|\"(?:\\.|[^\"\\\n])*\"|#[^\n]*", re.DOTALL
)
"""The strings and comments of Python."""
_LONG_PART = 60
"""Characters of a string from which it may be continued by the next one in a list."""
_CONTINUED = re.compile(r"(^|[\s,，、：:；;\-–—(（/\\+=…])$")
"""The end of a text that goes on in the next string."""
_SENTENCE = re.compile(r"[.?!。？！…][\"'”’」』)）]*$")
_BARE = re.compile(r"[^\s，、：；。？！]+")
"""A word, name, path or address."""
_LATIN_WORDS = re.compile(r"[^\W⺀-鿿가-힣]{2}")
_FILE = re.compile(r"\.\w{1,8}$")
_ASSIGNED = r"\s*\w+\s*=\s*"
_LINES_OF_PYTHON: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\s*\w+(?:-\w+)+\s*=", lambda found: f"write {found[0].strip(' =').replace('-', '_')}"),
    (_ASSIGNED + r"(#.*)?$", "write a value after ="),
    (r"\s*\w+\s*:=", "write name = value"),
    (r"\s*[A-Za-z_]\w*\s+[^=\s][^=]*$", "write name = value"),
    (_ASSIGNED + r"(\d{1,3}(?:,\d{3})+)\b", lambda found: f"write {found[1].replace(',', '')}"),
    (
        r"\s*\w*(?:ratio|dropout|decay)\w*\s*=\s*(\d+(?:\.\d+)?)\s*%",
        lambda found: f"write the share as a number: {float(found[1]) / 100:g}",
    ),
    (_ASSIGNED + r"\d+(?:\.\d+)?\s*%", "write a number without %"),
    (_ASSIGNED + r"0\d", "write the number without leading zeros"),
    (_ASSIGNED + r"\d[\d.]*(?![eE][+-]?\d)[A-Za-z]", "write numbers in digits, and text in quotes"),
    (_ASSIGNED + r"(?:[A-Za-z]:)?[.~/\\]", "write the path in quotes, with / between its folders"),
    (r"(?:[^'\"]|'[^']*'|\"[^\"]*\")*?\s*(//|/\*)", "a comment begins with #"),
    (r".*?['\"\w)\]}]\s+['\"]", _COMMA),
)
"""Patterns of wrong lines of Python, and the hint or a function that makes it of the match."""


def python_hint(line: str, message: str, before: str = "") -> str:
    """A hint about a syntax error in `line`; may be empty.

    Args:
        line: The text of the line.
        message: Python's message.
        before: The text of the lines before.
    """
    if conflict := _conflict(line):
        return conflict
    if "unicodeescape" in message:
        return _BACKSLASH
    if hidden := re.search(r"non-printable character (U\+(?:200|206|FEF)\w)", message):
        return f"remove the invisible character {hidden[1]}"
    if sign := _sign_in(message) or ("invalid" in message and _first(_replacement, _outside(line))):
        return _replace(sign)
    if "unterminated" in message:
        if sign := next((sign for sign in "“”‘’" if sign in line), ""):
            return f"a quote is not closed; {_replace(sign)}"
        closing = line.rstrip().endswith(("\\'", '\\"'))
        return _BACKSLASH if closing else "a quote is opened and not closed"
    if "was never closed" in message:
        return "add the closing bracket"
    if "unmatched" in message or "does not match" in message:
        return "each bracket needs one of the same kind: remove it, or add the other"
    if "indent" in message:
        return "begin the line without spaces or tabs"
    if found := re.match(r"\s*(?:'(\w+)'|\"(\w+)\")\s*=(?!=)", line):
        return f"write the name without quotes: {found[1] or found[2]} ="
    if re.match(r"\s*['\"]", line) and _is_open_item(before):
        return _COMMA
    for pattern, hint in _LINES_OF_PYTHON:
        if found := re.match(pattern, line):
            return hint if isinstance(hint, str) else hint(found)
    return ""


def yaml_hint(line: str, message: str, context: str = "") -> str:
    """A hint about a syntax error in `line`, for which PyYAML gives `message` and `context`."""
    if conflict := _conflict(line):
        return conflict
    if "'\\t'" in message or ("\t" in line[: len(line) - len(line.lstrip())]):
        return "the line has a tab; YAML takes spaces only"
    if "escape" in message:
        return _BACKSLASH
    if "another document" in message:
        return "a settings file is one document: remove the line"
    if sign := _first(_IN_YAML.__contains__, line):
        return _replace(sign)
    if "cannot start any token" in message or re.match(r"\s*\w+:\s+[*&!|>%@]", line):
        return "write quotes around the value"
    if re.match(r"\s*-\s+\w+:\s", line) and "block" in message:
        return "write the settings without the leading -"
    if re.match(r"\s*-[^\s-]", line):
        return "write a space after the -"
    if re.match(r"[A-Za-z_]\w*:[^\s/]", line):
        return "write a space after the colon"
    if "flow" not in context and re.match(r"\s+\w+:\s", line):
        return "begin the line without spaces"
    if "<scalar>" in message:
        return "a quote within quotes: write the value in quotes of the other kind"
    if "mapping values are not allowed" in message:
        return "write one  name: value  per line, and quotes around a value with a colon"
    if "quoted scalar" in context:
        return "a quote is opened and not closed"
    if "flow sequence" in context or "flow mapping" in context:
        bracket = "]" if "sequence" in context else "}"
        return _COMMA if bracket in line else f"add the closing bracket {bracket}"
    if re.match(_ASSIGNED, line):
        return "YAML takes  name: value ; a file with  name = value  must end in .py"
    return ""


def yaml_lines_hint(text: str) -> str:
    """A hint about a file whose lines are not ``key: value``."""
    first = next((line for line in text.split("\n") if line.strip() and line[0] != "#"), "")
    return yaml_hint(first, "block")


def lacks_comma(source: str) -> bool:
    """Whether the expression `source` is several strings that Python joins although two of them
    are items of their own rather than parts of one text."""
    tokens = tokenize.generate_tokens(io.StringIO(f"({source})").readline)
    parts = [ast.literal_eval(t.string) for t in tokens if t.type == tokenize.STRING]
    return any(map(_are_items, parts, parts[1:]))


def _are_items(first: str, second: str) -> bool:
    """Whether two strings are items of a list: words, paths or sentences that would be joined
    without a space. A part of a longer text ends with a space or as in the middle of a sentence,
    is long, or is followed by a space."""
    if len(first) >= _LONG_PART or _CONTINUED.search(first) or not second or second[0].isspace():
        return False
    ends = _SENTENCE.search(first) or _FILE.search(first)
    bare = _BARE.fullmatch(first) and _BARE.fullmatch(second)
    return bool(ends or bare or _LATIN_WORDS.fullmatch(first[-1] + second[0]))


def plain(text: str) -> str:
    """`text` with the characters of keyboards in place of those of Chinese input methods and word
    processors, and without punctuation at its end."""
    written = "".join(_replacement(sign) or sign for sign in text)
    return written.strip().rstrip(",;").rstrip()


def _conflict(line: str) -> str:
    """A hint about a mark that git leaves in a file."""
    found = re.match(r"<{7} |={7}$|>{7} ", line)
    return "this is a merge conflict marker; keep one of the two versions" if found else ""


def _sign_in(message: str) -> str:
    """The character that Python calls invalid."""
    found = re.search(r"invalid (?:non-printable )?character (?:'(.)' \()?U\+([0-9A-F]+)", message)
    sign = chr(int(found[2], 16)) if found else ""
    return sign if _replacement(sign) else ""


def _is_open_item(before: str) -> bool:
    """Whether the lines `before` end with an item within a bracket."""
    code = _TEXTS.sub(lambda found: "" if found[0][0] == "#" else "''", before).rstrip()
    depth = sum((sign in "([{") - (sign in ")]}") for sign in code)
    return depth > 0 and bool(re.search(r"['\w)\]}]$", code))


def _outside(line: str) -> str:
    """`line` without what is in quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def _first(is_wrong: Callable[[str], object], line: str) -> str:
    return next(filter(is_wrong, line), "")


def _replacement(sign: str) -> str:
    """What to write instead of `sign`; empty if it is as on a keyboard."""
    if "！" <= sign <= "～":  # the full-width forms of ASCII
        return unicodedata.normalize("NFKC", sign)
    return _FULL_WIDTH.get(sign, "")


def _replace(sign: str) -> str:
    name = _NAMES.get(sign, f"the full-width character {sign}")
    plain_sign = _replacement(sign)
    return f"write {'a space' if plain_sign == ' ' else plain_sign} instead of {name}"
