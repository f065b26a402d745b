"""Identifiers: 24 lowercase hex digits, as ImageKit's are, rising with time."""

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


def is_id(value: str) -> bool:
    return _ID.fullmatch(value) is not None


def _renew_process_part() -> None:
    global _PROCESS
    _PROCESS = secrets.token_hex(5)


os.register_at_fork(after_in_child=_renew_process_part)
