"""`python -m app worker`: the same resources as the server, taking only what is due."""

import asyncio
import signal

import structlog

from app.db import is_sqlite
from app.main import open_resources
from app.settings import Settings, SettingsError

log = structlog.get_logger(__name__)


async def work(settings: Settings) -> None:
    """Until SIGINT or SIGTERM. Raises SettingsError."""
    if is_sqlite(settings.sqlalchemy_url):
        raise SettingsError(
            "LOUPE_DATABASE_URL: a worker beside the server needs PostgreSQL; with SQLite the "
            "server does its work itself."
        )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(each, stop.set)
    async with open_resources(settings) as resources:
        log.info("worker ready")
        await stop.wait()
        resources.stop_claiming()
        await resources.drain(settings.shutdown_seconds)
