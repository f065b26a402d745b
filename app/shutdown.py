"""The end of a process: asked for by a signal, bounded in time, hurried by a second Ctrl-C."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import structlog

log = structlog.get_logger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# For giving back what is not done and closing everything, after the time for what is in flight.
CLOSE_SECONDS = 5.0


class Shutdown:
    """limit_seconds: for what is in flight, from the first signal on."""

    def __init__(self, limit_seconds: float) -> None:
        self.asked = asyncio.Event()
        self._limit_seconds = limit_seconds
        self._hurried = asyncio.Event()
        self._asked_at = 0.0

    def handle_signals(self, handle: Callable[[int], None]) -> None:
        """handle: called in the event loop instead of whatever Python would do."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, handle, number)

    def handle(self, number: int) -> None:
        """A second SIGTERM changes nothing: some supervisors send it to a whole group, twice."""
        if not self.asked.is_set():
            self._asked_at = time.monotonic()
            self.asked.set()
            _end_at_last(self._limit_seconds + CLOSE_SECONDS)
        elif number == signal.SIGINT:
            self._hurried.set()
            _end_at_last(CLOSE_SECONDS)

    async def wait_for(self, tasks: Collection["asyncio.Future[Any]"]) -> None:
        """Until they have ended, or the time is over, or somebody is in a hurry."""
        hurried = asyncio.create_task(self._hurried.wait())
        either: list[asyncio.Future[Any]] = [
            asyncio.gather(*tasks, return_exceptions=True),
            hurried,
        ]
        seconds_left = max(0.0, self._asked_at + self._limit_seconds - time.monotonic())
        await asyncio.wait(either, timeout=seconds_left, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()


def _end_at_last(seconds: float) -> None:
    """A database or a bucket that hangs keeps nobody from ending: its threads cannot be stopped."""

    def end() -> None:
        log.error("closing took too long, ended")
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
