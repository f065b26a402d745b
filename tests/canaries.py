"""Planted secrets, and a watch that none of them shows, over the whole session.

Watched is what leaves a process: every log line as production writes it, the logs of server
processes, answers of 400 and more with their headers, and `/metrics`. A test during which a secret
shows fails.

Watched for are the secrets that the tests use, by value, and what only a secret looks like. An
`Idempotency-Key` is no secret: it opens nothing.
"""

import base64
import contextlib
import logging
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.keys import Keys
from app.logs import PROCESSORS, as_json, json_lines, quieten_libraries
from app.settings import DEVELOPMENT_PRIVATE_KEY

AWS_SECRET_KEY = "canary+AWS/secret0key1Jd8sKq2LmZx7Vb4"
POSTGRES_PASSWORD = "canary-postgres-password-5tRw9Q"
SHORTEST_SECRET = 12
LOG_NAMES = frozenset({"log", "server.log", "output"})

PATTERNS = {
    "basic credentials": re.compile(r"\b[Bb]asic [A-Za-z0-9+/_-]{16,}"),
    "a password in a URL": re.compile(r"://[^/\s\"'@:]*:(?!\*+@|…@|\\u2026@)[^/\s\"'@]+@"),
    "a JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\."),
    "an AWS signature": re.compile(r"\bSignature=[0-9a-f]{16,}"),
    "a URL's signature": re.compile(r"\bik-s=[0-9a-f]{16,}"),
    "a webhook's signature": re.compile(r"\bv1,[A-Za-z0-9+/]{43}="),
}

_secrets = {DEVELOPMENT_PRIVATE_KEY, AWS_SECRET_KEY, POSTGRES_PASSWORD}
_leaks: list[str] = []
_lines: list[str] | None = None


def planted(secret: str) -> str:
    """The same; from now on it must not show, nor as Basic credentials."""
    if len(secret) >= SHORTEST_SECRET:
        _secrets.add(secret)
        _secrets.add(base64.b64encode(f"{secret}:".encode()).decode().rstrip("="))
    return secret


def plant(keys: Keys) -> None:
    """A server's secrets, given or generated."""
    planted(keys.webhook_secret)
    for pair in keys.pairs:
        planted(pair.private)


def check(place: str, text: str) -> None:
    """Takes note of every secret in it."""
    found = [f"the secret {secret[:8]}…" for secret in _secrets if secret in text]
    found += [kind for kind, pattern in PATTERNS.items() if pattern.search(text)]
    _leaks.extend(f"{what} in {place}: {text[:2000]}" for what in found)


def check_logs_below(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.name in LOG_NAMES and path.is_file():
            check(str(path), path.read_text(errors="replace"))


def require_silence() -> None:
    leaks = _leaks[:]
    _leaks.clear()
    assert not leaks, "\n".join(["a secret showed:", *leaks])


@contextlib.contextmanager
def expected_leaks() -> Iterator[list[str]]:
    """For the tests of this very watch: what shows meanwhile is theirs."""
    require_silence()
    leaks: list[str] = []
    try:
        yield leaks
    finally:
        leaks += _leaks
        _leaks.clear()


@contextlib.contextmanager
def written_lines() -> Iterator[list[str]]:
    """The log's lines from here on, as production writes them."""
    global _lines
    lines: list[str] = []
    _lines = lines
    try:
        yield lines
    finally:
        _lines = None


def _see(line: str) -> None:
    if _lines is not None:
        _lines.append(line)
    check("a log line", line)


class _Watch(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _see(self.format(record))


_watch = _Watch()
_watch.setFormatter(json_lines())
_logger = logging.getLogger("app")


def watch_logs() -> None:
    """The libraries' lines, as loud as in production."""
    quieten_libraries()
    logging.getLogger().addHandler(_watch)


def watch_event(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
    """A processor that looks at one of our own lines on its way, rendered as in production."""
    line: Any = dict(event)
    for processor in PROCESSORS:
        line = processor(_logger, method, line)
    _see(as_json(_logger, method, line).decode())
    return event


class WatchedAnswers:
    """A server's refusals and metrics, whichever client asked."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place, is_watched = "", False

        async def send_watched(message: Message) -> None:
            nonlocal place, is_watched
            if message["type"] == "http.response.start":
                is_watched = message["status"] >= 400 or scope["path"] == "/metrics"
                place = f"the answer {message['status']} to {scope['method']} {scope['path']}"
                if is_watched:
                    headers = [b": ".join(header) for header in message["headers"]]
                    check(place, b"\n".join(headers).decode("latin-1"))
            elif is_watched:
                check(place, message.get("body", b"").decode(errors="replace"))
            await send(message)

        await self._app(scope, receive, send_watched)
