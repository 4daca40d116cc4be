"""Schemas of functions."""

import enum
from typing import Annotated, Literal, TypedDict

import pytest

from xtuner.calls.schema import problems
from xtuner.errors import ConfigError
from xtuner.tools.function import schema_of


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


class Place(TypedDict, total=False):
    city: str
    zip: int


def weather(
    city: str,
    days: int = 1,
    unit: Unit = Unit.CELSIUS,
    kind: Literal["short", "long"] = "short",
    hours: list[int] | None = None,
    more: dict[str, float] | None = None,
    place: Place | None = None,
    height: Annotated[float, "In metres."] = 0.0,
    key: int | str = 0,
) -> str:
    """Tell the weather
    of a city.

    It is made up.

    Args:
        city: The city,
            in any language.
        days (int): How many days.
        unit: Of temperatures.

    Returns:
        The weather.
    """
    return f"{city} {days}"


def test_hints_and_docstring_become_a_schema():
    tool = schema_of(weather)
    assert tool["type"] == "function"
    inner = tool["function"]
    assert (inner["name"], inner["description"]) == ("weather", "Tell the weather of a city.")
    properties = inner["parameters"]["properties"]
    assert properties["city"] == {"type": "string", "description": "The city, in any language."}
    assert properties["days"] == {"type": "integer", "description": "How many days."}
    assert properties["unit"]["enum"] == ["C", "F"]
    assert properties["kind"] == {"type": "string", "enum": ["short", "long"]}
    assert properties["height"] == {"type": "number", "description": "In metres."}
    assert properties["key"] == {"type": ["integer", "string"]}
    assert properties["more"]["anyOf"][0] == {
        "type": "object", "additionalProperties": {"type": "number"},
    }  # fmt: skip
    assert inner["parameters"]["required"] == ["city"]


def test_the_schema_fits_what_the_function_takes():
    parameters = schema_of(weather)["function"]["parameters"]
    good = {"city": "Rome", "days": 2, "hours": [1, 2], "more": None, "place": {"city": "x"}}
    assert not list(problems(good, parameters))
    assert len(list(problems({"days": "2", "unit": "K", "key": 1.5}, parameters))) == 4


def test_sphinx_docstrings():
    def add(a: int, b: int) -> int:
        """Add.

        :param a: One.
        :param int b: Other.
        """
        return a + b

    properties = schema_of(add)["function"]["parameters"]["properties"]
    assert [p["description"] for p in properties.values()] == ["One.", "Other."]


def test_invalid_tools_are_reported():
    def without(a):
        return a

    def several(*a: int):
        return a

    def odd(a: object):
        return a

    for function, words in (
        (without, "'a' has no type hint"),
        (several, "takes .*named parameters"),
        (odd, "has no JSON equivalent"),
    ):
        with pytest.raises(ConfigError, match=words):
            schema_of(function)
