"""Work that waits for a thread, which takes all of it at a time: what costs the same for one and
for many, such as a commit or a sync, is then done once for all of them."""

import asyncio
import contextlib
import queue
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

J = TypeVar("J")

Outcome = tuple[Any, Exception | None]
"""A job's result, or its error."""


class _Waiting(NamedTuple):
    job: Any
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class Group(Generic[J]):
    """At least one job."""

    def __init__(self, waiting: list[_Waiting]) -> None:
        self._waiting = waiting
        self.jobs: list[J] = [each.job for each in waiting]

    def answer(self, outcomes: Sequence[Outcome]) -> None:
        """In the order of the jobs. Wakes the event loop once for all of them."""

        def answer_all() -> None:
            for (_, future, _), (result, error) in zip(self._waiting, outcomes, strict=True):
                if future.cancelled():
                    continue
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._waiting[0].loop.call_soon_threadsafe(answer_all)


class GroupQueue(Generic[J]):
    """Filled in an event loop, emptied in threads, until it is closed.

    largest: how many jobs a group has at most.
    """

    def __init__(self, largest: int = sys.maxsize) -> None:
        self._largest = largest
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()

    def submit(self, job: J) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.put(_Waiting(job, future, loop))
        return future

    def close(self) -> None:
        """What has been submitted before is still done."""
        self._waiting.put(None)

    def groups(self) -> Iterator[Group[J]]:
        """All that waits at a time, again and again; ends after the last."""
        while (first := self._waiting.get()) is not None:
            yield Group([first, *self._take_waiting(self._largest - 1)])
        self._waiting.put(None)  # the other threads have to see it, too

    def _take_waiting(self, count: int) -> Iterator[_Waiting]:
        with contextlib.suppress(queue.Empty):
            for _ in range(count):
                item = self._waiting.get_nowait()
                if item is None:
                    self.close()
                    return
                yield item
