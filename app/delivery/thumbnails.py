"""Rendered thumbnails, kept in memory within a bound; a burst for one renders it once."""

import asyncio

from cachetools import LRUCache

from app.images import ImagePool, Rendition
from app.storage.base import Storage

CACHE_BYTES = 32 * 1024 * 1024


class Thumbnails:
    def __init__(self, images: ImagePool, storage: Storage, box_px: int) -> None:
        self._images = images
        self._storage = storage
        self._box_px = box_px
        self._rendered: LRUCache[str, Rendition] = LRUCache(
            CACHE_BYTES, getsizeof=lambda rendition: len(rendition.content) + 500
        )
        self._rendering: dict[str, asyncio.Task[Rendition]] = {}

    async def get(self, blob_key: str) -> Rendition:
        """Raises ImageUnreadable, BlobMissing."""
        rendition: Rendition | None = self._rendered.get(blob_key)
        if rendition is not None:
            return rendition
        task = self._rendering.get(blob_key)
        if task is None:
            task = asyncio.create_task(self._render(blob_key))
            self._rendering[blob_key] = task
            task.add_done_callback(lambda _: self._rendering.pop(blob_key, None))
        return await asyncio.shield(task)

    async def _render(self, blob_key: str) -> Rendition:
        async with self._storage.local_copy(blob_key) as path:
            rendition = await self._images.thumbnail(path, self._box_px)
        if len(rendition.content) < CACHE_BYTES // 8:
            self._rendered[blob_key] = rendition
        return rendition
