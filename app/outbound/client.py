"""Requests: webhooks posted, files fetched, each within a deadline for all of it."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpcore
import httpx

from app.outbound.addresses import AddressGuard
from app.outbound.errors import OutboundError, OutboundReason, TooLarge
from app.outbound.network import Network, Resolver, SystemResolver, outbound_errors
from app.outbound.urls import InvalidUrl, is_plain, parse_url

MAX_REDIRECTS = 3
USER_AGENT = "Loupe"
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
REPLY_BODY_SECONDS = 2.0
"""How long a webhook's reply may go on after its status, which alone decides."""
CHUNKS_BETWEEN_PAUSES = 64


@dataclass(frozen=True, slots=True)
class WebhookReply:
    """A receiver's answer. body: its first bytes as sent, undecoded; perhaps not all of it."""

    status_code: int
    body: bytes
    retry_after: str | None


class Outbound:
    """Sends requests to hosts that pass the guard, each within a deadline for all of it.

    resolver, dialler, ssl_context: the machine's own unless given. SSL_CERT_FILE and SSL_CERT_DIR
    name further certificate authorities.
    """

    def __init__(
        self,
        guard: AddressGuard,
        *,
        resolver: Resolver | None = None,
        dialler: httpcore.AsyncNetworkBackend | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._guard = guard
        self._system_resolver = SystemResolver()
        self._resolve = resolver or self._system_resolver
        self._dialler = dialler or httpcore.AnyIOBackend()
        self._ssl_context = ssl_context or httpx.create_ssl_context()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the resolver's threads. Connections end with their requests."""
        self._system_resolver.close()

    async def post_webhook(
        self,
        url: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        timeout_seconds: float = 30.0,
        max_reply_bytes: int = 16 * 1024,
    ) -> WebhookReply:
        """Sends `body` once and follows no redirect. Any status is a reply, not an error.

        timeout_seconds: for all of it, until the status is here. The reply's body is then read up
        to `max_reply_bytes` and for REPLY_BODY_SECONDS at most; how it ends does not matter.
        Raises OutboundError.
        """
        target = _parse_target(url)
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        async with self._exchange("POST", target, headers, body, deadline) as response:
            return WebhookReply(
                status_code=response.status,
                body=await _read_beginning(response, max_reply_bytes, deadline),
                retry_after=_header(response, b"retry-after"),
            )

    @asynccontextmanager
    async def fetch(
        self,
        url: str,
        *,
        max_bytes: int,
        header_timeout_seconds: float = 8.0,
        total_timeout_seconds: float = 60.0,
        max_redirects: int = MAX_REDIRECTS,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes behind a URL, in chunks: `async with fetch(...) as chunks: async for ...`.

        header_timeout_seconds: until the final response begins, redirects included.
        total_timeout_seconds: until its last byte, the time that the caller takes included.
        Raises OutboundError on entering and while reading; TooLarge beyond `max_bytes`. A body
        that ends before its declared length is an error.
        """
        target = _parse_target(url)
        start = asyncio.get_running_loop().time()
        header_deadline = start + min(header_timeout_seconds, total_timeout_seconds)
        for _ in range(max_redirects + 1):
            async with self._exchange("GET", target, {}, b"", header_deadline) as response:
                location = _redirect_location(response)
                if location is None:
                    _require_file(response, max_bytes)
                    chunks = _read_capped(response, max_bytes, start + total_timeout_seconds)
                    async with aclosing(chunks):
                        yield chunks
                    return
                target = _redirect_target(target, location)
        raise OutboundError(OutboundReason.REDIRECT_REFUSED)

    @asynccontextmanager
    async def _exchange(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes, deadline: float
    ) -> AsyncIterator[httpcore.Response]:
        """The response once its header is here, its body unread. Closes the connection after."""
        network = Network(self._guard, self._resolve, self._dialler)
        request = _build_request(method, url, headers, body)
        connection = httpcore.AsyncHTTPConnection(
            request.url.origin, ssl_context=self._ssl_context, network_backend=network
        )
        try:
            with outbound_errors():
                async with asyncio.timeout_at(deadline):
                    response = await connection.handle_async_request(request)
            network.reply_has_begun()
            yield response
        finally:
            await network.aclose()


def _parse_target(url: str) -> httpx.URL:
    try:
        return parse_url(url)
    except InvalidUrl as error:
        raise OutboundError(OutboundReason.INVALID_URL, str(error)) from error


def _build_request(
    method: str, url: httpx.URL, headers: Mapping[str, str], body: bytes
) -> httpcore.Request:
    sent = httpx.Headers(
        {
            "host": url.netloc.decode("ascii"),
            "user-agent": USER_AGENT,
            "accept": "*/*",
            "accept-encoding": "identity",
            "connection": "close",
        }
    )
    sent.update(headers)
    if method != "GET":
        sent["content-length"] = str(len(body))
    target = httpcore.URL(
        scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
    )
    return httpcore.Request(method, target, headers=sent.raw, content=body)


def _header(response: httpcore.Response, name: bytes) -> str | None:
    for key, value in response.headers:
        if key.lower() == name:
            return value.decode("utf-8", "replace")
    return None


def _redirect_location(response: httpcore.Response) -> str | None:
    if response.status not in REDIRECT_STATUSES:
        return None
    return _header(response, b"location")


def _redirect_target(current: httpx.URL, location: str) -> httpx.URL:
    try:
        # Checked before joining, which would take a backslash or a space for something else.
        if not all(is_plain(character) for character in location):
            raise InvalidUrl
        return parse_url(str(current.join(location)))
    except (httpx.InvalidURL, ValueError) as error:
        raise OutboundError(OutboundReason.REDIRECT_REFUSED) from error


def _require_file(response: httpcore.Response, max_bytes: int) -> None:
    """Refuses what is not a whole file as it is stored over there."""
    if not 200 <= response.status < 300 or response.status == 206:
        raise OutboundError(OutboundReason.HTTP_STATUS)
    if (_header(response, b"content-encoding") or "identity").strip().lower() != "identity":
        raise OutboundError(OutboundReason.PROTOCOL_ERROR)
    declared = _header(response, b"content-length")
    if declared is not None and declared.isdecimal() and int(declared) > max_bytes:
        raise TooLarge


async def _read_body(response: httpcore.Response, deadline: float) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    body = aiter(response.aiter_stream())
    count = 0
    while loop.time() < deadline:
        with outbound_errors():
            async with asyncio.timeout_at(deadline):
                chunk = await anext(body, None)
        if chunk is None:
            return
        count += 1
        if count % CHUNKS_BETWEEN_PAUSES == 0:
            # One read can hold thousands of tiny chunks: let others run between them.
            await asyncio.sleep(0)
        yield chunk
    raise OutboundError(OutboundReason.TIMEOUT)


async def _read_capped(
    response: httpcore.Response, max_bytes: int, deadline: float
) -> AsyncGenerator[bytes, None]:
    size_bytes = 0
    async for chunk in _read_body(response, deadline):
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise TooLarge
        yield chunk


async def _read_beginning(response: httpcore.Response, max_bytes: int, deadline: float) -> bytes:
    until = min(deadline, asyncio.get_running_loop().time() + REPLY_BODY_SECONDS)
    beginning = bytearray()
    try:
        async for chunk in _read_body(response, until):
            beginning += chunk
            if len(beginning) >= max_bytes:
                break
    except OutboundError:
        # The receiver has said its status; that its text is broken or slow changes nothing.
        pass
    return bytes(beginning[:max_bytes])
