"""Identifiers: 24 lowercase hex digits, as ImageKit's are, rising with time; UUIDs for requests."""

import itertools
import os
import re
import secrets
import time

_PROCESS = secrets.token_hex(5)
_COUNTER = itertools.count(secrets.randbelow(2**23))
_ID = re.compile(r"[0-9a-f]{24}")


def new_id() -> str:
    """Seconds (8 digits), process (10), counter (6): the shape of a BSON ObjectId."""
    return f"{int(time.time()):08x}{_PROCESS}{next(_COUNTER) % 2**24:06x}"


def new_request_id() -> str:
    """A random UUID, version 4: what `str(uuid4())` is, in less than half of its time."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def is_id(value: str) -> bool:
    return _ID.fullmatch(value) is not None


def _renew_process_part() -> None:
    global _PROCESS
    _PROCESS = secrets.token_hex(5)


os.register_at_fork(after_in_child=_renew_process_part)
