"""A file on its way in: written next to where it will stay, hashed and counted as it arrives."""

import asyncio
import binascii
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from app.errors import ApiError, BadRequest
from app.files.types import HEAD_BYTES, mime_type
from app.ids import new_id
from app.images import SNIFF_BYTES, ImageHeader, read_header, sniff_image
from app.storage.base import system_errors_as_unavailable
from app.storage.blocks import BlockFile

T = TypeVar("T")


class FileTooLarge(ApiError):
    def __init__(self) -> None:
        super().__init__(
            413, "Your request contains invalid file parameter. The file size exceeds limits."
        )


class InvalidFile(BadRequest):
    def __init__(self, problem: str) -> None:
        super().__init__(f"Your request contains invalid file parameter. {problem}")


@dataclass(frozen=True, slots=True)
class StagedFile:
    """file: complete, but for what it still holds in memory. header: null if it is no image that
    Loupe reads."""

    file: BlockFile
    size_bytes: int
    sha256: str
    mime: str
    header: ImageHeader | None


class Sink(Protocol):
    """Takes a file's bytes, piece by piece."""

    async def write(self, piece: bytes | bytearray) -> None: ...


class Staging:
    """Hashes one file and writes it in blocks. `discard()` leaves nothing behind.

    Raises FileTooLarge as soon as more than `max_bytes` have come, and StorageUnavailable.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._file = BlockFile(Path(f"{directory}/{new_id()}"))
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._head = b""
        self._finished: StagedFile | None = None
        self.size_bytes = 0

    async def write(self, piece: bytes | bytearray) -> None:
        self.size_bytes += len(piece)
        if self.size_bytes > self._max_bytes:
            raise FileTooLarge
        rest = memoryview(piece)
        while rest:
            rest = rest[self._file.take(rest) :]
            if self._file.is_block_full:
                await self._in_thread(self._write_block)

    async def _in_thread(self, step: Callable[[], T]) -> T:
        with system_errors_as_unavailable("cannot stage a file"):
            return await asyncio.to_thread(step)

    def _write_block(self) -> None:
        with self._file.block as block:
            self._head = self._head or bytes(block[:HEAD_BYTES])
            self._hash.update(block)
        self._file.write_block()

    async def finish(self, name: str) -> StagedFile:
        """The same again if it is called again. name: decides what kind of text it is."""
        if self._finished is None:
            if self._is_small_image():
                self._finished = self._finish(name)  # in less time than it takes to wake a thread
            else:
                self._finished = await self._in_thread(lambda: self._finish(name))
        return self._finished

    def _is_small_image(self) -> bool:
        with self._file.block as block:
            head = bytes(block[:SNIFF_BYTES])
        return self._file.is_in_memory and sniff_image(head) is not None

    def _finish(self, name: str) -> StagedFile:
        source: Path | bytes = self._file.path
        if self._file.is_in_memory:
            with self._file.block as block:
                source = bytes(block)
            self._head = source[:HEAD_BYTES]
            self._hash.update(source)
        else:
            self._write_block()
        header = read_header(source)
        mime = mime_type(self._head, name) if header is None else header.mime
        return StagedFile(self._file, self.size_bytes, self._hash.hexdigest(), mime, header)

    def discard(self) -> None:
        """Removes what is still here: nothing once the storage has taken the file."""
        self._file.discard()


_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class Base64Decoder:
    """Decodes base64 (also its URL-safe alphabet, also with line breaks) into another sink."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._rest = b""
        self._padded = False

    async def write(self, piece: bytes | bytearray) -> None:
        text = self._rest + piece.translate(_URL_SAFE, b" \t\r\n")
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        if whole:
            await self._sink.write(self._decode(text[:whole]))

    def _decode(self, text: bytes) -> bytes:
        if self._padded:
            raise InvalidFile("It is not valid base64.")
        self._padded = text.endswith(b"=")
        try:
            return binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            raise InvalidFile("It is not valid base64.") from None

    def finish(self) -> None:
        """Raises InvalidFile when the text ended in the middle of a group."""
        if self._rest:
            raise InvalidFile("It is not valid base64.")


class TextFile:
    """The `file` field sent as text: base64, a data URI, or the URL of a file to fetch.

    url: the URL, once the field has ended, if it is one.
    """

    MAX_PREFIX_BYTES = 2048

    def __init__(self, sink: Sink) -> None:
        self._decoder = Base64Decoder(sink)
        self._prefix: bytes | None = b""
        self.url: str | None = None

    async def write(self, piece: bytes | bytearray) -> None:
        if self._prefix is None:
            await self._decoder.write(piece)
            return
        self._prefix += piece
        kind = _kind(self._prefix)
        if kind == "url" and len(self._prefix) > self.MAX_PREFIX_BYTES:
            raise InvalidFile(f"A URL has at most {self.MAX_PREFIX_BYTES} characters.")
        if kind == "data" and b"," not in self._prefix:
            if len(self._prefix) > self.MAX_PREFIX_BYTES:
                raise InvalidFile("It is not a valid data URI.")
        elif kind in ("data", "base64"):
            await self._start_decoding(kind)

    async def _start_decoding(self, kind: str) -> None:
        text, self._prefix = self._prefix or b"", None
        if kind == "data":
            header, _, text = text.partition(b",")
            if len(header) > self.MAX_PREFIX_BYTES or header.count(b":") != 1:
                raise InvalidFile("It is not a valid data URI.")
            if not header.lower().rstrip().endswith(b";base64"):
                raise InvalidFile("A data URI should hold base64.")
        await self._decoder.write(text)

    async def finish(self) -> None:
        if self._prefix is not None and _kind(self._prefix) == "url":
            try:
                self.url = self._prefix.decode().strip()
            except UnicodeDecodeError:
                raise InvalidFile("It is not a valid URL.") from None
            return
        if self._prefix is not None:
            if _kind(self._prefix) == "data":
                raise InvalidFile("It is not a valid data URI.")
            await self._start_decoding("base64")
        self._decoder.finish()


def _kind(prefix: bytes) -> str | None:
    """`url`, `data` or `base64`; None while too little has come to tell."""
    start = prefix.lstrip()[:8].lower()
    if start.startswith((b"http://", b"https://")):
        return "url"
    if start.startswith(b"data:"):
        return "data"
    if any(known.startswith(start) for known in (b"http://", b"https://", b"data:")):
        return None
    return "base64"
