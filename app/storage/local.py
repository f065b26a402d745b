"""Blobs as files on a local disk: `<root>/blobs/<last two digits>/<key>`."""

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import structlog

from app.groups import GroupQueue
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
# More threads would spend more on waking each other than they gain; larger groups make those who
# are in one wait longer.
_THREADS = 3
_LARGEST_GROUP = 3
# No room, or a file that has been discarded meanwhile: nothing is wrong with the disk.
_HARMLESS = (errno.ENOSPC, errno.EDQUOT, errno.EBADF)


@dataclass(slots=True)
class _Move:
    """Of a staged file to where it stays. error: of the step at which it ended, if it did."""

    staged: BlockFile
    target: Path
    error: Exception | None = None

    def attempt(self, step: "Callable[[_Move], None]") -> None:
        if self.error is None:
            try:
                step(self)
            except Exception as error:  # its own, and no other's of the group
                self.error = error

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def complete(self) -> None:
        self.staged.complete()

    def to_target(self) -> None:
        self.staged.close()
        self.staged.move(self.target)


class LocalStorage:
    """Small files are stored by a few threads, several at a time; large ones by one each."""

    name = "local"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._blobs = root / "blobs"
        self._staging = StagingDirectory(root / "staging")
        self._has_failed = False
        self._small_files: GroupQueue[_Move] = GroupQueue(_LARGEST_GROUP)
        self._threads = [
            threading.Thread(target=self._store_small_files, name="store-files", daemon=True)
            for _ in range(_THREADS)
        ]

    @property
    def staging_dir(self) -> Path:
        return self._staging.path

    async def open(self) -> None:
        with system_errors_as_unavailable(f"cannot store files in {self._root}"):
            await asyncio.to_thread(self._make_directories)
        for thread in self._threads:
            thread.start()

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
        move = _Move(staged, self._path(key))
        with system_errors_as_unavailable("cannot store a file"):
            if staged.is_in_memory:
                await self._small_files.submit(move)
            else:  # may take long, so nobody should have to wait for it
                await asyncio.to_thread(self._store, [move])
                move.raise_error()

    def _store_small_files(self) -> None:
        for group in self._small_files.groups():
            self._store(group.jobs)
            group.answer([(None, move.error) for move in group.jobs])

    def _store(self, moves: Sequence["_Move"]) -> None:
        """Step by step for all of them: the first sync mostly writes what the others would."""
        for step in (_Move.complete, self._sync, _Move.to_target, self._sync_name):
            for move in moves:
                move.attempt(step)

    def _sync(self, move: "_Move") -> None:
        with self._watching_sync():
            move.staged.sync()

    def _sync_name(self, move: "_Move") -> None:
        try:
            with self._watching_sync():
                sync_directory(move.target.parent)
        except OSError:
            with contextlib.suppress(OSError):
                move.target.unlink()
            raise

    @contextlib.contextmanager
    def _watching_sync(self) -> Generator[None]:
        self._require_sound()
        try:
            yield
        except OSError as error:
            if error.errno not in _HARMLESS:
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
        self._small_files.close()
        for thread in self._threads:
            if thread.is_alive():
                await asyncio.to_thread(thread.join)
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
