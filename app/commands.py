"""What `python -m app COMMAND` does. Each reads the settings from the environment."""

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

import structlog
import uvicorn
import uvloop
from pydantic_settings import BaseSettings

from app import schema
from app.clock import Clock
from app.db import open_database
from app.extensions.registry import discover
from app.keys import load_keys
from app.logs import configure_logs
from app.main import Resources, create_app, open_resources
from app.settings import (
    Settings,
    SettingsError,
    describe,
    load_settings,
    make_directory,
    unknown_variables,
)
from app.shutdown import Shutdown
from app.transport import OneWriteProtocol
from app.worker import work

log = structlog.get_logger(__name__)

# What waits for the disk. With asyncio's own number, six on two cores, uploads would wait for each
# other where an fsync takes long.
BLOCKING_THREADS = 32


def serve() -> None:
    configure_logs()
    _run(_serve(_settings()))


def worker() -> None:
    configure_logs()
    _run(work(_settings()))


def migrate() -> None:
    settings = load_settings(Settings)
    make_directory(settings.data_dir, "LOUPE_DATA_DIR")
    schema.upgrade(settings.sqlalchemy_url)
    print("The schema is up to date.")


def keys() -> None:
    _run(_print_keys(load_settings(Settings)))


def settings() -> None:
    for name in unknown_variables(os.environ, *_settings_classes()):
        print(f"{name} is set, but Loupe has no such setting: is its name right?", file=sys.stderr)
    for each in _settings_classes():
        for name, value, source in describe(load_settings(each)):
            print(f"{name}={value}  ({source})")


def _settings() -> Settings:
    for name in unknown_variables(os.environ, *_settings_classes()):
        log.warning("unknown setting, is its name right?", name=name)
    for each in _settings_classes():
        load_settings(each)  # also those of a provider that is not used: a slip is seen at once
    return load_settings(Settings)


def _settings_classes() -> list[type[BaseSettings]]:
    return [Settings, *(provider.settings_class for provider in discover().values())]


def _run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_default_executor(ThreadPoolExecutor(BLOCKING_THREADS))
        runner.run(work)


async def _serve(settings: Settings) -> None:
    with _listen(settings.host, settings.port) as listening:
        await _serve_on(listening, settings)


async def _serve_on(listening: socket.socket, settings: Settings) -> None:
    async with open_resources(settings) as resources:
        _spare_the_collector()
        shutdown = Shutdown(settings.shutdown_seconds)
        server = _Server(server_config(create_app(resources), settings), resources, shutdown)
        log.info(
            "serving",
            url=settings.base_url,
            providers=resources.tagger.provider_names(),
            keys=resources.keys.source,
        )
        await server.serve([listening])
        await resources.drain(shutdown)


def _spare_the_collector() -> None:
    """What is here now stays: Python need not walk through it again and again, and hold up all
    requests for a tenth of a second each time."""
    gc.collect()
    gc.freeze()


def _listen(host: str, port: int) -> socket.socket:
    """Before anything else is opened: a port that is taken is the commonest mistake."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise SettingsError(
            f"LOUPE_HOST, LOUPE_PORT: cannot listen on {host}, port {port}: {reason}."
        ) from None


class _Server(uvicorn.Server):
    """Stops claiming background work as soon as it is asked to exit."""

    def __init__(self, config: uvicorn.Config, resources: Resources, shutdown: Shutdown) -> None:
        super().__init__(config)
        self._resources = resources
        self._shutdown = shutdown

    def handle_exit(self, sig: int, frame: FrameType | None = None) -> None:
        self._shutdown.handle(sig)
        self._resources.stop_claiming()
        super().handle_exit(sig, frame)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but does not raise the signal again once the last request is answered:
        what the process holds open is yet to be closed."""
        self._shutdown.handle_signals(self.handle_exit)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but returns when the requests that it gave up have let go of everything."""
        await super().shutdown(sockets)
        given_up = set(self.server_state.tasks)
        if self.force_exit:
            for task in given_up:
                task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)


def server_config(app: Any, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        http=OneWriteProtocol,
        timeout_graceful_shutdown=settings.shutdown_seconds,  # type: ignore[arg-type] # any number
    )


async def _print_keys(settings: Settings) -> None:
    schema.require_current(settings.sqlalchemy_url)
    db = open_database(settings, Clock())
    try:
        found = await load_keys(db, settings)
    finally:
        await db.close()
    for pair in found.pairs:
        print(f"public key:      {pair.public}")
        print(f"private key:     {pair.private}  ({found.source})")
    print(f"webhook secret:  {found.webhook_secret}  ({found.webhook_secret_source})")
