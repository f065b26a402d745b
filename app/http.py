"""What every request passes through: its id, its log line, and how a refused body is dropped."""

import asyncio
import time
from collections.abc import Callable, Mapping

import structlog
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.errors import ApiError, error_response
from app.ids import new_request_id
from app.logs import bind_request_id, unbind_request_id

log = structlog.get_logger(__name__)

REQUEST_ID_HEADER = "x-ik-requestid"
DROP_SECONDS = 10.0
DROP_IDLE_SECONDS = 1.0
DROP_PAUSE_SECONDS = 0.25
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 200

_RAW_REQUEST_ID_HEADER = REQUEST_ID_HEADER.encode()


class RequestLog:
    """Gives each request an id, in a header of its response and in every log line of it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        status = 0
        started = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((_RAW_REQUEST_ID_HEADER, request_id.encode()))
            await send(message)

        token = bind_request_id(request_id)
        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            if not status:
                raise  # else it has been logged and answered: Starlette raises it once more
        except asyncio.CancelledError:
            # Nobody but a server that has to end gives up a request.
            if not status:
                await error_response(_shutting_down())(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            method, path = scope["method"], scope["path"]
            metrics.count_request(metrics.kind_of(path), method, status, seconds)
            log.info(
                "request",
                method=method,
                path=path,  # never the query: it may hold a signature
                status=status,
                elapsed_ms=round(seconds * 1000, 1),
            )
            unbind_request_id(token)


def _shutting_down() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down. Please try again.",
        headers={"connection": "close", "retry-after": "1"},
    )


class HeaderLimit:
    """Refuses a header that no client of ours needs, and HTTP/0.9, which has none: the server below
    has no limit of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["http_version"] == "0.9":
            await _refusal(400, "Your request is not HTTP/1.1.")(scope, receive, send)
        elif scope["type"] == "http" and _is_too_large(scope["headers"]):
            await _refusal(431, "Your request's header is too large.")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _refusal(status_code: int, message: str) -> Response:
    return error_response(ApiError(status_code, message, headers={"connection": "close"}))


def _is_too_large(headers: list[tuple[bytes, bytes]]) -> bool:
    if len(headers) > MAX_HEADERS:
        return True
    size = 0
    for name, value in headers:
        size += len(name) + len(value)
    return size > MAX_HEADER_BYTES


class RefusedBodies:
    """After an early refusal, reads and drops what still comes: for 10 seconds at most, and until a
    second has brought nothing.

    A connection that is closed on unread bytes is reset, and the client may never see the answer.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope["headers"]):
            await self._app(scope, receive, send)
            return
        is_body_read = False
        is_refusal = False

        async def watched_receive() -> Message:
            nonlocal is_body_read
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                is_body_read = True
            return message

        async def send_then_drop(message: Message) -> None:
            nonlocal is_refusal
            if message["type"] == "http.response.start":
                is_refusal = message["status"] >= 400 and not is_body_read
                if is_refusal:
                    MutableHeaders(scope=message)["connection"] = "close"
            elif is_refusal and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await self._drop(watched_receive, lambda: is_body_read)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self._app(scope, watched_receive, send_then_drop)

    @staticmethod
    async def _drop(receive: Receive, is_over: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(DROP_SECONDS):
                pause_seconds = DROP_PAUSE_SECONDS
                while not is_over():
                    async with asyncio.timeout(DROP_IDLE_SECONDS):
                        await receive()
                    if not is_over():
                        # In a burst, those who still wait for their refusal come first.
                        await asyncio.sleep(pause_seconds)
                        pause_seconds = 0
        except TimeoutError:
            pass


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and value != b"0"):
            return True
    return False


class Fork:
    """Sends a request to the application of the prefix that its path, as it was sent, starts with.

    applications: the first that fits is taken.
    """

    def __init__(self, applications: Mapping[str, ASGIApp], otherwise: ASGIApp) -> None:
        self._branches = [(prefix.encode(), app) for prefix, app in applications.items()]
        self._otherwise = otherwise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._otherwise
        if scope["type"] == "http":
            raw_path: bytes = scope["raw_path"]
            for prefix, branch in self._branches:
                if raw_path.startswith(prefix):
                    app = branch
                    break
        await app(scope, receive, send)


class ApiRoutes:
    """A FastAPI application's own routes, without the middlewares that it puts around each.

    One SDK asks for `/v1/files/`, with a slash at the end; a redirect would lose its body.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._route = Router(app.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._route(
            {**scope, "app": self._app, "path": scope["path"].rstrip("/")}, receive, send
        )


def allowing_any_origin(app: ASGIApp) -> ASGIApp:
    """Browsers may upload from any page; the signature, not the origin, is what lets them."""
    return CORSMiddleware(
        app,
        allow_origins=["*"],
        allow_methods=["POST", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID_HEADER],
    )
