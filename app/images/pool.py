"""A few child processes that decode."""

import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import anyio
import anyio.to_process
from anyio import BrokenWorkerProcess, CancelScope, CapacityLimiter

from app.images.child import ask_to_be_ended, run_in_child, warm_up
from app.images.measures import PixelMeasures, measure
from app.images.pixels import (
    ImageUnreadable,
    ProviderCopy,
    Rendition,
    make_provider_copy,
    make_thumbnail,
)

T = TypeVar("T")

# One for each core; at most four, since each may come to need as much memory as it is allowed.
CHILDREN = min(4, max(2, os.cpu_count() or 2))


class ImagePool:
    """A few child processes that decode. Made in the event loop's main thread, and used there.

    `start` belongs in a task that outlives the pool's use: anyio ends the children with the task at
    the root of it. A call waits for a free child without limit, then has `timeout_seconds` in it.
    A child that takes longer, dies, or whose caller is cancelled is killed and replaced before its
    place is given on.

    memory_bytes bounds what each child allocates (Linux only): an AVIF with alpha needs 16 bytes a
    pixel, interlaced PNG and progressive JPEG up to 8, others little.
    """

    def __init__(
        self,
        *,
        processes: int = CHILDREN,
        timeout_seconds: float = 30,
        max_pixels: int = 100_000_000,
        memory_bytes: int = 2_147_483_648,
    ) -> None:
        self._processes = processes
        self._timeout_seconds = timeout_seconds
        self._max_pixels = max_pixels
        self._memory_bytes = memory_bytes
        self._places = CapacityLimiter(processes)
        # anyio's own; never waited for, since it has room for whoever holds a place.
        self._limiter = CapacityLimiter(processes)
        self._is_closed = False

    async def start(self) -> None:
        """Returns when every child is ready for its first picture."""
        await self._in_each_place(self._spawn)

    async def provider_copy(self, path: Path) -> ProviderCopy:
        """The normalised JPEG of a picture's first frame.

        Raises ImageUnreadable, and OSError if there is no such file.
        """
        return await self._run(make_provider_copy, str(path), self._max_pixels)

    async def thumbnail(self, path: Path, box_px: int = 300, *, as_webp: bool = False) -> Rendition:
        """The first frame inside a square, never enlarged: WebP, or PNG if it has alpha, else JPEG.

        Raises ImageUnreadable, and OSError if there is no such file.
        """
        return await self._run(make_thumbnail, str(path), self._max_pixels, box_px, as_webp)

    async def measure(self, image: ProviderCopy) -> PixelMeasures:
        """Raises ImageUnreadable if no child could do it in time."""
        return await self._run(measure, image.jpeg)

    async def close(self) -> None:
        """Ends the children, once what they are at is done. The pool cannot be used again."""
        self._is_closed = True
        with CancelScope(shield=True):
            await self._in_each_place(self._end_child)

    async def _in_each_place(self, work: Callable[[], Awaitable[None]]) -> None:
        async def run_in_place() -> None:
            async with self._places:
                await work()

        async with anyio.create_task_group() as tasks:
            for _ in range(self._processes):
                tasks.start_soon(run_in_place)

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        async with self._places:
            if self._is_closed:
                raise RuntimeError("the image pool is closed")
            try:
                with anyio.fail_after(self._timeout_seconds):
                    return await self._call(run_in_child, self._memory_bytes, work, *args)
            except ImageUnreadable:
                raise
            except TimeoutError:
                await self._replace_child()
                limit = f"{self._timeout_seconds:g}"
                raise ImageUnreadable(f"The image took longer than {limit} s to read.") from None
            except BrokenWorkerProcess:
                await self._replace_child()
                raise ImageUnreadable("The image made its decoder crash.") from None
            except anyio.get_cancelled_exc_class():
                await self._replace_child()
                raise

    async def _call(self, function: Callable[..., T], *args: Any) -> T:
        with _main_module_hidden:
            return await anyio.to_process.run_sync(
                function, *args, cancellable=True, limiter=self._limiter
            )

    async def _spawn(self) -> None:
        await self._call(run_in_child, self._memory_bytes, warm_up)

    async def _replace_child(self) -> None:
        """As many warm-ups at once as there should be free children: one of them gets a new one."""
        if self._is_closed:
            return
        free = self._processes - self._places.borrowed_tokens
        with CancelScope(shield=True):
            async with anyio.create_task_group() as tasks:
                for _ in range(1 + int(free)):
                    tasks.start_soon(self._try_to_spawn)

    async def _try_to_spawn(self) -> None:
        # Should it fail, the next call tries again.
        with suppress(BrokenWorkerProcess, OSError):
            await self._spawn()

    async def _end_child(self) -> None:
        # anyio itself ends its children only with the event loop.
        with suppress(BrokenWorkerProcess):
            await self._call(ask_to_be_ended)


class _HiddenMainModule:
    """While it is entered, anyio does not see the file of the main module.

    It would run that file in each new child, and with it import the whole application: slower to
    start, and larger by a hundred megabytes. The children need this module only.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._file: str | None = None

    def __enter__(self) -> None:
        if self._depth == 0:
            self._file = sys.modules["__main__"].__dict__.pop("__file__", None)
        self._depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._file is not None:
            sys.modules["__main__"].__file__ = self._file


_main_module_hidden = _HiddenMainModule()
