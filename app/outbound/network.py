"""The network of one request: a name is resolved, every answer checked, a checked one dialled."""

# ruff: noqa: ASYNC109 - `timeout` is a parameter of httpcore's interfaces, which are met here.

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import anyio
import httpcore

from app.outbound.addresses import AddressGuard, literal_address
from app.outbound.errors import BlockedAddress, OutboundError, OutboundReason

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Host and port to IP addresses, best first. Raises OSError (or UnicodeError) for no answer."""

CONNECT_TIMEOUT_SECONDS = 10.0
MAX_ADDRESSES_DIALLED = 8
DNS_THREADS = 16
# httpcore refuses a header block beyond 100 KiB, but would read interim (1xx) answers for ever.
MAX_BYTES_BEFORE_REPLY = 192 * 1024


class SystemResolver:
    """The machine's own resolver (getaddrinfo), in threads of its own.

    A name server that is silent holds a thread for many seconds, so the event loop's few default
    threads are left alone.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="dns")

    async def __call__(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._threads, self._resolve, host, port)
        return list(dict.fromkeys(answers))

    @staticmethod
    def _resolve(host: str, port: int) -> list[str]:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(address[0]) for *_, address in answers]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that gives up on a peer which sends and sends but never begins its reply."""

    def __init__(self, inner: httpcore.AsyncNetworkStream, network: "Network") -> None:
        self._inner = inner
        self._network = network

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        received = await self._inner.read(max_bytes, timeout)
        self._network.count_received(len(received))
        return received

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        secured = await self._inner.start_tls(ssl_context, server_hostname, timeout)
        return _Stream(secured, self._network)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class Network(httpcore.AsyncNetworkBackend):
    """What one request may do on the network: reach checked addresses, and close all it opened.

    The TLS name and the Host header stay the URL's: httpcore takes them from its own request.
    """

    def __init__(
        self, guard: AddressGuard, resolve: Resolver, dialler: httpcore.AsyncNetworkBackend
    ) -> None:
        self._guard = guard
        self._resolve = resolve
        self._dialler = dialler
        self._opened: list[httpcore.AsyncNetworkStream] = []
        self._bytes_left_before_reply: int | None = MAX_BYTES_BEFORE_REPLY

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises OutboundError. The parameters after `port` are never set by us."""
        until = asyncio.get_running_loop().time() + CONNECT_TIMEOUT_SECONDS
        try:
            async with asyncio.timeout_at(until):
                addresses = await self._checked_addresses(host, port)
                stream = await self._dial_first(addresses[:MAX_ADDRESSES_DIALLED], port, until)
        except TimeoutError as error:
            raise OutboundError(OutboundReason.TIMEOUT) from error
        self._opened.append(stream)
        return _Stream(stream, self)

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise BlockedAddress

    async def _checked_addresses(self, host: str, port: int) -> list[str]:
        literal = literal_address(host)
        if literal is not None:
            addresses = [literal]
        else:
            try:
                addresses = await self._resolve(host, port)
            except TimeoutError:
                raise
            except (OSError, UnicodeError) as error:
                raise OutboundError(OutboundReason.DNS_FAILURE) from error
        if not addresses:
            raise OutboundError(OutboundReason.DNS_FAILURE)
        if not all(self._guard.is_allowed(address) for address in addresses):
            raise BlockedAddress
        return addresses

    async def _dial_first(
        self, addresses: Sequence[str], port: int, until: float
    ) -> httpcore.AsyncNetworkStream:
        """Each address gets its share of the time left, so that a silent one hides no other."""
        failure: Exception | None = None
        now = asyncio.get_running_loop().time
        for tried, address in enumerate(addresses):
            share_seconds = max(0.0, until - now()) / (len(addresses) - tried)
            try:
                return await self._dialler.connect_tcp(address, port, timeout=share_seconds)
            except (OSError, httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        if isinstance(failure, httpcore.ConnectTimeout):
            raise TimeoutError from failure
        raise OutboundError(OutboundReason.CONNECT_FAILURE) from failure

    def count_received(self, size_bytes: int) -> None:
        if self._bytes_left_before_reply is None:
            return
        self._bytes_left_before_reply -= size_bytes
        if self._bytes_left_before_reply < 0:
            raise httpcore.RemoteProtocolError("no reply within the first bytes")

    def reply_has_begun(self) -> None:
        self._bytes_left_before_reply = None

    async def aclose(self) -> None:
        """Closes the sockets themselves: httpcore leaves one open if TLS setup is cancelled."""
        for stream in self._opened:
            await stream.aclose()


# httpcore passes some of anyio's errors on as they are (EndOfStream from a write over TLS).
_BROKEN_CONNECTION = (
    httpcore.NetworkError,
    OSError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)


@contextmanager
def outbound_errors() -> Iterator[None]:
    """Turns what the layers below raise into OutboundError."""
    try:
        yield
    except (TimeoutError, httpcore.TimeoutException) as error:
        raise OutboundError(OutboundReason.TIMEOUT) from error
    except (ssl.SSLError, httpcore.ConnectError) as error:
        # Connecting itself raises our own errors (`Network.connect_tcp`); what is left is TLS.
        raise OutboundError(OutboundReason.TLS_FAILURE) from error
    except (*_BROKEN_CONNECTION, httpcore.ProtocolError) as error:
        raise OutboundError(OutboundReason.PROTOCOL_ERROR) from error
