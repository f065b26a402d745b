"""Which URLs are accepted, and the one way in which a URL is read."""

import re

import httpx

from app.outbound.addresses import AddressGuard, literal_address

MAX_URL_LENGTH = 2048

_AUTHORITY = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOSTNAME = re.compile(rf"(?=.{{1,254}}\Z)(?:{_LABEL}\.)*{_LABEL}\.?")
# A name that ends in a number is an IPv4 address or nothing (WHATWG URL, "ends in a number").
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")


class InvalidUrl(ValueError):
    """A URL that is not accepted. The text is one sentence for the user, without the URL."""


def check_url(url: str, *, guard: AddressGuard) -> str:
    """The URL, normalised (host in IDNA form, no fragment), if it may be asked for at all.

    For when a URL is handed in. Names are not resolved: they are judged when they are dialled.
    Raises InvalidUrl.
    """
    parsed = parse_url(url)
    address = literal_address(parsed.raw_host.decode("ascii"))
    if address is not None and not guard.is_allowed(address):
        raise InvalidUrl("The URL's host must not be a private or reserved IP address.")
    return str(parsed)


def parse_url(url: str) -> httpx.URL:
    """One reading of a URL for the check and for the connection. Raises InvalidUrl."""
    authority = _require_plain(url)
    if "@" in authority:
        raise InvalidUrl("The URL must not hold a user name or a password.")
    try:
        parsed = httpx.URL(url).copy_with(fragment=None)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidUrl("The URL is not valid.") from error
    _require_host(parsed.raw_host.decode("ascii"))
    _require_port(authority)
    if len(str(parsed)) > MAX_URL_LENGTH:
        raise InvalidUrl(f"The URL must not be longer than {MAX_URL_LENGTH} characters.")
    return parsed


def _require_plain(url: str) -> str:
    """Refuses text that two parsers could read in two ways. Returns the URL's authority part."""
    if len(url) > MAX_URL_LENGTH:
        raise InvalidUrl(f"The URL must not be longer than {MAX_URL_LENGTH} characters.")
    if any(not is_plain(character) for character in url):
        raise InvalidUrl("The URL must not hold spaces, control characters or backslashes.")
    match = _AUTHORITY.match(url)
    if match is None:
        raise InvalidUrl("The URL must be absolute and start with http:// or https://.")
    return match[1]


def is_plain(character: str) -> bool:
    is_surrogate = "\ud800" <= character <= "\udfff"
    is_control = character < " " or "\x7f" <= character <= "\x9f"
    return not (is_surrogate or is_control or character.isspace() or character == "\\")


def _require_host(host: str) -> None:
    if ":" in host:
        # In brackets, and read by httpx as an IPv6 address, perhaps with a zone of this machine.
        valid = "%" not in host
    else:
        valid = bool(_HOSTNAME.fullmatch(host)) and (
            not _ENDS_IN_NUMBER.fullmatch(host) or literal_address(host) is not None
        )
    if not valid:
        raise InvalidUrl("The URL's host is missing or not valid.")


def _require_port(authority: str) -> None:
    match = _PORT.fullmatch(authority)
    if match is None:
        raise InvalidUrl("The URL's port is not valid.")
    port = int(match[1] or 443)
    if port not in (80, 443) and not 1024 <= port <= 65535:
        raise InvalidUrl("The URL's port must be 80, 443, or from 1024 to 65535.")
