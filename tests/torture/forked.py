"""A server in a process of its own that starts in a fraction of a second, to be killed often.

It is forked from a process that has imported the application, and dies by a real SIGKILL.
"""

import asyncio
import multiprocessing
import os
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import uvicorn

from app.commands import server_config
from app.images import ImagePool
from app.logs import configure_logs
from app.main import create_app, open_resources
from app.settings import Settings, load_settings
from tests import canaries
from tests.postgres import free_port
from tests.torture.harness import AUTH, wait_for

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


class ForkedServer:
    """On a fixed port. environment: everything that the process is to see."""

    def __init__(self, directory: Path, database_url: str, **environment: str) -> None:
        self._log = directory / "server.log"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._environment = {
            "PATH": os.environ["PATH"],
            "AWS_EC2_METADATA_DISABLED": "true",
            "LOUPE_PORT": str(self._port),
            "LOUPE_DATA_DIR": str(directory),
            "LOUPE_DATABASE_URL": database_url,
            "LOUPE_WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8",
            "LOUPE_WEBHOOK_SCHEDULE": "0,0.1,0.2",
            "LOUPE_RESULT_TTL_DAYS": "0",
            **environment,
        }
        self._process: BaseProcess | None = None
        self.client = httpx.Client(base_url=self.url, auth=AUTH, timeout=60)

    def start(self) -> None:
        self._process = _context.Process(target=_serve, args=(self._environment, str(self._log)))
        self._process.start()
        wait_for(self._is_ready, "the server to be ready", pause=0.01)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.is_alive(), self._log.read_text()[-3000:]
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """As a power cut would: no chance to say anything."""
        if self._process is not None:
            self._process.kill()
            self._process.join(30)
            self._process.close()
            self._process = None

    def end(self) -> None:
        self.kill()
        self.client.close()
        canaries.check("a server's log", self._log.read_text())


def _serve(environment: dict[str, str], log: str) -> None:
    """In the child."""
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    configure_logs()
    asyncio.run(_run(load_settings(Settings)))


async def _run(settings: Settings) -> None:
    # Not started: it makes its child for the first picture, which many a life does not see.
    images = ImagePool(processes=1)
    listening = _listen(settings.port)
    async with open_resources(settings, images=images) as resources:
        server = uvicorn.Server(server_config(create_app(resources), settings))
        await server.serve([listening])


def _listen(port: int) -> socket.socket:
    """The killed one's port is free once the kernel has closed what it held."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
