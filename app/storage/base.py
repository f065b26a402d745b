"""The port through which bytes go in and out. One file each for the systems behind it."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from app.storage.blocks import BlockFile


class BlobMissing(Exception):
    """Nothing is stored under this key."""


class StorageUnavailable(OSError):
    """Blobs cannot be stored or read now. The message says why, and holds no secret."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """modified_at: when it was stored, or the last of it was written, by the storage's clock."""

    key: str
    modified_at: datetime


class Storage(Protocol):
    """Blobs under keys as `new_id()` makes them; a blob never changes once it is stored.

    Everything but `close` raises StorageUnavailable.
    staging_dir: on a local disk, this process's own while it is open, where callers write a file
    that `put` will take and remove what it did not take.
    """

    name: str

    @property
    def staging_dir(self) -> Path: ...

    async def open(self) -> None:
        """Makes ready to store, and removes what processes that have ended staged."""

    async def put(self, staged: BlockFile, key: str) -> None:
        """Moves a file in, all that it has taken. When this returns, it outlives a power cut.

        When it raises, it is unknown whether the blob is there, and the file may be.
        """

    def read(self, key: str, start: int, end: int) -> AsyncGenerator[bytes]:
        """Bytes start to end (exclusive, beyond start) in pieces. Raises BlobMissing."""

    def local_copy(self, key: str) -> AbstractAsyncContextManager[Path]:
        """A path with the blob's bytes, valid inside the context. Raises BlobMissing."""

    async def delete(self, key: str) -> None:
        """Forgets a blob; one that is not there is no error."""

    def list_blobs(self) -> AsyncGenerator[list[StoredBlob]]:
        """Every blob, in pages and in no order. What is no blob of ours is left out."""

    async def remove_unfinished(self, before: datetime) -> None:
        """Removes what processes that have ended staged.

        Of others', removes staged files, and parts of blobs, that nobody has written to since.
        """

    async def claim(self, owner: str) -> str:
        """Notes whose blobs these are, if that was not noted yet. Returns whose they are."""

    async def check(self) -> None:
        """Raises StorageUnavailable when blobs cannot be stored now."""

    async def close(self) -> None: ...


@contextmanager
def system_errors_as_unavailable(what: str) -> Iterator[None]:
    """what: the beginning of the sentence, such as `cannot write to the disk`."""
    try:
        yield
    except StorageUnavailable:
        raise
    except OSError as error:
        raise StorageUnavailable(f"{what}: {error.strerror or error}") from error
