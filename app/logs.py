"""Structured logs, one JSON object a line, with the request's id in every line of a request."""

import contextlib
import contextvars
import json
import logging
import sys
from typing import Any

import orjson
import structlog

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")


def request_id() -> str:
    """The id of the request being served; empty outside of one."""
    return _request_id.get()


def bind_request_id(value: str) -> "contextvars.Token[str]":
    return _request_id.set(value)


def unbind_request_id(token: "contextvars.Token[str]") -> None:
    _request_id.reset(token)


def _add_request_id(logger: Any, method: str, event: dict[str, Any]) -> dict[str, Any]:
    if (value := _request_id.get()) and "request_id" not in event:
        event["request_id"] = value
    return event


# What every line gets, ours and the libraries'. Tracebacks never show local variables.
PROCESSORS: list[Any] = [
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    _add_request_id,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]


def configure_logs() -> None:
    """Ours and the libraries' lines, alike, to standard error.

    Ours go there directly: the standard library's way costs several times as much a line.
    """
    structlog.configure(
        processors=[*PROCESSORS, as_json],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(json_lines())
    root = logging.getLogger()
    root.handlers = [handler]
    quieten_libraries()


def json_lines() -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=PROCESSORS,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            lambda logger, method, event: as_json(logger, method, event).decode(),
        ],
    )


def quieten_libraries() -> None:
    logging.getLogger().setLevel(logging.INFO)
    for noisy in ("httpx", "httpcore", "botocore", "boto3", "urllib3", "google", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def as_json(logger: Any, method: str, event: Any) -> bytes:
    """One line of ASCII, which no terminal and no reader of lines takes for anything else.

    Almost every line is ASCII as orjson writes it. What is not, or holds what orjson does not know,
    takes longer.
    """
    with contextlib.suppress(TypeError):
        line = orjson.dumps(event)
        if line.isascii():
            return line
    return json.dumps(event, default=repr).encode()
