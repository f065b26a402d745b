"""Whether a delivery URL carries a valid signature. Source: the contract's section 6.5."""

import hashlib
import hmac
from collections.abc import Iterable
from datetime import datetime
from urllib.parse import unquote

NO_EXPIRY = "9999999999"


def has_valid_signature(raw_target: str, private_keys: Iterable[str], now: datetime) -> bool:
    """Checks `ik-s` and `ik-t`.

    raw_target: the request target after the endpoint and its slash, exactly as it was sent.
    """
    path, _, query = raw_target.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    signatures = [value for name, _, value in pairs if name == "ik-s"]
    expiries = [value for name, _, value in pairs if name == "ik-t"]
    if len(signatures) != 1 or len(expiries) > 1:
        return False
    expiry = expiries[0] if expiries else NO_EXPIRY
    if not (expiry.isascii() and expiry.isdigit() and len(expiry) <= 12):
        return False
    if expiries and int(expiry) <= now.timestamp():
        return False
    rest = "&".join(n + e + v for n, e, v in pairs if n not in ("ik-s", "ik-t"))
    suffix = f"?{rest}" if rest else ""
    candidates = [path + suffix, unquote(path) + suffix]
    matches = [
        hmac.compare_digest(sign(key, candidate + expiry).encode(), signatures[0].encode())
        for key in private_keys
        for candidate in candidates
    ]
    return any(matches)


def sign(private_key: str, text: str) -> str:
    return hmac.new(private_key.encode(), text.encode(), hashlib.sha1).hexdigest()
