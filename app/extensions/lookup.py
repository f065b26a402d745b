"""Blocking look-ups of a client library (credentials, metadata services) that hold up nothing."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


async def look_up(function: Callable[[], T], *, timeout_seconds: float | None = None) -> T:
    """What `function` returns, run in a thread of its own. Raises TimeoutError, and what it raises.

    A look-up that hangs is left behind: the thread is a daemon, so that it cannot hold up the exit
    of the process, and a thread of its own, so that it takes nobody's place in a pool.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    thread = threading.Thread(target=_fulfil, args=(future, function), daemon=True)
    thread.start()
    async with asyncio.timeout(timeout_seconds):
        return await asyncio.wrap_future(future)


def _fulfil(future: Future[T], function: Callable[[], T]) -> None:
    try:
        result = function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
