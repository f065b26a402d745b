"""The transformations a delivery URL can ask for. Today: two named thumbnails.

Source: the contract's sections 6.1 and 6.2.
"""

from typing import NamedTuple
from urllib.parse import parse_qsl

from app.errors import BadRequest

THUMBNAIL_BOX_PX = 300
NAMED_THUMBNAILS = frozenset({"n-ik_ml_thumbnail", "n-media_library_thumbnail"})


class UnsupportedTransformation(BadRequest):
    def __init__(self, what: str) -> None:
        known = ", ".join(sorted(NAMED_THUMBNAILS))
        super().__init__(
            f"Your request contains the transformation {what!a}, which this version of Loupe "
            f"does not support. It supports: {known}."
        )


class Target(NamedTuple):
    """What a delivery URL names. path: of the file, absolute. thumbnail: instead of the file."""

    path: str
    thumbnail: bool
    as_attachment: bool
    version_id: str | None


def parse_target(path: str, query: str) -> Target:
    """Reads the part after the endpoint. Raises UnsupportedTransformation.

    path: percent-decoded, with a slash at the start. query: raw.
    """
    names, asked = [], []
    for part in path.split("/"):
        if part.startswith("tr:"):
            asked.append(part[3:])
        elif part:
            names.append(part)
    pairs = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
    if pairs.get("tr"):
        asked.append(pairs["tr"])
    return Target(
        path="/" + "/".join(names),
        thumbnail=_is_thumbnail(asked),
        as_attachment=pairs.get("ik-attachment", "").lower() == "true",
        version_id=pairs.get("ik-obj-version"),
    )


def _is_thumbnail(asked: list[str]) -> bool:
    if not asked:
        return False
    if len(asked) > 1 or asked[0] not in NAMED_THUMBNAILS:
        raise UnsupportedTransformation(":".join(asked)[:200])
    return True
