import json
import re
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.errors import BadRequest
from app.extensions.schemas import (
    AWS,
    EXTENSIONS,
    GOOGLE,
    AutoTagging,
    InvalidJson,
    parse_extensions,
    read_json,
)

VALID = {"name": GOOGLE, "minConfidence": 80, "maxTags": 10}


def asked(**changes: Any) -> list[dict[str, Any]]:
    """One extension, valid but for the changes; `...` leaves a key out."""
    one = {**VALID, **changes}
    return [{key: value for key, value in one.items() if value is not ...}]


def refusal(value: Any) -> str:
    with pytest.raises(BadRequest) as refused:
        parse_extensions(value)
    prefix = "Your request contains invalid value for extensions parameter. "
    assert refused.value.status_code == 400
    assert refused.value.message.startswith(prefix)
    return refused.value.message.removeprefix(prefix)


# What is accepted


@pytest.mark.parametrize("value", [None, []])
def test_null_and_an_empty_array_are_none(value: Any) -> None:
    assert parse_extensions(value) == []


def test_both_extensions_are_read_in_their_order() -> None:
    first, second = parse_extensions([VALID, {"name": AWS, "minConfidence": 0.5, "maxTags": 0}])
    assert (first.name, first.min_confidence, first.max_tags) == (GOOGLE, 80, 10)
    assert (second.name, second.min_confidence, second.max_tags) == (AWS, 0.5, 0)


def test_snake_case_names_of_the_python_sdk_are_read() -> None:
    [one] = parse_extensions([{"name": GOOGLE, "min_confidence": 80, "max_tags": 10}])
    assert (one.min_confidence, one.max_tags) == (80, 10)


@pytest.mark.parametrize("confidence", [0, 0.0, 100, 100.0, 99.99])
def test_min_confidence_may_be_any_number_from_0_to_100(confidence: float) -> None:
    assert parse_extensions(asked(minConfidence=confidence))[0].min_confidence == confidence


@pytest.mark.parametrize("max_tags", [0, 30, 5.0])
def test_max_tags_may_be_any_integer_from_0_to_30(max_tags: float) -> None:
    [one] = parse_extensions(asked(maxTags=max_tags))
    assert one.max_tags == max_tags
    assert isinstance(one.max_tags, int)


# What is refused


@pytest.mark.parametrize("value", ["5", True, None, [], {}, -0.01, 100.01, 1e309, ...])
def test_min_confidence_that_is_no_percentage_is_refused_by_name(value: Any) -> None:
    assert refusal(asked(minConfidence=value)).startswith("extensions[0].minConfidence ")


@pytest.mark.parametrize("value", ["5", True, None, [], {}, -1, 31, 5.5, 1e309, float("nan"), ...])
def test_max_tags_that_is_no_small_integer_is_refused_by_name(value: Any) -> None:
    assert refusal(asked(maxTags=value)).startswith("extensions[0].maxTags ")


def test_refusal_names_the_element() -> None:
    wrong = {"name": AWS, "minConfidence": 0, "maxTags": 31}
    assert refusal([VALID, wrong]).startswith("extensions[1].maxTags ")


@pytest.mark.parametrize(
    "name", ["remove-bg", "", None, 5, ..., {}, [], GOOGLE.upper(), f" {GOOGLE}"]
)
def test_unknown_extension_is_refused_and_the_known_ones_are_listed(name: Any) -> None:
    problem = refusal(asked(name=name))
    assert problem == f"extensions[0].name should be one of: {GOOGLE}, {AWS}."


def test_same_extension_twice_is_refused() -> None:
    assert refusal([VALID, VALID]).startswith("extensions[1].name ")


def test_unknown_key_is_refused_by_name() -> None:
    assert refusal(asked(mintags=5)).startswith("extensions[0].mintags ")


@pytest.mark.parametrize("value", [{}, "x", 5, True, VALID])
def test_what_is_no_array_is_refused(value: Any) -> None:
    assert refusal(value) == "extensions should be an array."


@pytest.mark.parametrize("item", [None, "x", 5, []])
def test_element_that_is_no_object_is_refused(item: Any) -> None:
    assert refusal([VALID, item]) == "extensions[1] should be an object."


def test_a_hundred_thousand_elements_are_refused_at_once() -> None:
    assert refusal([VALID] * 100_000) == "extensions should have at most 10 elements."


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
KEYS = ["name", "minConfidence", "min_confidence", "maxTags", "max_tags", "x"]
ALMOST = st.lists(
    st.dictionaries(
        st.sampled_from(KEYS),
        st.sampled_from([*EXTENSIONS, 0, 5, 5.0, 31, -1, "5"]) | ANYTHING,
        max_size=5,
    ),
    max_size=4,
)


@given(ANYTHING | ALMOST)
@example([{"name": GOOGLE, "minConfidence": 10**400, "maxTags": 1}])
@example([{"name": GOOGLE, "minConfidence": 1, "maxTags": 10**400}])
@example([{"name": GOOGLE, "minConfidence": 1, "min_confidence": 2, "maxTags": 1}])
@example([{"name": "\ud800", "minConfidence": 1, "maxTags": 1}])
@example([{"\ud800": 1, **VALID}])
def test_any_value_is_read_or_refused(value: Any) -> None:
    try:
        wanted = parse_extensions(value)
    except BadRequest as refused:
        refused.message.encode()  # it can be answered
        return
    names = [extension.name for extension in wanted]
    assert len(set(names)) == len(names)
    for extension in wanted:
        assert isinstance(extension, AutoTagging)
        assert 0 <= extension.min_confidence <= 100
        assert 0 <= extension.max_tags <= 30


# JSON


def test_trailing_comma_of_the_documented_example_is_forgiven() -> None:
    text = """[
        {"name": "google-auto-tagging", "minConfidence": 80, "maxTags": 10,},
    ]"""
    assert parse_extensions(read_json(text))[0].max_tags == 10


@pytest.mark.parametrize("text", ['{"a": ",]"}', '["\\",}", ",}"]', '[",]",]'])
def test_commas_within_strings_stay(text: str) -> None:
    assert ",]" in str(read_json(text)) or ",}" in str(read_json(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{",
        "[1,,]",
        "nope",
        "[1] 2",
        "'x'",
        "{1: 2}",
        "NaN",
        "[Infinity]",
        "[-Infinity]",
        '{"a": 1, "a": 2}',
        '[{"a": 1, "a": 1,}]',
        b"\xff",
        b"\xff\xfe[\x00]\x00",
    ],
)
def test_what_is_not_strict_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidJson, match="should"):
        read_json(text)


def test_eight_levels_are_read_and_nine_are_not() -> None:
    assert read_json("[" * 8 + "]" * 8)
    with pytest.raises(InvalidJson, match="8 levels"):
        read_json("[" * 9 + "1" + "]" * 9)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 10_000 + "]" * 10_000, '{"a":' * 10_000])
def test_deep_nesting_is_refused_and_no_recursion_error(text: str) -> None:
    with pytest.raises(InvalidJson):
        read_json(text)


@pytest.mark.parametrize(
    "text",
    [
        '["' + '\\"' * 300_000,
        '"' * 600_001,
        "," * 1_000_000,
        "[" + " ," * 300_000,
        "[" + ", " * 300_000 + "x",
        "[1" + " " * 1_000_000 + "x",
        "[1," + " " * 1_000_000 + "x",
        '"' + "\\" * 1_000_001,
    ],
    ids=lambda text: f"{text[:4]}{len(text)}",
)
def test_hostile_text_of_the_largest_size_is_refused_in_linear_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(InvalidJson):
        read_json(text)
    assert time.process_time() - started < 5


@given(st.text() | st.binary())
@example("9" * 5000)
@example("[" + "9" * 5000 + ",]")
@example('"\\ud800"')
@example('{"\\udc00": 1,}')
def test_any_text_is_read_or_refused(text: str | bytes) -> None:
    try:
        value = read_json(text)
    except InvalidJson as refused:
        str(refused).encode()
        return
    json.dumps(value, ensure_ascii=False).encode()  # it can be stored and answered


@given(ANYTHING.filter(lambda value: "NaN" not in str(value)))
def test_what_json_writes_is_read_back(value: Any) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return
    try:
        assert read_json(text) == value
    except InvalidJson as refused:
        if not re.search("levels|surrogate", str(refused)):
            raise
