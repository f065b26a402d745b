"""What goes wrong, and the only code that writes error JSON: `{"message", "help", ...extras}`."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler

# Byte for byte as the API that Loupe is compatible with answers; clients print it.
HELP = "For support kindly contact us at support@imagekit.io ."

log = structlog.get_logger(__name__)


class JsonResponse(Response):
    """An object or array as JSON; the encoder writes aware datetimes nowhere: rows hold strings."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class ApiError(Exception):
    """A refusal that the caller may read.

    extras: more keys of the body (`errors`, `reason`, `missingFileIds`).
    """

    def __init__(
        self,
        status_code: int,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        **extras: Any,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.message = message
        self.headers = dict(headers or {})
        self.extras = extras


class BadRequest(ApiError):
    """400: the request cannot be right, whoever sends it again."""

    def __init__(self, message: str, **extras: Any) -> None:
        super().__init__(400, message, **extras)


def error_body(message: str, **extras: Any) -> dict[str, Any]:
    return {"message": message, "help": HELP, **extras}


def error_response(error: ApiError) -> Response:
    return JsonResponse(
        error_body(error.message, **error.extras), error.status_code, headers=error.headers
    )


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(OperationalError, _on_database_failure)
    app.add_exception_handler(Exception, _on_unknown)


def answering_errors(app: ASGIApp, handlers: Mapping[Any, ExceptionHandler]) -> ASGIApp:
    """An application that stands beside FastAPI's, with the same answers to the same errors."""
    expected = {kind: handler for kind, handler in handlers.items() if kind is not Exception}
    return ServerErrorMiddleware(ExceptionMiddleware(app, expected), handlers[Exception])


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(BadRequest(first_problem(error.errors())))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "The requested URL does not exist.", 405: "This method is not allowed here."}
    message = messages.get(error.status_code, HTTPStatus(error.status_code).phrase + ".")
    return error_response(ApiError(error.status_code, message, headers=error.headers))


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this answer."""
    log.info("client went away")
    return error_response(BadRequest("Your request ended before its body did."))


async def _on_database_failure(request: Request, error: Exception) -> Response:
    """The disk is full or the database is away: the same request may go through later."""
    log.error("the database failed", exc_info=error)
    return error_response(
        ApiError(
            503,
            "The database cannot be used at the moment. Please try again later.",
            headers={"retry-after": "5"},
        )
    )


async def _on_unknown(request: Request, error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return error_response(ApiError(500, "Something went wrong on our side. It has been logged."))


def first_problem(problems: Any) -> str:
    """One sentence for the first of pydantic's problems, naming the field as it was sent."""
    problem = problems[0]
    where = field_path(part for part in problem["loc"] if part not in ("body", "query", "path"))
    what = problem["msg"].removeprefix("Value error, ").rstrip(".")
    what = what[:1].lower() + what[1:]
    return f"Your request contains invalid value for {where or 'the body'}: {what}."


def field_path(parts: Any) -> str:
    """`("extensions", 1, "maxTags")` -> `extensions[1].maxTags`."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
