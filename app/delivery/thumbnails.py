"""Rendered thumbnails, kept in memory within a bound; a burst for one renders it once."""

import asyncio

from cachetools import LRUCache

from app.images import ImagePool, Rendition
from app.storage.base import Storage

CACHE_BYTES = 32 * 1024 * 1024

_Key = tuple[str, bool]  # the blob's key, and whether as WebP


class Thumbnails:
    def __init__(self, images: ImagePool, storage: Storage, box_px: int) -> None:
        self._images = images
        self._storage = storage
        self._box_px = box_px
        self._rendered: LRUCache[_Key, Rendition] = LRUCache(
            CACHE_BYTES, getsizeof=lambda rendition: len(rendition.content) + 500
        )
        self._rendering: dict[_Key, asyncio.Task[Rendition]] = {}

    async def get(self, blob_key: str, *, as_webp: bool) -> Rendition:
        """Raises ImageUnreadable, BlobMissing."""
        key = blob_key, as_webp
        rendition: Rendition | None = self._rendered.get(key)
        if rendition is not None:
            return rendition
        task = self._rendering.get(key)
        if task is None:
            task = asyncio.create_task(self._render(key))
            self._rendering[key] = task
            task.add_done_callback(lambda _: self._rendering.pop(key, None))
        return await asyncio.shield(task)

    async def _render(self, key: _Key) -> Rendition:
        blob_key, as_webp = key
        async with self._storage.local_copy(blob_key) as path:
            rendition = await self._images.thumbnail(path, self._box_px, as_webp=as_webp)
        if len(rendition.content) < CACHE_BYTES // 8:
            self._rendered[key] = rendition
        return rendition
