"""Values of an old config: plain values, tables with line numbers, dotted names, unread values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dotted:
    """An imported name, such as ``torch.optim.AdamW``; nothing is imported."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True)
class Unread:
    """A value that is known only after executing the file: its line, its text and the reason."""

    line: int
    text: str
    why: str


class UnreadError(Exception):
    """A required value is `Unread`."""

    def __init__(self, value: Unread) -> None:
        super().__init__(value)
        self.value = value


class Table(dict[str, Any]):
    """A dict of a config.

    Attributes:
        line: The first line of the dict.
        lines: The line of each key.
        used: The keys that were read, so that the remaining keys can be reported.
    """

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}
        self.used: set[str] = set()

    def put(self, key: str, value: Any, line: int) -> None:
        """Set `key`, defined in `line`."""
        self[key] = value
        self.lines[key] = line

    def take(self, key: str, default: Any = None) -> Any:
        """Return the value of `key` and mark the key as used.

        Raises:
            UnreadError: The value could not be read.
        """
        self.used.add(key)
        value = self.get(key, default)
        if isinstance(value, Unread):
            raise UnreadError(value)
        return value

    def table(self, key: str) -> Table:
        """The table at `key`, or an empty table.

        Raises:
            TypeError: The value is not a table.
        """
        return self.optional(key) or Table(self.line_of(key))

    def optional(self, key: str) -> Table | None:
        """The table at `key`, or None.

        Raises:
            TypeError: The value is not a table.
        """
        value = self.take(key)
        if value is None or isinstance(value, Table):
            return value
        raise TypeError(f"{key} in line {self.line_of(key)} is not a dict")

    def listed(self, key: str) -> list[Any]:
        """The list at `key`, or an empty list.

        Raises:
            TypeError: The value is not a list.
        """
        value = self.take(key)
        if value is None or isinstance(value, list | tuple):
            return list(value or ())
        raise TypeError(f"{key} in line {self.line_of(key)} is not a list")

    def name(self, key: str = "type") -> str:
        """The dotted name at `key`, which is a string in configs dumped by mmengine."""
        value = self.take(key)
        return str(value) if isinstance(value, str | Dotted) else ""

    def last(self, key: str = "type") -> str:
        """The last part of the dotted name at `key`, without ``from_pretrained`` and similar."""
        return last_part(self.name(key))

    def line_of(self, key: str) -> int:
        """The line of `key`, or of the table if the key is missing."""
        return self.lines.get(key, self.line)

    def pass_over(self, *keys: str) -> None:
        """Mark `keys` and everything below them as used: they do not affect the result."""
        self.used.update(keys)
        for key in keys:
            use_all(self.get(key))

    def merged(self, other: Table) -> Table:
        """This table updated recursively with `other`."""
        result: Table = copied(self)
        for key, value in other.items():
            if key == "_delete_":
                continue
            below = result.get(key)
            replaces = isinstance(value, Table) and value.get("_delete_") is True
            if isinstance(value, Table) and isinstance(below, Table) and not replaces:
                value = below.merged(value)
            elif isinstance(value, Table):
                value = Table(value.line).merged(value)
            result.put(key, value, other.line_of(key))
        return result


_CALLED = ("from_pretrained", "load", "load_dataset", "from_config", "load_from_disk")


def last_part(name: str) -> str:
    """``AutoTokenizer`` for ``transformers.AutoTokenizer.from_pretrained``."""
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in _CALLED and parts[-2][:1].isupper():
        parts.pop()
    return parts[-1]


def copied(value: Any) -> Any:
    """A copy that shares no table or list with `value`."""
    if isinstance(value, Table):
        result = Table(value.line)
        for key, item in value.items():
            result.put(key, copied(item), value.line_of(key))
        return result
    return [copied(item) for item in value] if isinstance(value, list) else value


def use_all(value: Any) -> None:
    """Mark everything in `value` as used."""
    if isinstance(value, Table):
        value.used.update(value)
    for item in value.values() if isinstance(value, Table) else _items(value):
        use_all(item)


def unused(value: Any, path: str) -> Iterator[tuple[int, str, Any]]:
    """Yield line, path and value of every unused key, without the keys below it."""
    if isinstance(value, Table):
        for key, item in value.items():
            if key in value.used:
                yield from unused(item, f"{path}.{key}")
            else:
                yield value.line_of(key), f"{path}.{key}", item
    else:
        for number, item in enumerate(_items(value)):
            yield from unused(item, f"{path}[{number}]")


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def written(value: Any) -> str:
    """`value` in config syntax, for messages."""
    if isinstance(value, Table):
        inside = ", ".join(f"{key}={written(item)}" for key, item in value.items())
        return f"dict({inside})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(written(item) for item in value)}]"
    if isinstance(value, Unread):
        return value.text
    return str(value) if isinstance(value, Dotted) else repr(value)
