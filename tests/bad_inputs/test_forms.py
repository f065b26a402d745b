"""Bodies that come too slowly, fields that are no text, and what would inflate."""

import time
import zlib
from collections.abc import Callable

import pytest
import structlog.testing

from tests.conftest import Serve
from tests.files.helpers import (
    PICTURE,
    RawConnection,
    accepted,
    form_body,
    form_part,
    nothing_left,
    on_sqlite_only,
    post_body,
    refused,
)
from tests.files.support import wait_until
from tests.server import LoupeServer

NAME = form_part("fileName", b"a.bin")
BODY = form_body(NAME, form_part("file", bytes(2_000_000), "a.bin"))

Slow = Callable[[RawConnection], None]


def _stop_in_the_head(connection: RawConnection) -> None:
    connection.send_upload_head(f"Content-Length: {len(BODY)}")


def _stop_halfway(connection: RawConnection) -> None:
    connection.send_upload_head(f"Content-Length: {len(BODY)}")
    connection.send(BODY[: len(BODY) * 3 // 4])


def _stop_before_the_last_byte(connection: RawConnection) -> None:
    connection.send_upload_head("Transfer-Encoding: chunked")
    connection.send(f"{len(BODY):x}\r\n".encode() + BODY[:-10])


@pytest.mark.parametrize(
    "send", [_stop_in_the_head, _stop_halfway, _stop_before_the_last_byte], ids=lambda f: f.__name__
)
@on_sqlite_only
def test_a_body_that_stops_coming_is_cut_with_408(serve: Serve, send: Slow) -> None:
    server = serve(upload_idle_seconds=0.5, max_concurrent_uploads=1)
    with structlog.testing.capture_logs() as logs, nothing_left(server):
        with RawConnection(server.url) as connection:
            send(connection)
            answer = connection.read_answer()
            assert (answer.status, answer.headers["connection"]) == (408, "close")
            assert connection.read_to_end() == b""
        wait_until(lambda: not list(server.resources.storage.staging_dir.iterdir()), "no file")
    assert not [line for line in logs if "exc_info" in line]
    accepted(server.upload(PICTURE))


@on_sqlite_only
def test_a_body_that_drips_is_cut_at_its_deadline(serve: Serve) -> None:
    """Though each byte comes in time."""
    server = serve(upload_idle_seconds=10, upload_deadline_seconds=1.0)
    with nothing_left(server), RawConnection(server.url) as connection:
        connection.send_upload_head(f"Content-Length: {len(BODY)}")
        connection.send(BODY[:1_500_000])
        connection.socket.settimeout(0.05)
        answered, until = b"", time.monotonic() + 30
        while not answered and time.monotonic() < until:
            connection.send(b"\0")
            try:
                answered = connection.socket.recv(1)
            except TimeoutError:
                continue
        connection.socket.settimeout(20)
        assert (answered + connection.socket.recv(65536)).startswith(b"HTTP/1.1 408 ")
        wait_until(lambda: not list(server.resources.storage.staging_dir.iterdir()), "no file")


@pytest.mark.parametrize(
    "text",
    [b"\xff", b"a\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe4\xb8"],
    ids=["no UTF-8", "overlong NUL", "lone surrogate", "beyond Unicode", "cut"],
)
@pytest.mark.parametrize(
    "field", ["fileName", "folder", "tags", "description", "extensions", "webhookUrl", "unknown"]
)
def test_a_field_that_is_no_text_is_400(
    shared_server: LoupeServer, field: str, text: bytes
) -> None:
    name = b"" if field == "fileName" else NAME
    body = form_body(name, form_part(field, text), form_part("file", PICTURE, "a.jpg"))
    with nothing_left(shared_server):
        assert "UTF-8" in refused(post_body(shared_server, body), 400)


def test_a_gzip_bomb_is_refused_before_it_is_read(shared_server: LoupeServer) -> None:
    """Most of it is never sent."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head("Content-Encoding: gzip", f"Content-Length: {len(bomb) * 16}")
        connection.send(bomb[:1000])
        assert connection.read_answer().status == 415
