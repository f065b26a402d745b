"""The port through which bytes go in and out. One file each for the systems behind it."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol


class BlobMissing(Exception):
    """Nothing is stored under this key."""


class Storage(Protocol):
    """Blobs under keys of lowercase hex digits; a blob never changes once it is stored.

    staging_dir: where callers write a file that `put` will take; cleaned by the callers.
    """

    name: str
    staging_dir: Path

    async def open(self) -> None:
        """Makes ready to store. Raises OSError when that is impossible."""

    async def put(self, staged: Path, key: str) -> None:
        """Moves a finished file in. When this returns, the bytes outlive a power cut."""

    def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes start to end (exclusive) in pieces. Raises BlobMissing."""

    def local_copy(self, key: str) -> AbstractAsyncContextManager[Path]:
        """A path with the blob's bytes, valid inside the context. Raises BlobMissing."""

    async def delete(self, key: str) -> None:
        """Forgets a blob; one that is not there is no error."""

    async def check(self) -> None:
        """Raises OSError when blobs cannot be stored now."""
