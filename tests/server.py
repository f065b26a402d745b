"""The whole application on a loopback port, as a user meets it, inside the test process."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import httpx
import uvicorn
from sqlalchemy import Executable, Row

from app.clock import Clock
from app.commands import server_config
from app.db import Tx
from app.images import ImagePool
from app.main import Resources, create_app, open_resources
from app.settings import DEVELOPMENT_PRIVATE_KEY, Settings
from tests import canaries

T = TypeVar("T")
AUTH = (DEVELOPMENT_PRIVATE_KEY, "")


class EventLoop:
    """One event loop in a thread, for all servers of a test session."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float = 60) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_seconds)

    def close(self) -> None:
        self.run(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


class LoupeServer:
    """client: speaks to the server with a valid private key."""

    def __init__(
        self, event_loop: EventLoop, settings: Settings, images: ImagePool, clock: Clock | None
    ) -> None:
        self._event_loop = event_loop
        self._settings = settings
        self._images = images
        self._clock = clock
        self._stack = AsyncExitStack()
        self.resources: Resources
        self.url = settings.base_url
        self.client = httpx.Client(base_url=self.url, auth=AUTH, timeout=60)

    def start(self, listening: socket.socket) -> None:
        self._event_loop.run(self._start(listening))

    async def _start(self, listening: socket.socket) -> None:
        self.resources = await self._stack.enter_async_context(
            open_resources(self._settings, clock=self._clock, images=self._images)
        )
        canaries.plant(self.resources.keys)
        app = canaries.WatchedAnswers(create_app(self.resources))
        config = server_config(app, self._settings)
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server._serve([listening]))
        while not self._server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.002)

    def stop(self) -> None:
        self.client.close()
        self._event_loop.run(self._stop())

    async def _stop(self) -> None:
        self._server.should_exit = True
        await self._serving
        await self._stack.aclose()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine in the server's own event loop."""
        return self._event_loop.run(coroutine)

    def write(self, function: Callable[[Tx], T]) -> T:
        return self.run(self.resources.db.write(function))

    def rows(self, statement: Executable) -> Sequence[Row[Any]]:
        return self.run(self.resources.db.read(lambda tx: tx.execute(statement).all()))

    def upload(self, content: bytes, name: str = "picture.jpg", **fields: str) -> httpx.Response:
        """Uploads bytes as a binary part; `fields` are sent as they are."""
        return self.client.post(
            "/api/v1/files/upload",
            files={"file": (name, content)},
            data={"fileName": name, **fields},
        )

    def details(self, file_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/files/{file_id}/details")
        assert answer.status_code == 200, answer.text
        details: dict[str, Any] = answer.json()
        return details
