"""A file on its way in: its limit, the memory it takes, and clients that hang up."""

import base64
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog.testing
from sqlalchemy import select

from app.files.models import files
from app.settings import DEVELOPMENT_PRIVATE_KEY
from tests.conftest import Serve
from tests.files.helpers import (
    BOUNDARY,
    UPLOAD,
    RawConnection,
    accepted,
    at_once,
    form_body,
    form_part,
    nothing_left,
    on_sqlite_only,
    post_body,
    refused,
)
from tests.files.support import wait_until
from tests.files.test_upload import stored_bytes
from tests.server import LoupeServer

TOO_LARGE = "Your request contains invalid file parameter. The file size exceeds limits."
NAME = form_part("fileName", b"a.bin")
LIMIT = 1_500_000


def as_binary(content: bytes) -> bytes:
    return form_body(NAME, form_part("file", content, "a.bin"))


def as_base64(content: bytes) -> bytes:
    return form_body(NAME, form_part("file", base64.b64encode(content)))


def as_data_uri(content: bytes) -> bytes:
    return form_body(NAME, form_part("file", b"data:;base64," + base64.b64encode(content)))


def in_pieces(body: bytes, size: int = 50_000) -> Iterator[bytes]:
    return (body[i : i + size] for i in range(0, len(body), size))


SHAPES = pytest.mark.parametrize("shape", [as_binary, as_base64, as_data_uri])
Shape = Callable[[bytes], bytes]


# --- the limit --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_chunked", [False, True])
@on_sqlite_only
def test_the_limit_is_of_the_decoded_file_to_the_byte(serve: Serve, is_chunked: bool) -> None:
    server = serve(max_upload_bytes=LIMIT)
    content = random.Random(2).randbytes(LIMIT + 1)
    for shape in (as_binary, as_base64, as_data_uri):
        allowed, beyond = shape(content[:LIMIT]), shape(content)
        stored = accepted(post_body(server, in_pieces(allowed) if is_chunked else allowed))
        assert stored_bytes(server, stored["fileId"]) == content[:LIMIT]
        with nothing_left(server):
            answer = post_body(server, in_pieces(beyond) if is_chunked else beyond)
            refused(answer, 413, TOO_LARGE)


@on_sqlite_only
def test_a_length_far_beyond_the_limit_is_refused_before_the_body(serve: Serve) -> None:
    server = serve(max_upload_bytes=LIMIT)
    certain = LIMIT * 4 // 3 + 1024 * 1024
    with nothing_left(server), RawConnection(server.url) as connection:
        connection.send_upload_head(f"Content-Length: {certain + 1}")
        assert connection.read_answer().status == 413
    with RawConnection(server.url) as connection:
        connection.send_upload_head(f"Content-Length: {certain}")
        connection.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):  # it might be base64
            connection.read_answer()


@on_sqlite_only
def test_a_stream_beyond_the_limit_is_refused_at_the_limit(serve: Serve) -> None:
    """And not read on, though the client would go on for ever."""
    server = serve(max_upload_bytes=LIMIT)
    with nothing_left(server), RawConnection(server.url) as connection:
        connection.send_upload_head("Transfer-Encoding: chunked")
        head = NAME + form_part("file", b"", "a.bin").removesuffix(b"\r\n")
        connection.send(f"{len(head):x}\r\n".encode() + head + b"\r\n")
        for _ in range(LIMIT // 50_000 + 2):
            connection.send(b"c350\r\n" + bytes(50_000) + b"\r\n")
        answer = connection.read_answer()
    assert answer.status == 413
    assert answer.headers["connection"] == "close"


def test_uploads_at_once_do_not_mix(server: LoupeServer) -> None:
    contents = [random.Random(number).randbytes(2_500_000 + number) for number in range(8)]
    answers = at_once(
        [
            lambda content=content, shape=shape: post_body(  # type: ignore[misc]
                server, in_pieces(shape(content))
            )
            for content, shape in zip(contents, [as_binary, as_base64] * 4, strict=True)
        ]
    )
    for answer, content in zip(answers, contents, strict=True):
        assert stored_bytes(server, accepted(answer)["fileId"]) == content
    assert not list(server.resources.storage.staging_dir.iterdir())


# --- clients that hang up ---------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_client_that_hangs_up_halfway_leaves_nothing(
    shared_server: LoupeServer,
    shape: Shape,
    is_chunked: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    body = shape(random.Random(3).randbytes(8_000_000))
    half = body[: len(body) // 2]
    staging = shared_server.resources.storage.staging_dir
    with structlog.testing.capture_logs() as logs, nothing_left(shared_server):
        with RawConnection(shared_server.url) as connection:
            if is_chunked:
                connection.send_upload_head("Transfer-Encoding: chunked")
                connection.send(f"{len(half):x}\r\n".encode() + half + b"\r\n")
            else:
                connection.send_upload_head(f"Content-Length: {len(body)}")
                connection.send(half)
            wait_until(lambda: list(staging.iterdir()), "a staged file")
        wait_until(lambda: not list(staging.iterdir()), "no staged file", timeout_seconds=5)
        wait_until(lambda: [line for line in logs if line["event"] == "request"], "its log line")
    assert "client went away" in [line["event"] for line in logs]
    assert not [line for line in logs if "exc_info" in line]
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_what_a_dead_process_staged_is_removed_at_the_start(serve: Serve) -> None:
    first = serve()
    accepted(post_body(first, as_binary(b"kept")))
    first.stop()
    abandoned = first.resources.storage.staging_dir / "0123456789abcdef01234567"
    abandoned.parent.mkdir()
    abandoned.write_bytes(b"half a file")
    second = serve()
    assert not abandoned.parent.exists()
    [row] = second.rows(select(files.c.id))
    assert stored_bytes(second, row.id) == b"kept"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_a_replica_that_starts_leaves_alone_what_another_is_writing(serve: Serve) -> None:
    first = serve()
    body = as_binary(random.Random(5).randbytes(4_000_000))
    with RawConnection(first.url) as connection:
        connection.send_upload_head(f"Content-Length: {len(body)}")
        connection.send(body[:3_000_000])
        staged = wait_until(
            lambda: list(first.resources.storage.staging_dir.iterdir()), "a staged file"
        )
        second = serve()
        assert second.resources.storage.staging_dir.parent == staged[0].parent.parent
        second.stop()
        assert staged[0].exists()
        connection.send(body[3_000_000:])
        assert connection.read_answer().status == 200
    assert not staged[0].exists()


# --- the server as a process of its own -------------------------------------------------------


class Process:
    def __init__(self, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = directory / "files"
        self._log = directory / "log"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("LOUPE_")},
            "LOUPE_DATA_DIR": str(directory),
            "LOUPE_PORT": str(port),
            "LOUPE_MAX_UPLOAD_BYTES": "60000000",
            "LOUPE_GOOGLE_AUTO_TAGGING": "off",
            "LOUPE_AWS_AUTO_TAGGING": "off",
        }
        app = [sys.executable, "-m", "app"]
        subprocess.run([*app, "migrate"], env=environment, check=True, timeout=60)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*app, "serve"], env=environment, stderr=log)
        self.client = httpx.Client(
            base_url=self.url, auth=(DEVELOPMENT_PRIVATE_KEY, ""), timeout=60
        )
        wait_until(self._answers, "the server answers", timeout_seconds=60)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self.client.get("/healthz").status_code == 200
        except httpx.ConnectError:
            return False

    def staged_files(self) -> list[Path]:
        return list((self.storage / "staging").glob("*/*"))

    def logs(self) -> list[dict[str, Any]]:
        """Every line so far; each has to be JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def memory_kib(self, what: str) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        [line] = [line for line in status.splitlines() if line.startswith(f"{what}:")]
        return int(line.split()[1])

    def forget_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def stop(self) -> None:
        self.client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    running = Process(tmp_path_factory.mktemp("process"))
    yield running
    running.stop()


PIECE = 49_152  # a multiple of three, so that base64 has no padding inside


def _endless(size: int) -> Iterator[bytes]:
    """`size` bytes of noise; made on the way, as this process's memory does not count."""
    noise = random.Random(4)
    while size > 0:
        yield noise.randbytes(PIECE)
        size -= PIECE


def _stream(size: int, filename: str | None, encode: Callable[[bytes], bytes]) -> Iterator[bytes]:
    yield NAME
    yield form_part("file", b"", filename).removesuffix(b"\r\n")
    for piece in _endless(size):
        yield encode(piece)
    yield b"\r\n" + form_body()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_base64", [False, True], ids=["binary", "base64"])
def test_memory_does_not_grow_with_the_file(process: Process, is_base64: bool) -> None:
    filename, encode = (None, base64.b64encode) if is_base64 else ("a.bin", bytes)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}

    def send(size: int) -> httpx.Response:
        content = _stream(size, filename, encode)
        return process.client.post(UPLOAD, content=content, headers=headers)

    size = PIECE * 960  # 47 MB
    accepted(send(PIECE * 24))  # whatever is loaded once
    process.forget_peak()
    before = process.memory_kib("VmRSS")
    answer = accepted(send(size))
    grown = process.memory_kib("VmHWM") - before
    assert answer["size"] == size
    assert grown < 12 * 1024, f"{grown} KiB for {size} bytes"


def _wait_for_log(process: Process, event: str) -> dict[str, Any]:
    found = wait_until(
        lambda: [line for line in process.logs() if line["event"] == event], f"{event} in the log"
    )
    return found[-1]


def test_a_hang_up_is_logged_in_one_line_and_without_a_traceback(process: Process) -> None:
    body = as_binary(bytes(6_000_000))
    with RawConnection(process.url) as connection:
        connection.send_upload_head(f"Content-Length: {len(body)}")
        connection.send(body[:3_000_000])
        wait_until(lambda: list((process.storage / "staging").glob("*/*")), "a staged file")
    wait_until(
        lambda: not list((process.storage / "staging").glob("*/*")), "none", timeout_seconds=5
    )
    assert _wait_for_log(process, "client went away")["level"] == "info"
    assert not [line for line in process.logs() if "exception" in line]
    assert not [line for line in process.logs() if line["level"] in ("error", "critical")]


def test_every_log_line_of_a_request_has_its_id_and_no_secret(process: Process) -> None:
    name = "a\n[ERROR] admin login\x1b[31m.jpg"
    answer = process.client.post(
        f"{UPLOAD}?signature=s3cret",
        files={"file": ("a.bin", b"content")},
        data={"fileName": name, "useUniqueFileName": "false"},
    )
    accepted(answer)
    request_id = answer.headers["x-ik-requestid"]
    lines = wait_until(
        lambda: [line for line in process.logs() if line.get("request_id") == request_id],
        "its log line",
    )
    assert [line["event"] for line in lines] == ["request"]
    assert (lines[0]["path"], lines[0]["status"]) == (UPLOAD, 200)
    everything = json.dumps(process.logs())
    for secret in (DEVELOPMENT_PRIVATE_KEY, "s3cret", "whsec_", "admin login"):
        assert secret not in everything
    digest = hashlib.sha256(b"content").hexdigest()
    stored = [path for path in (process.storage / "blobs").rglob("*") if path.is_file()]
    assert digest in [hashlib.sha256(path.read_bytes()).hexdigest() for path in stored]
