"""What tests of the media API have in common: refusals that leave nothing, forms, raw sockets."""

import contextlib
import http.client
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import pytest
from sqlalchemy import func, select

from app.db import Base, Tx
from app.errors import HELP
from app.settings import DEVELOPMENT_PRIVATE_KEY
from tests import pictures
from tests.emulators.receiver import Receiver
from tests.server import LoupeServer

T = TypeVar("T")

UPLOAD = "/api/v1/files/upload"
PICTURE = pictures.jpeg()

# For what has nothing to do with the database.
on_sqlite_only = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


# --- what is stored ---------------------------------------------------------------------------


def traces(server: LoupeServer) -> Counter[str]:
    """How many rows each table has, and every file below the storage folder."""

    def count(tx: Tx) -> dict[str, int]:
        return {
            f"table {table.name}": tx.execute(select(func.count()).select_from(table)).scalar_one()
            for table in Base.metadata.sorted_tables
        }

    found = Counter(server.run(server.resources.db.read(count)))
    root = server.resources.settings.storage_dir
    found.update(f"file {path.relative_to(root)}" for path in root.rglob("*") if path.is_file())
    return found


@contextlib.contextmanager
def nothing_left(server: LoupeServer, *receivers: Receiver) -> Iterator[None]:
    """No row, blob, staged file, run, delivery or connection to a receiver is left behind."""
    before = traces(server)
    connections = [receiver.connections for receiver in receivers]
    yield
    after = traces(server)
    assert after == before, f"left behind: {after - before}, gone: {before - after}"
    assert [receiver.connections for receiver in receivers] == connections


def refused(response: httpx.Response, status: int, message: str | None = None) -> str:
    """The message of a refusal, which has the shape that every client can read."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ik-requestid"]
    body = response.json()
    assert body["help"] == HELP
    if message is not None:
        assert body["message"] == message
    said: str = body["message"]
    assert said
    return said


def accepted(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


# --- asking -----------------------------------------------------------------------------------


def post_form(
    server: LoupeServer,
    fields: dict[str, str],
    *,
    client: httpx.Client | None = None,
    headers: dict[str, str] | None = None,
) -> httpx.Response:
    """An upload with text fields alone; `file` among them is base64, a data URI or a URL."""
    return (client or server.client).post(
        UPLOAD, files={name: (None, value) for name, value in fields.items()}, headers=headers
    )


def upload(server: LoupeServer, content: bytes = PICTURE, /, **fields: str) -> dict[str, Any]:
    """The answer to an upload that has to succeed."""
    return accepted(server.upload(content, fields.pop("fileName", "picture.jpg"), **fields))


def upload_as(
    server: LoupeServer, name: str, content: bytes = PICTURE, /, **fields: str
) -> dict[str, Any]:
    """As `upload`, under exactly this name."""
    return upload(server, content, fileName=name, useUniqueFileName="false", **fields)


def patch(server: LoupeServer, file_id: str, body: Any) -> httpx.Response:
    return server.client.patch(f"/v1/files/{file_id}/details", json=body)


def patch_raw(server: LoupeServer, file_id: str, body: bytes) -> httpx.Response:
    return server.client.patch(f"/v1/files/{file_id}/details", content=body)


def anonymous(server: LoupeServer) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda call: call(), calls))


# --- raw sockets ------------------------------------------------------------------------------

BOUNDARY = b"loupe-test-boundary"


def form_part(name: str, content: bytes, filename: str | None = None) -> bytes:
    shown = f'; filename="{filename}"' if filename is not None else ""
    head = f'Content-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode()
    return b"--" + BOUNDARY + b"\r\n" + head + content + b"\r\n"


def form_body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def post_body(server: LoupeServer, body: bytes | Iterable[bytes]) -> httpx.Response:
    """An upload whose body is given byte by byte; an iterable is sent in chunks."""
    content_type = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    return server.client.post(UPLOAD, content=body, headers={"Content-Type": content_type})


class RawConnection:
    """A connection over which a test sends what no HTTP client would."""

    def __init__(self, url: str) -> None:
        parsed = httpx.URL(url)
        self.socket = socket.create_connection((parsed.host, parsed.port or 80), timeout=20)

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, content: bytes) -> None:
        self.socket.sendall(content)

    def send_head(self, method: str, path: str, *headers: str) -> None:
        key = httpx.BasicAuth(DEVELOPMENT_PRIVATE_KEY, "")._auth_header
        lines = [f"{method} {path} HTTP/1.1", "Host: loupe", f"Authorization: {key}", *headers]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def send_upload_head(self, *headers: str) -> None:
        content_type = f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}"
        self.send_head("POST", UPLOAD, content_type, *headers)

    def read_to_end(self) -> bytes:
        """All that comes until the server closes. Raises ConnectionResetError on a reset."""
        received = b""
        while piece := self.socket.recv(65536):
            received += piece
        return received

    def read_answer(self) -> http.client.HTTPResponse:
        """The next answer, which is read whole."""
        answer = http.client.HTTPResponse(self.socket)
        answer.begin()
        answer.read()
        return answer
