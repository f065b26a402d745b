"""A real HTTP server on loopback that records what it gets and misbehaves as it is told.

    with Receiver() as receiver:
        receiver.replies.append(status(503))         # once; then `receiver.reply`, 200 by default
        receiver.on("/picture.jpg", status(200, content, {"Content-Type": "image/jpeg"}))
        ... receiver.url ...
        [first, second] = receiver.wait_for(2)
        first.headers["webhook-id"], first.json()

A reply is a function that writes bytes to a `Line`, so a test can bring its own.
"""

import contextlib
import datetime
import gzip
import ipaddress
import json
import socket
import socketserver
import ssl
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

LONGEST_BEHAVIOUR_SECONDS = 120.0
REASONS = {200: "OK", 204: "No Content", 302: "Found", 404: "Not Found", 410: "Gone"}


@dataclass(frozen=True, slots=True)
class Received:
    """One request. path: the target as sent, query included. headers: case does not matter.

    time: when its last byte was here, seconds since 1970.
    """

    method: str
    path: str
    headers: httpx.Headers
    body: bytes
    time: float

    def json(self) -> Any:
        return json.loads(self.body)


class Line:
    """The server's end of one connection, as a reply gets it."""

    def __init__(self, writer: BinaryIO, stopping: threading.Event) -> None:
        self._writer = writer
        self._stopping = stopping
        self._until = time.monotonic() + LONGEST_BEHAVIOUR_SECONDS

    def send(self, content: bytes) -> None:
        """Raises OSError when the client is gone."""
        self._writer.write(content)
        self._writer.flush()

    def send_head(self, status_code: int, headers: Mapping[str, str]) -> None:
        lines = [f"HTTP/1.1 {status_code} {REASONS.get(status_code, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def wait(self, seconds: float) -> None:
        """Waits, but not beyond the end of the receiver."""
        self._stopping.wait(seconds)

    @property
    def goes_on(self) -> bool:
        """For loops without an end of their own."""
        return not self._stopping.is_set() and time.monotonic() < self._until


Reply = Callable[[Line], None]


def status(
    status_code: int, content: bytes = b"", headers: Mapping[str, str] | None = None
) -> Reply:
    """An ordinary answer."""
    framing = {} if status_code in (204, 304) else {"Content-Length": str(len(content))}

    def send(line: Line) -> None:
        line.send_head(status_code, {"Connection": "close", **framing, **(headers or {})})
        line.send(content)

    return send


def redirect(url: str, status_code: int = 302) -> Reply:
    return status(status_code, headers={"Location": url})


def retry_after(value: str, status_code: int = 429) -> Reply:
    return status(status_code, headers={"Retry-After": value})


def slow(seconds: float, then: "Reply | int" = 200) -> Reply:
    """Says nothing for `seconds`, then answers."""

    def send(line: Line) -> None:
        line.wait(seconds)
        _as_reply(then)(line)

    return send


def hang() -> Reply:
    """Reads the request and never says a word."""
    return lambda line: line.wait(LONGEST_BEHAVIOUR_SECONDS)


def hang_in_body(status_code: int = 200, beginning: bytes = b"") -> Reply:
    """A status at once, and a body that never ends."""

    def send(line: Line) -> None:
        line.send_head(status_code, {"Content-Length": str(len(beginning) + 1000)})
        line.send(beginning)
        line.wait(LONGEST_BEHAVIOUR_SECONDS)

    return send


def endless_body(status_code: int = 200) -> Reply:
    """A status at once, and bytes as fast as they are taken, for ever."""

    def send(line: Line) -> None:
        line.send_head(status_code, {"Connection": "close"})
        while line.goes_on:
            line.send(b"x" * 65536)

    return send


def drip(status_code: int = 200, pause_seconds: float = 0.05) -> Reply:
    """A status at once, then a byte at a time, for ever."""

    def send(line: Line) -> None:
        line.send_head(status_code, {"Connection": "close"})
        while line.goes_on:
            line.send(b"x")
            line.wait(pause_seconds)

    return send


def chunked(chunks: Iterable[bytes], status_code: int = 200, *, ends: bool = True) -> Reply:
    """`Transfer-Encoding: chunked`, one chunk for each; cut off if not `ends`."""

    def send(line: Line) -> None:
        line.send_head(status_code, {"Transfer-Encoding": "chunked"})
        for chunk in chunks:
            line.send(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        if ends:
            line.send(b"0\r\n\r\n")

    return send


def wrong_length(content: bytes, declared_bytes: int, status_code: int = 200) -> Reply:
    """Declares one length, sends another, closes."""
    return status(status_code, content, {"Content-Length": str(declared_bytes)})


def gzip_bomb(inflated_bytes: int = 100_000_000) -> Reply:
    content = gzip.compress(bytes(inflated_bytes))
    return status(200, content, {"Content-Encoding": "gzip"})


def huge_header(size_bytes: int = 1_000_000) -> Reply:
    return status(200, b"", {"X-Huge": "x" * size_bytes})


def continue_flood() -> Reply:
    """`100 Continue`, for ever."""

    def send(line: Line) -> None:
        while line.goes_on:
            line.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)

    return send


def raw(content: bytes) -> Reply:
    """These bytes and nothing else, HTTP or not."""
    return lambda line: line.send(content)


def close_early() -> Reply:
    """Reads the request, then closes without an answer."""
    return raw(b"")


def _as_reply(reply: "Reply | int") -> Reply:
    return status(reply) if isinstance(reply, int) else reply


class Receiver:
    """Listens from `__enter__` to `__exit__`; after that no thread and no socket is left.

    host: any loopback address; on Linux all of 127.0.0.0/8 can be bound. tls: with a certificate
    of its own for `names` and `host`, which only `certificate_pem` vouches for.
    reply: what a request gets for which `replies` (each used once) holds nothing and `on` no path.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        tls: bool = False,
        names: Iterable[str] = ("localhost",),
    ) -> None:
        self.host = host
        self.requests: list[Received] = []
        self.replies: deque[Reply | int] = deque()
        self.reply: Reply | int = 200
        self.connections = 0
        """TCP connections accepted so far, whether or not a request came."""
        self.certificate_pem = ""
        self._paths: dict[str, Reply | int] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._tls = self._make_tls(names) if tls else None
        self._server = _Server((host, port), self, self._tls)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.005}, name="receiver"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.close_connections()
        self._server.server_close()  # waits for the threads of its connections

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return self.url_for("")

    def url_for(self, path: str, host: str | None = None) -> str:
        """host: another name under which a test's resolver knows this receiver."""
        host = host or (f"[{self.host}]" if ":" in self.host else self.host)
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}{path}"

    def on(self, path: str, reply: Reply | int) -> str:
        """Answers requests for `path` (query aside) with `reply`, always. Returns the URL."""
        self._paths[path] = reply
        return self.url_for(path)

    def serve(
        self,
        path: str,
        content: bytes,
        content_type: str = "application/octet-stream",
        status_code: int = 200,
    ) -> str:
        """Serves `content` at `path`. Returns the URL."""
        return self.on(path, status(status_code, content, {"Content-Type": content_type}))

    def wait_for(self, count: int, timeout_seconds: float = 10) -> list[Received]:
        """All requests so far, once there are `count`. AssertionError if that takes longer."""
        with self._changed:
            arrived = self._changed.wait_for(lambda: len(self.requests) >= count, timeout_seconds)
            seen = [f"{request.method} {request.path}" for request in self.requests]
            assert arrived, f"{len(seen)} of {count} requests in {timeout_seconds} s: {seen}"
            return list(self.requests)

    # Below: called by the server's threads.

    def count_connection(self) -> None:
        with self._changed:
            self.connections += 1

    def converse(self, connection: socket.socket) -> None:
        """One request, one reply."""
        with contextlib.ExitStack() as closing:
            reader = closing.enter_context(connection.makefile("rb"))
            writer = closing.enter_context(connection.makefile("wb"))
            received = _read_request(reader)
            if received is not None:
                self._record(received)(Line(writer, self._stopping))

    def _record(self, received: Received) -> Reply:
        with self._changed:
            self.requests.append(received)
            self._changed.notify_all()
            if self.replies:
                return _as_reply(self.replies.popleft())
            return _as_reply(self._paths.get(received.path.split("?")[0], self.reply))

    def _make_tls(self, names: Iterable[str]) -> ssl.SSLContext:
        certificate, key = _self_signed(self.host, names)
        self.certificate_pem = certificate.decode()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "certificate.pem"
            path.write_bytes(certificate + key)
            context.load_cert_chain(path)
        return context


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], receiver: Receiver, tls: ssl.SSLContext | None
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._receiver = receiver
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__(address, socketserver.BaseRequestHandler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:
            # The handshake comes with the first read, in the connection's own thread.
            connection = self._tls.wrap_socket(
                connection, server_side=True, do_handshake_on_connect=False
            )
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        self._receiver.count_connection()
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        # A client that goes away is what many of the tests are about.
        with contextlib.suppress(OSError, ValueError):
            self._receiver.converse(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


def _read_request(reader: Any) -> Received | None:
    request_line = reader.readline(65536).decode("latin-1").split()
    if len(request_line) != 3:
        return None
    headers: list[tuple[str, str]] = []
    for line in iter(lambda: reader.readline(65536), b"\r\n"):
        if not line:
            return None
        name, _, value = line.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    fields = httpx.Headers(headers)
    body = _read_body(reader, fields)
    return Received(request_line[0], request_line[1], fields, body, time.time())


def _read_body(reader: Any, headers: httpx.Headers) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return bytes(reader.read(int(headers.get("content-length", "0"))))
    body = bytearray()
    while size := int(reader.readline(100), 16):
        body += reader.read(size)
        reader.readline(100)
    reader.readline(100)
    return bytes(body)


def _self_signed(host: str, names: Iterable[str]) -> tuple[bytes, bytes]:
    """Certificate and key in PEM, valid for a day."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Loupe test receiver")])
    now = datetime.datetime.now(datetime.UTC)
    alternatives: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
    alternatives.append(x509.IPAddress(ipaddress.ip_address(host)))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
