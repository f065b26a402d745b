"""What the delivery tests have in common: files at known paths, and anonymous visitors."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any
from uuid import uuid4

import httpx
import pyvips

from tests import pictures
from tests.server import LoupeServer

NOT_FOUND = "The requested file does not exist."


def put(
    server: LoupeServer, content: bytes | None = None, name: str = "picture.jpg", **fields: str
) -> dict[str, Any]:
    """The answer to an upload under this very name, in a folder of its own unless one is named."""
    fields = {"folder": f"/{uuid4()}", "useUniqueFileName": "false", **fields}
    answer = server.upload(pictures.jpeg() if content is None else content, name, **fields)
    assert answer.status_code == 200, answer.text
    uploaded: dict[str, Any] = answer.json()
    return uploaded


def visit(url: str, method: str = "GET", **headers: str) -> httpx.Response:
    """A request without any credential. headers: with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    # Nothing here is encrypted, and to load the certificates of the world takes its time.
    return httpx.request(method, url, headers=named, timeout=30, verify=False)


def with_transformation(url: str, transformation: str) -> str:
    """In the path form, right after the endpoint."""
    return url.replace("/demo/", f"/demo/tr:{transformation}/", 1)


def is_refused(answer: httpx.Response, status_code: int) -> bool:
    """In the shape of every error, and kept by no cache."""
    assert answer.status_code == status_code, answer.text
    assert set(answer.json()) == {"message", "help"}
    return True


def is_not_found(answer: httpx.Response) -> bool:
    assert is_refused(answer, 404)
    assert answer.json()["message"] == NOT_FOUND
    assert answer.headers["ik-error"].startswith("ENOENT - ")
    assert answer.headers["cache-control"] == "no-store"
    return True


def image_of(answer: httpx.Response) -> Any:
    """The picture that was delivered, decoded as what its type says."""
    assert answer.status_code == 200, answer.text
    loaders = {
        "image/jpeg": "jpegload_buffer",
        "image/png": "pngload_buffer",
        "image/webp": "webpload_buffer",
    }
    image = pyvips.Operation.call(loaders[answer.headers["content-type"]], answer.content)
    return image.copy_memory()


@contextmanager
def raw_exchange(server: LoupeServer, head: bytes) -> Iterator[HTTPResponse]:
    """An answer to bytes that no well-behaved client would send. head: up to the last header."""
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 0), timeout=30) as connection:
        connection.sendall(head + b"\r\nHost: loupe\r\nConnection: close\r\n\r\n")
        answer = HTTPResponse(connection, method=head.partition(b" ")[0].decode())
        try:
            answer.begin()
            yield answer
        finally:
            answer.close()
