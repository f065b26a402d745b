"""500 uploads at once: as many as there are places go through, the rest are told to come back."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests import pictures
from tests.files.helpers import BOUNDARY, UPLOAD, form_body, form_part
from tests.torture.harness import AUTH, ServerProcess, report, running, size, staged_files

CLIENTS = 500
PLACES: int = Settings.model_fields["max_concurrent_uploads"].default
FILE_BYTES = size(1_000_000, 2_900_000)
LAST_BYTES = 100
PIECE_BYTES = 65_536
# On an idle machine a refusal takes well under a second; tests share theirs with others.
ANSWER_SECONDS = 10.0
BURST_SECONDS = 120.0
# A place holds a block of 1 MiB that is not on the disk yet, and the next piece. Each connection
# has a buffer of 64 KiB in the server, read ahead at most twice. The rest is what is loaded once.
MEMORY_KIB = PLACES * 1536 + CLIENTS * 128 + 64 * 1024


BODY = form_body(
    form_part("fileName", b"a.bin"), form_part("file", b"burst" * (FILE_BYTES // 5), "a.bin")
)
HEAD = "\r\n".join(
    [
        f"POST {UPLOAD} HTTP/1.1",
        "Host: loupe",
        f"Authorization: {httpx.BasicAuth(*AUTH)._auth_header}",
        f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}",
        f"Content-Length: {len(BODY)}",
        "",
        "",
    ]
).encode()


@dataclass(frozen=True)
class Answered:
    status: int
    headers: httpx.Headers
    seconds: float


class Client:
    """One upload over a socket of its own, which keeps the end of its file back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def upload(self, rest_may_go: asyncio.Event) -> Answered:
        started = time.monotonic()
        self._writer.write(HEAD)
        sending = asyncio.create_task(self._send(rest_may_go))
        try:
            return await self._read_answer(started)
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            self._writer.close()

    async def _send(self, rest_may_go: asyncio.Event) -> None:
        for start in range(0, len(BODY) - LAST_BYTES, PIECE_BYTES):
            self._writer.write(BODY[start : start + PIECE_BYTES][: len(BODY) - LAST_BYTES - start])
            await self._writer.drain()
            await asyncio.sleep(0)  # so that answers are read as soon as they are there
        await rest_may_go.wait()
        self._writer.write(BODY[-LAST_BYTES:])
        await self._writer.drain()

    async def _read_answer(self, started: float) -> Answered:
        """Raises IncompleteReadError or ConnectionResetError when the connection is cut."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        seconds = time.monotonic() - started
        status_line, *lines = head.decode("latin-1").rstrip().split("\r\n")
        headers = httpx.Headers(dict(line.split(": ", 1) for line in lines))
        await self._reader.readexactly(int(headers["content-length"]))
        return Answered(int(status_line.split()[1]), headers, seconds)


async def burst(port: int) -> list[Answered]:
    """All connections stand before the first byte is sent; nobody ends its upload before all who
    find no place have been answered."""
    rest_may_go = asyncio.Event()
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CLIENTS)]
    uploads = [
        asyncio.create_task(Client(*connection).upload(rest_may_go)) for connection in connections
    ]
    async with asyncio.timeout(BURST_SECONDS):
        refusals = CLIENTS - PLACES
        for answered in asyncio.as_completed(uploads):
            await answered
            refusals -= 1
            if refusals == 0:
                rest_may_go.set()
    return [upload.result() for upload in uploads]


def memory_kib(server: ServerProcess, what: str) -> int:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(f"{what}:")]
    return int(line.split()[1])


def forget_peak(server: ServerProcess) -> None:
    assert server.process is not None
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_burst_fills_every_place_and_the_rest_is_refused_at_once(
    tmp_path: Path, database_url: str
) -> None:
    server = ServerProcess(tmp_path, database_url)
    with running(server):
        with httpx.Client(base_url=server.url, auth=AUTH, timeout=60) as client:
            first = client.post(
                UPLOAD, files={"file": ("a.jpg", pictures.jpeg())}, data={"fileName": "a.jpg"}
            )
            assert first.status_code == 200
            forget_peak(server)
            before = memory_kib(server, "VmRSS")
            answers = asyncio.run(burst(server.port))
            grown = memory_kib(server, "VmHWM") - before
            stored = client.get("/v1/files", params={"fileType": "non-image"}).json()
            again = client.post(
                UPLOAD, files={"file": ("a.jpg", pictures.jpeg())}, data={"fileName": "a.jpg"}
            )
        refused = [answer for answer in answers if answer.status == 503]
        seconds = sorted(answer.seconds for answer in refused)
        report(
            "burst",
            answers=dict(Counter(answer.status for answer in answers)),
            refused_after_seconds=f"{seconds[len(seconds) // 2]:.2f} to {seconds[-1]:.2f}",
            memory_grown_kib=f"{grown} of {MEMORY_KIB}",
        )
        assert Counter(answer.status for answer in answers) == {
            200: PLACES,
            503: CLIENTS - PLACES,
        }
        assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
        assert seconds[-1] < ANSWER_SECONDS
        assert grown < MEMORY_KIB
        assert len(stored) == PLACES
        assert again.status_code == 200
    assert staged_files(tmp_path) == []
