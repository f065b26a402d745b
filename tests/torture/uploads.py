"""Single uploads to a server that may die or fail in the middle of them."""

import os
import time
from pathlib import Path

import httpx

from app.storage.blocks import BLOCK_BYTES
from tests import pictures
from tests.files.helpers import RawConnection, form_body, form_part
from tests.torture.harness import AUTH, ServerProcess, staged_files, wait_for

UPLOAD_SECONDS = 60
# A little more than a block each, so that each makes one block be written, and the rest the last.
PIECES = 3
PIECE_BYTES = BLOCK_BYTES + 64 * 1024
REST_BYTES = 100_000
BLOCKS = PIECES + 1


def try_upload(server: ServerProcess, content: bytes, name: str = "a.jpg") -> int | None:
    """The status; None if the server was gone before it answered."""
    try:
        return upload(server, content, name).status_code
    except httpx.TransportError:
        return None


def upload(server: ServerProcess, content: bytes, name: str = "a.jpg") -> httpx.Response:
    """Under exactly this name, in a folder that the first upload has to make."""
    return httpx.post(
        f"{server.url}/api/v1/files/upload",
        files={"file": (name, content)},
        data={"fileName": name, "folder": "/new/folder", "useUniqueFileName": "false"},
        auth=AUTH,
        timeout=UPLOAD_SECONDS,
    )


class BlockwiseUpload:
    """An upload that goes on when it is told to, and whose file is written in BLOCKS blocks."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        picture = pictures.jpeg()
        self.content = picture + os.urandom(PIECES * PIECE_BYTES + REST_BYTES - len(picture))
        self._server = server
        self._sent_pieces = 0
        self._head = form_part("fileName", name.encode()) + form_part("folder", b"/new/folder")
        self._head += form_part("useUniqueFileName", b"false")
        self._head += form_part("file", b"", name).removesuffix(b"\r\n")

    def __enter__(self) -> "BlockwiseUpload":
        self._connection = RawConnection(self._server.url)
        self._connection.socket.settimeout(UPLOAD_SECONDS)
        end = len(self._end())
        self._connection.send_upload_head(
            f"Content-Length: {len(self._head) + len(self.content) + end}", "Connection: close"
        )
        self._connection.send(self._head)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.__exit__()

    def _end(self) -> bytes:
        return b"\r\n" + form_body()

    def send_blocks(self, number: int) -> None:
        """Returns when so many have been written, and no more."""
        for block in range(1, number + 1):
            self._send_piece()
            wait_for(lambda block=block: self._staged_bytes() >= block * BLOCK_BYTES, "a block")  # type: ignore[misc]

    def _staged_bytes(self) -> int:
        return sum(path.stat().st_size for path in staged_files(self._server.directory))

    def _send_piece(self) -> None:
        start = self._sent_pieces * PIECE_BYTES
        self._connection.send(self.content[start : start + PIECE_BYTES])
        self._sent_pieces += 1

    def finish(self) -> int | None:
        """The status; None if the server was gone before it answered."""
        try:
            while self._sent_pieces < PIECES:
                self._send_piece()
            self._connection.send(self.content[-REST_BYTES:] + self._end())
            return self._connection.read_answer().status
        except (ConnectionError, TimeoutError):
            return None


def next_staged_paths(server: ServerProcess, within_seconds: int = 60) -> list[Path]:
    """Where the next upload may stage its file.

    Uploads a new file: the last id that it takes is the file's, see `app/ids.py`. The next but for
    one or two, which a sweep may take, is the staged file's; its second is not known.
    """
    name = f"before-{time.monotonic_ns()}.jpg"
    file_id = upload(server, pictures.jpeg(), name).raise_for_status().json()["fileId"]
    [directory] = (path for path in server.directory.rglob("staging/*") if path.is_dir())
    process, counter, now = file_id[8:18], int(file_id[18:], 16), int(time.time())
    return [
        directory / f"{second:08x}{process}{next_counter % 2**24:06x}"
        for second in range(now, now + within_seconds)
        for next_counter in range(counter + 1, counter + 4)
    ]
