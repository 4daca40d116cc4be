"""Hints for common syntax errors in settings files."""

from __future__ import annotations

import re

_FULL_WIDTH = {
    "“": '"', "”": '"', "‘": "'", "’": "'", "「": '"', "」": '"', "＂": '"', "＇": "'",
    "，": ",", "、": ",", "：": ":", "；": ";", "＝": "=", "（": "(", "）": ")", "［": "[",
    "］": "]", "【": "[", "】": "]", "｛": "{", "｝": "}", "＃": "#", "－": "-", "．": ".",
    "−": "-", "–": "-", "\u3000": "a space", "\xa0": "a space",
}  # fmt: skip
"""Characters that Chinese input methods and word processors write, and their replacements."""
_NAMES = {
    "−": "the minus sign −",
    "–": "the dash –",
    "\u3000": "a full-width space",
    "\xa0": "a non-breaking space",
}
_BACKSLASH = (
    "a backslash in quotes begins an escape such as \\n; write the path with / "
    "('C:/data/a.csv'), or double each backslash"
)
OPENING_QUOTES = "“‘「"


def python_hint(line: str, message: str) -> str:
    """A hint about a syntax error in `line`; may be empty.

    Args:
        line: The text of the line.
        message: Python's message.
    """
    if conflict := _conflict(line):
        return conflict
    if "unicodeescape" in message or ("unexpected character after line" in message):
        return _BACKSLASH
    if sign := _sign_in(message) or ("invalid" in message and _full_width(_outside(line))):
        return _replace(sign)
    if "unterminated" in message:
        if sign := next((sign for sign in "“”‘’" if sign in line), ""):
            return f"a quote is not closed; {_replace(sign)}"
        closing = line.rstrip().endswith(("\\'", '\\"'))
        return _BACKSLASH if closing else "a quote is opened and not closed"
    if "was never closed" in message:
        return "add the closing bracket"
    if "indent" in message:
        return "begin the line without spaces or tabs"
    if "leading zeros" in message:
        return "write the number without leading zeros"
    if found := re.match(r"\s*(\w+(?:-\w+)+)\s*=", line):
        return f"write {found[1].replace('-', '_')}"
    if re.match(r"\s*\w+\s*=\s*(#.*)?$", line):
        return "write a value after ="
    if re.match(r"\s*[A-Za-z_]\w*\s+[^=\s]", line) and "=" not in line:
        return "write name = value"
    return ""


def yaml_hint(line: str, message: str, context: str = "") -> str:
    """A hint about a syntax error in `line`, for which PyYAML gives `message` and `context`."""
    if conflict := _conflict(line):
        return conflict
    if "'\\t'" in message or ("\t" in line[: len(line) - len(line.lstrip())]):
        return "the line has a tab; YAML takes spaces only"
    if "escape" in message:
        return _BACKSLASH
    if sign := _full_width(line):
        return _replace(sign)
    if "cannot start any token" in message:
        return "write quotes around the value"
    if re.match(r"[A-Za-z_]\w*:[^\s/]", line):
        return "write a space after the colon"
    if re.match(r"\s+\w+:\s", line):
        return "begin the line without spaces"
    if "<scalar>" in message:
        return "a quote within quotes: write the value in quotes of the other kind"
    if "mapping values are not allowed" in message:
        return "write one  name: value  per line, and quotes around a value with a colon"
    if "quoted scalar" in context:
        return "a quote is opened and not closed"
    if "flow sequence" in context or "flow mapping" in context:
        return f"add the closing bracket {']' if 'sequence' in context else '}'}"
    if re.match(r"\s*[A-Za-z_]\w*\s*=", line):
        return "YAML takes  name: value ; a file with  name = value  must end in .py"
    return ""


def yaml_lines_hint(text: str) -> str:
    """A hint about a file whose lines are not ``key: value``."""
    first = next((line for line in text.split("\n") if line.strip() and line[0] != "#"), "")
    return yaml_hint(first, "")


def _conflict(line: str) -> str:
    """A hint about a mark that git leaves in a file."""
    found = re.match(r"<{7} |={7}$|>{7} ", line)
    return "this is a merge conflict marker; keep one of the two versions" if found else ""


def _sign_in(message: str) -> str:
    """The character that Python calls invalid."""
    found = re.search(r"invalid (?:non-printable )?character (?:'(.)' \()?U\+([0-9A-F]+)", message)
    sign = chr(int(found[2], 16)) if found else ""
    return sign if sign in _FULL_WIDTH else ""


def _outside(line: str) -> str:
    """`line` without what is in quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def _full_width(line: str) -> str:
    return next((sign for sign in line if sign in _FULL_WIDTH), "")


def _replace(sign: str) -> str:
    name = _NAMES.get(sign, f"the full-width character {sign}")
    return f"write {_FULL_WIDTH[sign]} instead of {name}"
