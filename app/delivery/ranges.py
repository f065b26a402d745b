"""Conditional and range requests, as RFC 9110 defines them for one representation."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"bytes=\s*(\d{0,18})-(\d{0,18})\s*")
MAX_HEADER_CHARACTERS = 8192


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes start to end (exclusive)."""

    start: int
    end: int


class RangeNotSatisfiable(Exception):
    pass


def requested_part(headers: Mapping[str, str], size_bytes: int, etag: str) -> Part | None:
    """The one part asked for; None for the whole: no range, several, or an outdated If-Range.

    Raises RangeNotSatisfiable when the part lies outside.
    """
    match = _ONE_RANGE.fullmatch(headers.get("range", "")[:MAX_HEADER_CHARACTERS])
    if match is None or headers.get("if-range", etag) != etag:
        return None
    first, last = match[1], match[2]
    if not first and not last:
        return None
    if not first:
        length = min(int(last), size_bytes)
        start, end = size_bytes - length, size_bytes
    else:
        start = int(first)
        end = min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= size_bytes or start >= end:
        raise RangeNotSatisfiable
    return Part(start, end)


def is_not_modified(headers: Mapping[str, str], etag: str) -> bool:
    """Whether the client's copy is still good, by If-None-Match."""
    value = headers.get("if-none-match", "")[:MAX_HEADER_CHARACTERS]
    known = {item.strip().removeprefix("W/") for item in value.split(",")}
    return "*" in known or etag in known
