"""Read the YAML file of another trainer: plain values with line numbers."""

from __future__ import annotations

from typing import Any

import yaml

from xtuner.config.read.arithmetic import RefusedError, check_size
from xtuner.config.read.yaml import NumberLoader
from xtuner.errors import ConfigError
from xtuner.migrate.values import Table, Unread

_DEPTH = 20


def read(text: str) -> Table:
    """Read `text`, a mapping.

    Raises:
        ConfigError: It is not YAML, not a mapping, or has aliases.
    """
    try:
        node = yaml.compose(text, Loader=NumberLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{line}is not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError("is nested too deeply") from None
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError("is not a mapping of the form  key: value")
    table: Table = _value(node, 0, set())
    try:
        check_size(table)
    except RefusedError as refused:
        raise ConfigError(str(refused)) from None
    return table


def _value(node: yaml.Node, depth: int, above: set[int]) -> Any:
    if depth > _DEPTH or id(node) in above:
        raise ConfigError(f"line {node.start_mark.line + 1}: is nested too deeply")
    above = {*above, id(node)}
    if isinstance(node, yaml.MappingNode):
        table = Table(node.start_mark.line + 1)
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
            table.put(name, _value(value, depth + 1, above), key.start_mark.line + 1)
        return table
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, depth + 1, above) for item in node.value]
    try:
        return NumberLoader("").construct_object(node)  # type: ignore[no-untyped-call]
    except Exception as error:  # the library raises many kinds for values that are out of range
        return Unread(
            node.start_mark.line + 1, str(node.value)[:40], f"is not a valid value: {error}"
        )
