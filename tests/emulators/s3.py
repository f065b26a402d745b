"""An S3 server on loopback: moto's, and what it lacks, checksums that are required and compared.

    with S3Emulator() as s3:
        s3.set_environment(monkeypatch)
        bucket = s3.create_bucket()
        s3.faults["upload_part"] = "unavailable"    # stands until it is removed

Operations: `put`, `get`, `head`, `delete`, `list`, `create_parts`, `upload_part`, `complete`,
`abort`, `list_parts`. Faults: `unavailable` (503), `denied` (403), `garbage` (200 with bytes that
are no XML), `corrupt` (a byte of the request's body changes on its way), `truncate` (the reply
ends early), `hang` (no reply until the fault is removed or the server closed).
"""

import base64
import hashlib
import io
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self
from urllib.parse import parse_qs
from uuid import uuid4

import boto3
import pytest
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from tests.canaries import AWS_SECRET_KEY

_LOOK_SECONDS = 0.02
_ERROR = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code></Error>'
_ERRORS = {"unavailable": ("503 Slow Down", b"SlowDown"), "denied": ("403 No", b"AccessDenied")}


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class S3Emulator:
    """calls: the operations that have come, in order. client: for looking behind the scenes."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self.calls: list[str] = []
        self.max_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="s3-emulator")

    def __enter__(self) -> Self:
        self._thread.start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key=AWS_SECRET_KEY,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self.client.close()

    def set_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", self.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET_KEY)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def create_bucket(self) -> str:
        name = f"test-{uuid4()}"
        self.client.create_bucket(Bucket=name)
        self.calls.clear()
        return name

    def wait_for(self, operation: str, *, timeout_seconds: float = 10) -> None:
        """Returns when it has come. Raises TimeoutError."""
        deadline = time.monotonic() + timeout_seconds
        while operation not in self.calls:
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(_LOOK_SECONDS)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Everything in a bucket of at most 1,000 objects."""
        listed = self.client.list_objects_v2(Bucket=bucket).get("Contents", [])
        return {
            each["Key"]: self.client.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
            for each in listed
        }

    def unfinished(self, bucket: str) -> list[str]:
        """The keys of the uploads in parts that were neither completed nor aborted."""
        uploads = self.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
        return [upload["Key"] for upload in uploads]

    # In the server's threads

    def _answer(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        operation = _operation(environ)
        with self._lock:
            self.calls.append(operation)
            self._in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self._in_flight)
        try:
            return self._answer_with(self.faults.get(operation), operation, environ, start_response)
        finally:
            with self._lock:
                self._in_flight -= 1

    def _answer_with(
        self, fault: str | None, operation: str, environ: Any, start_response: Any
    ) -> Iterable[bytes]:
        body = bytearray(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
        while fault == "hang" and operation in self.faults and not self._closing.is_set():
            self._closing.wait(_LOOK_SECONDS)
        if fault in _ERRORS:
            status, code = _ERRORS[fault]
            return _reply(start_response, status, _ERROR % code)
        if fault == "garbage":
            return _reply(start_response, "200 OK", b"\x00<<<not xml")
        if fault == "corrupt":
            body[len(body) // 2] ^= 1
        if operation in ("put", "upload_part") and not _is_intact(environ, body):
            return _reply(start_response, "400 Bad Digest", _ERROR % b"BadDigest")
        environ["wsgi.input"] = io.BytesIO(body)
        answer: Iterable[bytes] = self._moto(environ, start_response)
        return _half(answer) if fault == "truncate" else answer


def _operation(environ: dict[str, Any]) -> str:
    method: str = environ["REQUEST_METHOD"]
    query = parse_qs(environ["QUERY_STRING"], keep_blank_values=True)
    has_key = "/" in environ["PATH_INFO"].strip("/")
    if "uploads" in query:
        return "create_parts" if method == "POST" else "list_parts"
    if "uploadId" in query:
        return {"PUT": "upload_part", "POST": "complete", "DELETE": "abort"}.get(method, method)
    if method == "PUT" and not has_key:
        return "create_bucket"
    return "list" if method == "GET" and not has_key else method.lower()


def _is_intact(environ: dict[str, Any], body: bytearray) -> bool:
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return bool(environ.get("HTTP_X_AMZ_CHECKSUM_SHA256") == digest)


def _reply(start_response: Any, status: str, content: bytes) -> list[bytes]:
    headers = [("content-type", "application/xml"), ("content-length", str(len(content)))]
    start_response(status, headers)
    return [content]


def _half(answer: Iterable[bytes]) -> Iterator[bytes]:
    content = b"".join(answer)
    yield content[: len(content) // 2]
