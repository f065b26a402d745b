"""Which formats a client names in `Accept`. Source: RFC 9110, 12.4.2 and 12.5.1."""

import re
from collections.abc import Iterable

_REFUSED = re.compile(r"q\s*=\s*0(\.0{0,3})?", re.IGNORECASE)


def accepts(accept_headers: Iterable[str], mime: str) -> bool:
    """Whether the client asks for this type by its name; a wildcard promises nothing."""
    return any(
        _names(media_range, mime) for header in accept_headers for media_range in header.split(",")
    )


def _names(media_range: str, mime: str) -> bool:
    name, *parameters = (part.strip() for part in media_range.split(";"))
    return name.lower() == mime and not any(_REFUSED.fullmatch(each) for each in parameters)
