"""The only maker of HTTP connections to addresses that callers name: webhooks, uploads by URL.

Whoever may name a URL must not reach through us what only this machine can reach. So an address
is judged where a connection is made: the name is resolved there, every answer must be allowed,
and a checked answer is dialled. Redirects and re-bound names meet the same check.

Our own table of ranges, since no kept library fits: microsoft-antissrf has a good table but works
inside `requests` only, and httpx-secure opens a TCP connection before it checks the address.

Built on httpcore, the transport under httpx, since it takes a network backend and has no more
than is wanted: no cookies shared between receivers, no proxies from the environment, no decoding
of bodies, no log line with the URL. Each request has a connection of its own.
"""

# ruff: noqa: ASYNC109 - `timeout` is a parameter of httpcore's interfaces, which are met here.

import asyncio
import enum
import ipaddress
import re
import socket
import ssl
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from types import TracebackType
from typing import Any, Self

import anyio
import httpcore
import httpx

Network = IPv4Network | IPv6Network
Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Host and port to IP addresses, best first. Raises OSError (or UnicodeError) for no answer."""

MAX_URL_LENGTH = 2048
MAX_REDIRECTS = 3
USER_AGENT = "Loupe"
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
CONNECT_TIMEOUT_SECONDS = 10.0
REPLY_BODY_SECONDS = 2.0
"""How long a webhook's reply may go on after its status, which alone decides."""
MAX_ADDRESSES_DIALLED = 8
DNS_THREADS = 16
# httpcore refuses a header block beyond 100 KiB, but would read interim (1xx) answers for ever.
MAX_BYTES_BEFORE_REPLY = 192 * 1024
CHUNKS_BETWEEN_PAUSES = 64


# --- which addresses may be dialled -----------------------------------------------------------

# IANA's special-purpose IPv4 registry, multicast, and Azure's host address. `ipaddress.is_global`
# misses several of these, and which ones depends on Python's version.
NEVER_DIALLED_V4 = tuple(
    IPv4Network(cidr)
    for cidr in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# All IPv6 outside the one block of global unicast is refused: ::/96, 100::/64, 5f00::/16,
# fc00::/7, fe80::/10, fec0::/10, ff00::/8 and what nobody was given yet.
GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")
NEVER_DIALLED_V6 = tuple(
    IPv6Network(cidr)
    for cidr in (
        "2001::/23",
        "2001:db8::/32",
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
SIX_TO_FOUR = IPv6Network("2002::/16")
# Of the local-use NAT64 block 64:ff9b:1::/48 only the part is read where the IPv4 address can but
# stand in the last 32 bits. Elsewhere it stands where each operator chose: refused.
NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/96"))


class AddressGuard:
    """Says which IP addresses may be dialled.

    allowed: ranges that may be although they are private. An IPv4 range covers its mapped form
    (`::ffff:a.b.c.d`), the same host by the same route, but not its NAT64 and 6to4 forms, which
    leave through a gateway.
    """

    def __init__(self, allowed: Sequence[Network] = ()) -> None:
        self._allowed = tuple(allowed)

    def is_allowed(self, address: str) -> bool:
        """address: an IP address as a resolver gives it. A zone id or no address: False."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return False
        if isinstance(ip, IPv4Address):
            return self._is_listed(ip) or _is_public_v4(ip)
        if ip.scope_id is not None:
            return False
        if self._is_listed(ip):
            return True
        if ip.ipv4_mapped is not None:
            return self._is_listed(ip.ipv4_mapped) or _is_public_v4(ip.ipv4_mapped)
        return _is_public_v6(ip)

    def _is_listed(self, ip: IPv4Address | IPv6Address) -> bool:
        return any(ip in network for network in self._allowed)


def _is_public_v4(ip: IPv4Address) -> bool:
    return not any(ip in network for network in NEVER_DIALLED_V4)


def _is_public_v6(ip: IPv6Address) -> bool:
    if any(ip in network for network in NAT64):
        return _is_public_v4(IPv4Address(ip.packed[12:]))
    if ip in SIX_TO_FOUR:
        return _is_public_v4(IPv4Address(ip.packed[2:6]))
    return ip in GLOBAL_UNICAST_V6 and not any(ip in network for network in NEVER_DIALLED_V6)


# --- URLs -------------------------------------------------------------------------------------

_AUTHORITY = re.compile(r"https?://([^/?#]*)", re.IGNORECASE)
_PORT = re.compile(r"(?:\[[^\]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOSTNAME = re.compile(rf"(?=.{{1,254}}\Z)(?:{_LABEL}\.)*{_LABEL}\.?")
# A name that ends in a number is an IPv4 address or nothing (WHATWG URL, "ends in a number").
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")


class InvalidUrl(ValueError):
    """A URL that is not accepted. The text is one sentence for the user, without the URL."""


def check_url(url: str, *, guard: AddressGuard) -> str:
    """The URL, normalised (host in IDNA form, no fragment), if it may be asked for at all.

    For when a URL is handed in. Names are not resolved: they are judged when they are dialled.
    Raises InvalidUrl.
    """
    parsed = _parse_url(url)
    address = _literal_address(parsed.raw_host.decode("ascii"))
    if address is not None and not guard.is_allowed(address):
        raise InvalidUrl("The URL's host must not be a private or reserved IP address.")
    return str(parsed)


def _parse_url(url: str) -> httpx.URL:
    """One reading of a URL for the check and for the connection. Raises InvalidUrl."""
    authority = _require_plain(url)
    if "@" in authority:
        raise InvalidUrl("The URL must not hold a user name or a password.")
    try:
        parsed = httpx.URL(url).copy_with(fragment=None)
    except (httpx.InvalidURL, ValueError) as error:
        raise InvalidUrl("The URL is not valid.") from error
    _require_host(parsed.raw_host.decode("ascii"))
    _require_port(authority)
    if len(str(parsed)) > MAX_URL_LENGTH:
        raise InvalidUrl(f"The URL must not be longer than {MAX_URL_LENGTH} characters.")
    return parsed


def _require_plain(url: str) -> str:
    """Refuses text that two parsers could read in two ways. Returns the URL's authority part."""
    if len(url) > MAX_URL_LENGTH:
        raise InvalidUrl(f"The URL must not be longer than {MAX_URL_LENGTH} characters.")
    if any(not _is_plain(character) for character in url):
        raise InvalidUrl("The URL must not hold spaces, control characters or backslashes.")
    match = _AUTHORITY.match(url)
    if match is None:
        raise InvalidUrl("The URL must be absolute and start with http:// or https://.")
    return match[1]


def _is_plain(character: str) -> bool:
    is_surrogate = "\ud800" <= character <= "\udfff"
    is_control = character < " " or "\x7f" <= character <= "\x9f"
    return not (is_surrogate or is_control or character.isspace() or character == "\\")


def _require_host(host: str) -> None:
    if ":" in host:
        # In brackets, and read by httpx as an IPv6 address, perhaps with a zone of this machine.
        valid = "%" not in host
    else:
        valid = bool(_HOSTNAME.fullmatch(host)) and (
            not _ENDS_IN_NUMBER.fullmatch(host) or _literal_address(host) is not None
        )
    if not valid:
        raise InvalidUrl("The URL's host is missing or not valid.")


def _require_port(authority: str) -> None:
    match = _PORT.fullmatch(authority)
    if match is None:
        raise InvalidUrl("The URL's port is not valid.")
    port = int(match[1] or 443)
    if port not in (80, 443) and not 1024 <= port <= 65535:
        raise InvalidUrl("The URL's port must be 80, 443, or from 1024 to 65535.")


def _literal_address(host: str) -> str | None:
    """The IP address that a resolver would read `host` as, in whatever spelling; None for a name.

    The C library takes `0`, `127.1`, `0x7f.1`, `0177.0.0.1` and `2130706433` for addresses.
    """
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None


# --- failures ---------------------------------------------------------------------------------


class OutboundReason(enum.StrEnum):
    """Why a request failed. Stable: users match on these."""

    BLOCKED_ADDRESS = "blocked_address"
    DNS_FAILURE = "dns_failure"
    CONNECT_FAILURE = "connect_failure"
    TLS_FAILURE = "tls_failure"
    TIMEOUT = "timeout"
    PROTOCOL_ERROR = "protocol_error"
    INVALID_URL = "invalid_url"
    # Of downloads only.
    HTTP_STATUS = "http_status"
    REDIRECT_REFUSED = "redirect_refused"
    TOO_LARGE = "too_large"


_MESSAGES = {
    OutboundReason.BLOCKED_ADDRESS: "The host has a private or reserved address.",
    OutboundReason.DNS_FAILURE: "The host's name could not be resolved.",
    OutboundReason.CONNECT_FAILURE: "No connection to the host could be made.",
    OutboundReason.TLS_FAILURE: "No secure connection to the host could be made.",
    OutboundReason.TIMEOUT: "The host did not answer in time.",
    OutboundReason.PROTOCOL_ERROR: "The host's answer was broken or incomplete.",
    OutboundReason.INVALID_URL: "The URL is not valid.",
    OutboundReason.HTTP_STATUS: "The host answered with an error status.",
    OutboundReason.REDIRECT_REFUSED: "The URL redirects too often, or to where it may not.",
    OutboundReason.TOO_LARGE: "The file at the URL is larger than allowed.",
}


class OutboundError(Exception):
    """A request that failed.

    message: one sentence that users may read. It names the kind of cause and nothing that the
    resolver or the other side told us, which would make us a way to look into a private network.
    """

    def __init__(self, reason: OutboundReason, message: str | None = None) -> None:
        self.reason = reason
        self.message = message or _MESSAGES[reason]
        super().__init__(self.message)


class BlockedAddress(OutboundError):
    """The name has an answer that may not be dialled. Nothing was connected to."""

    def __init__(self) -> None:
        super().__init__(OutboundReason.BLOCKED_ADDRESS)


class TooLarge(OutboundError):
    """The body is declared, or turned out to be, longer than the caller takes."""

    def __init__(self) -> None:
        super().__init__(OutboundReason.TOO_LARGE)


# httpcore passes some of anyio's errors on as they are (EndOfStream from a write over TLS).
_BROKEN_CONNECTION = (
    httpcore.NetworkError,
    OSError,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
)


@contextmanager
def _outbound_errors() -> Iterator[None]:
    """Turns what the layers below raise into OutboundError."""
    try:
        yield
    except (TimeoutError, httpcore.TimeoutException) as error:
        raise OutboundError(OutboundReason.TIMEOUT) from error
    except (ssl.SSLError, httpcore.ConnectError) as error:
        # Connecting itself raises our own errors (`_Network.connect_tcp`); what is left is TLS.
        raise OutboundError(OutboundReason.TLS_FAILURE) from error
    except (*_BROKEN_CONNECTION, httpcore.ProtocolError) as error:
        raise OutboundError(OutboundReason.PROTOCOL_ERROR) from error


# --- the network of one request ---------------------------------------------------------------


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

    def __init__(self, inner: httpcore.AsyncNetworkStream, network: "_Network") -> None:
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


class _Network(httpcore.AsyncNetworkBackend):
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
        literal = _literal_address(host)
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


# --- requests ---------------------------------------------------------------------------------


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
        network = _Network(self._guard, self._resolve, self._dialler)
        request = _build_request(method, url, headers, body)
        connection = httpcore.AsyncHTTPConnection(
            request.url.origin, ssl_context=self._ssl_context, network_backend=network
        )
        try:
            with _outbound_errors():
                async with asyncio.timeout_at(deadline):
                    response = await connection.handle_async_request(request)
            network.reply_has_begun()
            yield response
        finally:
            await network.aclose()


def _parse_target(url: str) -> httpx.URL:
    try:
        return _parse_url(url)
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
        if not all(_is_plain(character) for character in location):
            raise InvalidUrl
        return _parse_url(str(current.join(location)))
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
        with _outbound_errors():
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
