"""Blobs as files on a local disk: `<root>/blobs/<last two digits>/<key>`."""

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import structlog

from app.ids import is_id
from app.storage.base import (
    BlobMissing,
    StorageUnavailable,
    StoredBlob,
    system_errors_as_unavailable,
)
from app.storage.blocks import BlockFile
from app.storage.disk import StagingDirectory, sync_directory, try_to_write

log = structlog.get_logger(__name__)

_PIECE_BYTES = 256 * 1024
# Reads what the system has in memory, and fails where it would wait. Linux has it.
_WITHOUT_WAITING = getattr(os, "RWF_NOWAIT", None)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class LocalStorage:
    name = "local"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._staging = StagingDirectory(root / "staging")
        self._has_failed = False

    @property
    def staging_dir(self) -> Path:
        return self._staging.path

    async def open(self) -> None:
        with system_errors_as_unavailable(f"cannot store files in {self._root}"):
            await asyncio.to_thread(self._make_directories)

    def _make_directories(self) -> None:
        """All of them now, so that storing a blob has one directory entry to make durable."""
        self._staging.open()
        for number in range(256):
            (self._blobs / f"{number:02x}").mkdir(parents=True, exist_ok=True)
        for directory in (self._blobs, self._blobs.parent, self._blobs.parent.parent):
            sync_directory(directory)
        try_to_write(self.staging_dir)

    def _path(self, key: str) -> Path:
        return Path(f"{self._blobs}/{key[-2:]}/{key}")

    async def put(self, staged: BlockFile, key: str) -> None:
        """A failed fsync says nothing of what is on the disk, and a second one would lie: after
        one, nothing more is stored until a restart."""
        self._require_sound()
        with system_errors_as_unavailable("cannot store a file"):
            await asyncio.to_thread(self._store_durably, staged, self._path(key))

    def _store_durably(self, staged: BlockFile, target: Path) -> None:
        staged.complete()
        with self._watching_sync():
            staged.sync()
        staged.close()
        staged.move(target)
        try:
            with self._watching_sync():
                sync_directory(target.parent)
        except OSError:
            with contextlib.suppress(OSError):
                target.unlink()
            raise

    @contextlib.contextmanager
    def _watching_sync(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _DISK_FULL:
                self._has_failed = True
                log.critical("the disk failed; no file is stored until a restart", exc_info=error)
            raise

    def _require_sound(self) -> None:
        if self._has_failed:
            raise StorageUnavailable("an fsync has failed since the start")

    async def read(self, key: str, start: int, end: int) -> AsyncGenerator[bytes]:
        with system_errors_as_unavailable("cannot read a file"):
            try:
                file = self._path(key).open("rb", buffering=0)
            except FileNotFoundError:
                raise BlobMissing(key) from None
            with file:
                while start < end:
                    size = min(_PIECE_BYTES, end - start)
                    # What is in memory is read faster here than a thread is woken.
                    piece = _read_from_memory(file.fileno(), size, start)
                    piece = piece or await asyncio.to_thread(os.pread, file.fileno(), size, start)
                    if not piece:
                        raise BlobMissing(f"{key} is shorter than recorded")
                    start += len(piece)
                    yield piece

    @asynccontextmanager
    async def local_copy(self, key: str) -> AsyncIterator[Path]:
        path = self._path(key)
        with system_errors_as_unavailable("cannot read a file"):
            exists = await asyncio.to_thread(path.exists)
        if not exists:
            raise BlobMissing(key)
        yield path

    async def delete(self, key: str) -> None:
        with system_errors_as_unavailable("cannot delete a file"):
            await asyncio.to_thread(self._path(key).unlink, missing_ok=True)

    async def list_blobs(self) -> AsyncGenerator[list[StoredBlob]]:
        for number in range(256):
            with system_errors_as_unavailable("cannot list the files"):
                page = await asyncio.to_thread(_blobs_in, self._blobs / f"{number:02x}")
            if page:
                yield page

    async def remove_unfinished(self, before: datetime) -> None:
        with system_errors_as_unavailable("cannot remove staged files"):
            await asyncio.to_thread(self._staging.remove_dead)
            await asyncio.to_thread(self._staging.remove_older, before)

    async def claim(self, owner: str) -> str:
        with system_errors_as_unavailable("cannot tell whose files these are"):
            return await asyncio.to_thread(_read_or_write, self._root / "owner", owner)

    async def check(self) -> None:
        self._require_sound()
        with system_errors_as_unavailable("cannot write to the disk"):
            await asyncio.to_thread(try_to_write, self.staging_dir)

    async def close(self) -> None:
        await asyncio.to_thread(self._staging.close)


def _read_from_memory(descriptor: int, size: int, start: int) -> bytes:
    """Nothing where the system would have to ask the disk, or cannot tell."""
    if _WITHOUT_WAITING is None:
        return b""
    buffer = bytearray(size)
    try:
        count = os.preadv(descriptor, [buffer], start, _WITHOUT_WAITING)
    except OSError:
        return b""
    return bytes(memoryview(buffer)[:count])


def _read_or_write(path: Path, text: str) -> str:
    """What a death while writing has left empty is written again."""
    with path.open("a+") as file:
        file.seek(0)
        found = file.read()
        if not found:
            file.write(text)
    return found or text


def _blobs_in(directory: Path) -> list[StoredBlob]:
    blobs = []
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if is_id(entry.name):
                    modified = datetime.fromtimestamp(entry.stat().st_mtime, UTC)
                    blobs.append(StoredBlob(entry.name, modified))
    return blobs
