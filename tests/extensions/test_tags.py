import json
import math

from hypothesis import example, given
from hypothesis import strategies as st

from app.extensions.provider import Label
from app.extensions.tags import AITag, in_order, remove_names, replace_source, select_tags


def selected(
    *labels: tuple[str, float], min_confidence: float = 0, max_tags: int = 30
) -> list[tuple[str, float]]:
    tags = select_tags(
        [Label(*label) for label in labels],
        source="s",
        min_confidence=min_confidence,
        max_tags=max_tags,
    )
    assert all(tag["source"] == "s" for tag in tags)
    return [(tag["name"], tag["confidence"]) for tag in tags]


def tag(name: str, confidence: float, source: str) -> AITag:
    return AITag(name=name, confidence=confidence, source=source)


# Selecting


def test_best_come_first_and_names_decide_between_equals() -> None:
    assert selected(("b", 50), ("c", 90), ("a", 50)) == [("c", 90), ("a", 50), ("b", 50)]


def test_at_most_max_tags_are_kept_and_none_for_zero() -> None:
    labels = [("a", 1.0), ("b", 3.0), ("c", 2.0)]
    assert selected(*labels, max_tags=2) == [("b", 3), ("c", 2)]
    assert selected(*labels, max_tags=0) == []


def test_confidence_is_rounded_to_two_decimals_before_it_is_compared() -> None:
    assert selected(("a", 79.996), min_confidence=80) == [("a", 80)]
    assert selected(("a", 79.994), min_confidence=80) == []
    assert selected(("a", 80.004), min_confidence=80) == [("a", 80)]


def test_a_name_that_comes_twice_is_kept_once_with_its_best_confidence() -> None:
    assert selected(("a", 10), ("a", 30), ("a", 20)) == [("a", 30)]
    assert selected(("a", 10), ("b", 20), (" a\n", 30), max_tags=2) == [("a", 30), ("b", 20)]


def test_confidence_is_clamped_and_no_number_is_dropped() -> None:
    labels = [("low", -5.0), ("high", 1e300), ("nan", math.nan), ("inf", math.inf)]
    assert selected(*labels) == [("high", 100), ("low", 0)]


def test_names_lose_control_formatting_and_unassigned_characters() -> None:
    assert selected(("C\x00a\x1b[1mt\n", 1)) == [("Ca[1mt", 1)]
    assert selected(("\u202ecat\u200b\ud800\ue000\uffff", 1)) == [("cat", 1)]
    assert selected(("", 1), ("\n\u202e ", 1)) == []


def test_names_are_cut_to_256_characters() -> None:
    assert selected(("x" * 1_000_000, 1)) == [("x" * 256, 1)]


HOSTILE = st.builds(Label, st.text(max_size=300), st.floats(width=64))


@given(
    st.lists(HOSTILE, max_size=50),
    st.floats(0, 100),
    st.integers(0, 30),
)
@example([Label("\ud800", 50.0)], 0.0, 1)
@example([Label("a" * 255 + " " + "b", 50.0)], 0.0, 1)
def test_whatever_labels_come_the_tags_keep_to_the_limits(
    labels: list[Label], min_confidence: float, max_tags: int
) -> None:
    tags = select_tags(labels, source="s", min_confidence=min_confidence, max_tags=max_tags)
    names = [each["name"] for each in tags]
    assert len(tags) <= max_tags
    assert len(set(names)) == len(names)
    assert in_order(tags) == (tags or None)
    for each in tags:
        assert 0 < len(each["name"]) <= 256
        assert each["name"].strip()
        assert min_confidence <= each["confidence"] <= 100
        assert each["confidence"] == round(each["confidence"], 2)
    json.dumps(tags, ensure_ascii=False, allow_nan=False).encode()


@given(st.lists(HOSTILE, max_size=50), st.integers(0, 30))
def test_the_order_of_the_labels_does_not_matter(labels: list[Label], max_tags: int) -> None:
    limits = {"source": "s", "min_confidence": 0.0, "max_tags": max_tags}
    forwards = select_tags(labels, source="s", min_confidence=0, max_tags=max_tags)
    backwards = select_tags(labels[::-1], source="s", min_confidence=0, max_tags=max_tags)
    assert forwards == backwards, limits


# Merging


CAT_AWS, CAT_GOOGLE = tag("Cat", 90, "aws"), tag("Cat", 80, "google")


def test_tags_of_one_source_replace_its_own_and_leave_the_others() -> None:
    dog = tag("Dog", 99, "google")
    assert replace_source([CAT_AWS, CAT_GOOGLE], "google", [dog]) == [CAT_AWS, dog]
    assert replace_source(None, "google", [dog]) == [dog]


def test_no_tags_left_is_null() -> None:
    assert replace_source([CAT_AWS], "aws", []) is None
    assert replace_source(None, "aws", []) is None
    assert in_order([]) is None


def test_names_are_removed_from_every_source_and_by_exact_case() -> None:
    dog = tag("Dog", 1, "aws")
    assert remove_names([CAT_AWS, dog, CAT_GOOGLE], ["Cat"]) == [dog]
    assert remove_names([CAT_AWS], ["cat"]) == [CAT_AWS]
    assert remove_names([CAT_AWS], ["Cat"]) is None
    assert remove_names(None, ["Cat"]) is None


def test_order_is_source_then_confidence_falling_then_name() -> None:
    ordered = [tag("b", 9, "a"), tag("a", 1, "a"), tag("c", 1, "a"), tag("a", 99, "b")]
    assert in_order(ordered[::-1]) == ordered
