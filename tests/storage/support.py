"""Both storages, for the suites that every storage has to pass."""

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.ids import new_id
from app.storage.base import BlobMissing, Storage
from app.storage.blocks import BlockFile
from app.storage.local import LocalStorage
from app.storage.s3 import S3Storage
from tests.emulators.s3 import S3Emulator
from tests.server import EventLoop

T = TypeVar("T")

STORAGES = ["local", "s3"]
PREFIX = "some/prefix"


def staged(storage: Storage, content: bytes) -> BlockFile:
    """The content as an upload leaves it: the last block in memory."""
    file = BlockFile(storage.staging_dir / new_id())
    rest = memoryview(content)
    while rest:
        rest = rest[file.take(rest) :]
        if file.is_block_full:
            file.write_block()
    return file


class Stored:
    """A storage that is open, spoken to from a test's thread."""

    def __init__(self, storage: Storage, event_loop: EventLoop) -> None:
        self.storage = storage
        self._event_loop = event_loop

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._event_loop.run(coroutine)

    def stage(self, content: bytes) -> BlockFile:
        return staged(self.storage, content)

    def staged(self) -> list[str]:
        return [path.name for path in self.storage.staging_dir.iterdir()]

    def put(self, content: bytes, key: str | None = None) -> str:
        """The key under which the content has been stored."""
        key, file = key or new_id(), self.stage(content)
        try:
            self.run(self.storage.put(file, key))
        finally:
            file.discard()
        return key

    def read(self, key: str, start: int, end: int) -> bytes:
        async def read() -> bytes:
            return b"".join([piece async for piece in self.storage.read(key, start, end)])

        return self.run(read())

    def has(self, key: str) -> bool:
        try:
            self.read(key, 0, 1)
        except BlobMissing:
            return False
        return True

    def keys(self) -> list[str]:
        async def collect() -> list[str]:
            return [blob.key async for page in self.storage.list_blobs() for blob in page]

        return sorted(self.run(collect()))


@contextmanager
def opened(storage: Storage, event_loop: EventLoop) -> Iterator[Stored]:
    event_loop.run(storage.open())
    yield Stored(storage, event_loop)
    event_loop.run(storage.close())


@contextmanager
def opened_storage(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, event_loop: EventLoop
) -> Iterator[Stored]:
    """An empty one. name: one of STORAGES."""
    storage: Storage = LocalStorage(tmp_path / "local")
    if name == "s3":
        s3: S3Emulator = request.getfixturevalue("s3")
        storage = S3Storage(s3.create_bucket(), PREFIX, tmp_path / "staging", page_keys=10)
    with opened(storage, event_loop) as stored:
        yield stored
