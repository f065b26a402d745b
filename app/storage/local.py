"""Blobs as files on a local disk: `<root>/blobs/<last two digits>/<key>`."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from app.storage.base import BlobMissing

_PIECE_BYTES = 256 * 1024
_INLINE_BYTES = 64 * 1024


class LocalStorage:
    name = "local"

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self.staging_dir = root / "staging"

    async def open(self) -> None:
        await asyncio.to_thread(self._make_directories)

    def _make_directories(self) -> None:
        """All of them now, so that storing a blob has one directory entry to make durable."""
        self.staging_dir.mkdir(parents=True, exist_ok=True)
        for number in range(256):
            (self._blobs / f"{number:02x}").mkdir(parents=True, exist_ok=True)
        for directory in (self._blobs, self._blobs.parent, self._blobs.parent.parent):
            _sync_directory(directory)

    def _path(self, key: str) -> Path:
        return self._blobs / key[-2:] / key

    async def put(self, staged: Path, key: str) -> None:
        await asyncio.to_thread(_store_durably, staged, self._path(key))

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        try:
            file = self._path(key).open("rb", buffering=0)
        except FileNotFoundError:
            raise BlobMissing(key) from None
        with file:
            file.seek(start)
            remaining = end - start
            # A small blob is read faster here than a thread is woken.
            inline = remaining <= _INLINE_BYTES
            while remaining > 0:
                size = min(_PIECE_BYTES, remaining)
                piece = file.read(size) if inline else await asyncio.to_thread(file.read, size)
                if not piece:
                    raise BlobMissing(f"{key} is shorter than recorded")
                remaining -= len(piece)
                yield piece

    @asynccontextmanager
    async def local_copy(self, key: str) -> AsyncIterator[Path]:
        path = self._path(key)
        if not await asyncio.to_thread(path.exists):
            raise BlobMissing(key)
        yield path

    async def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await asyncio.to_thread(self._path(key).unlink)

    async def check(self) -> None:
        await asyncio.to_thread(_try_to_write, self.staging_dir)


def _store_durably(staged: Path, target: Path) -> None:
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    staged.rename(target)
    _sync_directory(target.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_to_write(directory: Path) -> None:
    probe = directory / f".probe-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
