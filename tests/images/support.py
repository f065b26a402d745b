"""What the image tests have in common: pools, and pictures decoded again."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyvips
from anyio.from_thread import BlockingPortal

from app.images import ImagePool, ProviderCopy, Rendition

T = TypeVar("T")


class Studio:
    """One pool and one event loop, in a thread, for many tests."""

    def __init__(self, folder: Path, portal: BlockingPortal, pool: ImagePool) -> None:
        self._folder = folder
        self._portal = portal
        self._pool = pool

    def file(self, content: bytes) -> Path:
        path = self._folder / "picture"
        path.write_bytes(content)
        return path

    def copy(self, content: bytes) -> ProviderCopy:
        return self._portal.call(self._pool.provider_copy, self.file(content))

    def thumbnail(self, content: bytes, box_px: int = 300, *, as_webp: bool = False) -> Rendition:
        work = partial(self._pool.thumbnail, as_webp=as_webp)
        return self._portal.call(work, self.file(content), box_px)


def run_with_pool(work: Callable[[ImagePool], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        pool = ImagePool(**{"processes": 1, **options})
        await pool.start()
        try:
            return await work(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def decode(content: bytes) -> Any:
    if content.startswith(b"\xff\xd8"):
        return pyvips.Image.jpegload_buffer(content)
    if content.startswith(b"RIFF"):
        return pyvips.Image.webpload_buffer(content)
    return pyvips.Image.pngload_buffer(content)


def quadrant_colours(image: Any) -> list[list[float]]:
    """The colours in the middle of each quarter, row by row."""
    across, down = image.width, image.height
    places = [(1, 1), (3, 1), (1, 3), (3, 3)]
    return [image(across * x // 4, down * y // 4) for x, y in places]


def is_near(colour: list[float], wanted: tuple[int, ...], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(colour, wanted, strict=False))
