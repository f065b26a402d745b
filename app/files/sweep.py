"""Clears away what uploads and deletions leave behind when a process dies in the middle.

Harmless from several replicas at once. No blob is touched that is younger than an upload may be:
its row may be about to be committed, here or on another replica.
"""

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta

import structlog
from sqlalchemy import select

from app.db import Database, Tx
from app.extensions.calls import forget_expired_answers
from app.files.models import versions
from app.ids import new_id
from app.keys import kept_secret
from app.storage.base import BlobMissing, Storage, StorageUnavailable

log = structlog.get_logger(__name__)

STORING_SECONDS = 1800.0
"""How long after the deadline of its body an upload's row may be inserted: until then its file is
fetched, looked at and stored."""
CLOCKS_DIFFER_SECONDS = 1800.0
"""Between what writes files, what stores them and what sweeps."""
INTERVAL_SECONDS = 3600.0
BATCH_ROWS = 500


class Sweep:
    """Deletes blobs without a row and what is left of unfinished uploads.

    upload_deadline_seconds: for an upload's body, in every process on this database.
    """

    def __init__(
        self,
        db: Database,
        storage: Storage,
        upload_deadline_seconds: float,
        *,
        batch_rows: int = BATCH_ROWS,
    ) -> None:
        self._db = db
        self._storage = storage
        # A file's time may be that of its first block, at the very beginning of its upload.
        self._age = timedelta(
            seconds=upload_deadline_seconds + STORING_SECONDS + CLOCKS_DIFFER_SECONDS
        )
        self._batch_rows = batch_rows
        self._last_checked = ""

    async def run(self) -> None:
        """Now and every hour, for as long as the process lives."""
        while True:
            try:
                await self.sweep()
            except Exception as error:
                log.error("sweep failed", exc_info=error)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def sweep(self) -> None:
        """Once. Raises StorageUnavailable, and what the database raises."""
        # The earlier of both: a clock that was set forward makes nothing look old.
        clock = self._db.clock
        before = min(clock.now(), clock.wall()) - self._age
        if await self._is_ours():
            await self._delete_orphans(before)
            await self._remove_unfinished(before)
        else:
            log.error("the storage belongs to another database: nothing is swept")
        await self._check_blobs()
        while await self._db.write(forget_expired_answers):
            pass

    async def _remove_unfinished(self, before: datetime) -> None:
        try:
            await self._storage.remove_unfinished(before)
        except StorageUnavailable as error:
            log.error("cannot remove unfinished uploads", exc_info=error)

    async def recognise(self) -> None:
        """Marks a storage that is new as this database's, before anything is stored in it."""
        try:
            await self._is_ours()
        except StorageUnavailable as error:
            log.error("cannot mark the storage", exc_info=error)

    async def _is_ours(self) -> bool:
        """Whether this database knows which blobs are wanted.

        A database that is new, or was named by mistake, knows no blob: without this, the sweep
        would delete every file of the library that they belong to.
        """
        library_id = await self._db.write(kept_secret, "library_id", new_id())
        return await self._storage.claim(library_id) == library_id

    async def _delete_orphans(self, before: datetime) -> None:
        deleted = 0
        async for page in self._storage.list_blobs():
            keys = [blob.key for blob in page if blob.modified_at < before]
            for start in range(0, len(keys), self._batch_rows):
                batch = keys[start : start + self._batch_rows]
                # As a write: on SQLite none is then under way that could insert one of them.
                wanted = await self._db.write(_known_keys, batch)
                for key in batch:
                    if key not in wanted:
                        await self._storage.delete(key)
                        deleted += 1
        if deleted:
            log.warning("blobs without a file deleted", blobs=deleted)

    async def _check_blobs(self) -> None:
        """Looks for the blobs of some rows, each time of the next ones, and only says so when one
        is missing: there is nothing to make it from."""
        keys = await self._db.scan(_keys_after, self._last_checked, self._batch_rows)
        self._last_checked = keys[-1] if len(keys) == self._batch_rows else ""
        missing = [key for key in keys if not await self._exists(key)]
        # A file that was deleted meanwhile is not missed.
        for key in await self._db.scan(_known_keys, missing):
            log.error("a file's blob is missing", key=key)

    async def _exists(self, key: str) -> bool:
        try:
            async for _ in self._storage.read(key, 0, 1):
                pass
        except BlobMissing:
            return False
        return True


def _known_keys(tx: Tx, keys: Sequence[str]) -> set[str]:
    """Those of at most some hundred keys that a row has."""
    if not keys:
        return set()
    known = tx.execute(select(versions.c.blob_key).where(versions.c.blob_key.in_(keys)))
    return set(known.scalars())


def _keys_after(tx: Tx, key: str, limit: int) -> Sequence[str]:
    return (
        tx.execute(
            select(versions.c.blob_key)
            .where(versions.c.blob_key > key)
            .order_by(versions.c.blob_key)
            .limit(limit)
        )
        .scalars()
        .all()
    )
