"""Validation against a schema, and the messages for violations."""

import pytest

from xtuner.calls.schema import problems, type_name

ADDRESS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 2},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "deep": {"$ref": "#/$defs/deep"},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "flag": {"type": ["boolean", "null"]},
    },
    "required": ["city"],
    "$defs": {"deep": {"type": "object", "properties": {"again": {"$ref": "#/$defs/deep"}}}},
}


@pytest.mark.parametrize(
    "value",
    [
        {"city": "Paris"},
        {"city": "Paris", "days": 3, "unit": "C", "tags": ["a"], "either": None, "flag": None},
        {"city": "Paris", "days": 3.0, "deep": {"again": {"again": {"more": 1}}}},
    ],
    ids=["least", "most", "nested"],
)
def test_fits(value):
    assert list(problems(value, ADDRESS)) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({}, "city is missing"),
        ({"city": 3}, "city must be a string, and is 3"),
        ({"city": "P"}, "city must have at least 2 characters, and has 1"),
        ({"city": "Paris", "days": "3"}, "days must be an integer, and is '3'"),
        ({"city": "Paris", "days": True}, "days must be an integer, and is True"),
        ({"city": "Paris", "days": 8}, "days must be at most 7, and is 8"),
        ({"city": "Paris", "unit": "K"}, "unit must be one of 'C', 'F', and is 'K'"),
        ({"city": "Paris", "tags": ["a", 1]}, "tags[1] must be a string, and is 1"),
        ({"city": "Paris", "tags": ["a"] * 3}, "tags must have at most 2 items, and has 3"),
        ({"city": "Paris", "deep": {"again": 1}}, "deep.again must be an object, and is 1"),
        ({"city": "Paris", "either": "x"}, "either matches none of the alternatives"),
        ({"city": "Paris", "town": "x"}, "town is not a parameter; allowed: city, days"),
        ([], "must be an object, and is []"),
    ],
    ids=range(13),
)
def test_does_not_fit(value, words):
    found = list(problems(value, ADDRESS))
    assert len(found) == 1 and found[0].startswith(words)


def test_all_problems_are_given():
    assert len(list(problems({"days": 0, "unit": 1}, ADDRESS))) == 3


def test_a_schema_that_contains_itself_ends():
    endless = {"$ref": "#"}
    assert list(problems(1, endless)) == []
    both = {"anyOf": [{"$ref": "#"}, {"type": "string"}]}
    assert list(problems("x", both)) == []
    assert list(problems(1, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]})) == []


def test_names_of_types_in_data_sets():
    names = {"str": "string", "STRING": "string", "List[int]": "array", "float": "number"}
    assert {name: type_name(name) for name in names} == names
    assert type_name("color") is None
    assert list(problems("red", {"type": "color"})) == []
