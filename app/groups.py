"""Work that waits for one thread, which takes all of it at a time: what costs the same for one and
for many, such as a commit or a sync, is then done once for all of them."""

import asyncio
import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

J = TypeVar("J")

Outcome = tuple[Any, Exception | None]
"""A job's result, or its error."""


class _Waiting(NamedTuple):
    job: Any
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class GroupQueue(Generic[J]):
    """Filled in an event loop, emptied in a thread, until it is closed."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()

    def submit(self, job: J) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.put(_Waiting(job, future, loop))
        return future

    def close(self) -> None:
        """What has been submitted before is still done."""
        self._waiting.put(None)

    def groups(self) -> Iterator["Group[J]"]:
        """All that wait at a time, at least one; ends with the last."""
        item = self._waiting.get()
        while item is not None:
            group = [item]
            item = self._next(group)
            yield Group(group)
            item = item or self._waiting.get()

    def _next(self, group: list[_Waiting]) -> _Waiting | None: ...
