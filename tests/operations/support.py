"""What the tests of runs, deliveries and usage have in common."""

import json
import time
from collections.abc import Callable
from typing import Any

from tests import pictures
from tests.server import LoupeServer

GOOGLE = "google-auto-tagging"
AWS = "aws-auto-tagging"
PICTURE = pictures.jpeg()
UNKNOWN_ID = "0" * 24


def wanting(*names: str, min_confidence: float = 5, max_tags: int = 3) -> str:
    """The `extensions` field."""
    return json.dumps(
        [{"name": n, "minConfidence": min_confidence, "maxTags": max_tags} for n in names]
    )


def upload(server: LoupeServer, *names: str, **fields: str) -> dict[str, Any]:
    """The answer to an upload that asks for these extensions."""
    answer = server.upload(PICTURE, extensions=wanting(*(names or (GOOGLE,))), **fields)
    assert answer.status_code == 200, answer.text
    uploaded: dict[str, Any] = answer.json()
    return uploaded


def get(server: LoupeServer, path: str, **query: str | int) -> Any:
    answer = server.client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: LoupeServer, path: str, **query: str | int) -> tuple[int, str]:
    """Status and message of a GET that is refused."""
    answer = server.client.get(path, params=query)
    return answer.status_code, answer.json()["message"]


def until(condition: Callable[[], Any], *, timeout_seconds: float = 20) -> Any:
    """What `condition` returns, once it is true."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return value
