"""From a vendor's labels to the tags that a run leaves on a file."""

import math
import unicodedata
from collections.abc import Iterable
from typing import TypedDict

from app.extensions.provider import Label

MAX_NAME_CHARACTERS = 256
_UNWANTED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class AITag(TypedDict):
    """confidence: percent, 0-100, two decimals. source: the extension's name."""

    name: str
    confidence: float
    source: str


def select_tags(
    labels: Iterable[Label], *, source: str, min_confidence: float, max_tags: int
) -> list[AITag]:
    """The best `max_tags` labels of at least `min_confidence`, one for each name.

    Rounded to two decimals first. Labels are a vendor's text: cleaned, cut and clamped here.
    """
    best: dict[str, float] = {}
    for label in labels:
        name = _clean_name(label.name)
        if not name or not math.isfinite(label.confidence):
            continue
        confidence = round(min(100.0, max(0.0, label.confidence)), 2)
        if confidence >= min_confidence:
            best[name] = max(confidence, best.get(name, 0.0))
    ordered = sorted(best.items(), key=lambda item: (-item[1], item[0]))
    return [AITag(name=n, confidence=c, source=source) for n, c in ordered[:max_tags]]


def _clean_name(name: str) -> str:
    """Without control, formatting, unassigned and line-breaking characters, at most 256 in all."""
    kept = (
        c
        for c in name[: 4 * MAX_NAME_CHARACTERS]
        if unicodedata.category(c) not in _UNWANTED_CATEGORIES
    )
    return "".join(kept)[:MAX_NAME_CHARACTERS].strip()


def replace_source(
    existing: list[AITag] | None, source: str, tags: list[AITag]
) -> list[AITag] | None:
    """`existing` with the tags of one source replaced; None when none are left."""
    others = [tag for tag in existing or [] if tag["source"] != source]
    return in_order(others + tags)


def remove_names(existing: list[AITag] | None, names: Iterable[str]) -> list[AITag] | None:
    """Without the tags of these names, from whichever source."""
    unwanted = set(names)
    return in_order([tag for tag in existing or [] if tag["name"] not in unwanted])


def in_order(tags: list[AITag]) -> list[AITag] | None:
    """By source, then confidence falling, then name: the order of every response."""
    return sorted(tags, key=lambda t: (t["source"], -t["confidence"], t["name"])) or None
