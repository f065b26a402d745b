"""What is hardly HTTP, and what would forge a line of the log."""

import contextlib
import json
import re
import time

import httpx
import pytest

from tests.files.helpers import (
    PICTURE,
    UPLOAD,
    RawConnection,
    form_body,
    form_part,
    nothing_left,
)
from tests.files.support import wait_until
from tests.server import LoupeServer
from tests.torture.harness import AUTH, ServerProcess

BODY = form_body(form_part("fileName", b"a.jpg"), form_part("file", PICTURE, "a.jpg"))
CHUNKED = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
SMUGGLED = b"GET /v1/files HTTP/1.1\r\nHost: loupe\r\n\r\n"


def read_to_close(connection: RawConnection) -> bytes:
    """What comes until the server closes. It may reset: it does not read what it refuses."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.socket.recv(65536):
            received += piece
    return received


def statuses(received: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@pytest.mark.parametrize(
    "headers",
    [
        (f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", f"Content-Length: {len(CHUNKED)}"),
        ("Transfer-Encoding: chunked", "Content-Length: 0"),
        ("Content-Length: 5", f"Content-Length: {len(BODY)}"),
        (f"Content-Length: +{len(BODY)}",),
        ("Content-Length: -1",),
        (f"Content-Length: {2**70}",),
        ("Transfer-Encoding: chunked, identity",),
        ("Transfer-Encoding: xchunked", f"Content-Length: {len(BODY)}"),
    ],
    ids=lambda headers: " ".join(headers)[:40],
)
def test_a_body_of_doubtful_length_is_400_and_the_connection_closed(
    shared_server: LoupeServer, headers: tuple[str, ...]
) -> None:
    """Else what follows it might be taken for another request by a proxy, or by us."""
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head(*headers)
        connection.send(CHUNKED + SMUGGLED)
        received = read_to_close(connection)
    assert statuses(received) in ([400], [])


def test_bytes_behind_a_request_that_are_none_end_the_connection(
    shared_server: LoupeServer,
) -> None:
    with RawConnection(shared_server.url) as connection:
        connection.send_head("GET", "/healthz")
        connection.send(b"\0\xff nonsense\r\n\r\n" + SMUGGLED)
        received = read_to_close(connection)
    assert statuses(received) in ([200, 400], [200], [400], [])
    assert b"fileId" not in received


@pytest.mark.parametrize(
    "request_line",
    [b"GET /v1/files\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n\r\n\0"],
)
def test_a_request_of_another_protocol_is_400_and_the_connection_closed(
    shared_server: LoupeServer, request_line: bytes
) -> None:
    with RawConnection(shared_server.url) as connection:
        connection.send(request_line)
        assert statuses(connection.read_to_end()) == [400]


@pytest.mark.parametrize(
    "headers",
    [
        [f"X-Long: {'x' * 2_000_000}"],
        [f"X-{number}: x" for number in range(10_000)],
        [f"X-{number}: {'x' * 1000}" for number in range(100)],
        [f"If-None-Match: {'x' * 1_000_000}"],
        [f"Cookie: {'x' * 70_000}"],
    ],
    ids=["2 MB", "10,000 headers", "100 KB in all", "1 MB of an etag", "70 KB cookie"],
)
@pytest.mark.parametrize("path", ["/v1/files", "/demo/a.jpg", UPLOAD])
def test_a_header_that_no_client_needs_is_431_and_the_connection_closed(
    shared_server: LoupeServer, path: str, headers: list[str]
) -> None:
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_head("POST" if path == UPLOAD else "GET", path, *headers)
        answer = connection.read_answer()
    assert answer.status == 431
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "TRACK", "PROPFIND"])
def test_methods_that_would_echo_or_tunnel_are_refused(
    shared_server: LoupeServer, method: str
) -> None:
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_head(method, "/v1/files", "Cookie: secret", "Connection: close")
        received = connection.read_to_end()
    assert statuses(received) in ([405], [400], [404])
    assert b"secret" not in received


# --- the log ----------------------------------------------------------------------------------

FORGED = 'a\n[ERROR] admin login\r\n{"event": "forged"}\x1b[31m\x1b]0;title\x07\u2028.jpg'


def test_nothing_that_a_client_sends_forges_a_line_of_the_log(process: ServerProcess) -> None:
    """In a path, where it is logged, and in every field of an upload, where it is not."""
    before = len(process.log.read_bytes())
    with httpx.Client(base_url=process.url, auth=AUTH, timeout=60) as client:
        quoted = "".join(f"%{byte:02x}" for byte in FORGED.encode())
        client.get(f"/demo/{quoted}")
        client.get(f"/v1/files/{quoted}/details", headers={"X-Request-Id": "a"})
        client.get("/v1/files", params={"name": FORGED})
        fields = dict.fromkeys(("fileName", "folder", "tags", "description"), FORGED)
        client.post(UPLOAD, files={"file": (FORGED, PICTURE)}, data=fields)
        client.post(
            UPLOAD,
            files={"file": (None, f"http://127.0.0.1:1/{FORGED}")},
            data={"fileName": FORGED},
        )
    deadline = time.monotonic() + 20
    wait_until(
        lambda: (
            process.log.read_bytes()[before:].count(b'"event": "request"') >= 5
            or time.monotonic() > deadline
        ),
        "five log lines",
        timeout_seconds=30,
    )
    added = process.log.read_bytes()[before:].decode()
    lines = [json.loads(line) for line in added.split("\n") if line]
    assert [line["event"] for line in lines if line["event"] != "request"] == []
    assert [line["path"] for line in lines if "admin" in line["path"]] == [
        f"/demo/{FORGED}",
        f"/v1/files/{FORGED}/details",
    ]
    assert added.isascii()
    assert "\x1b" not in added
