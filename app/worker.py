"""`python -m app worker`: the same resources as the server, taking only what is due."""

import structlog

from app.db import is_sqlite
from app.main import open_resources
from app.settings import Settings, SettingsError
from app.shutdown import Shutdown

log = structlog.get_logger(__name__)


async def work(settings: Settings) -> None:
    """Until SIGINT or SIGTERM. Raises SettingsError."""
    if is_sqlite(settings.sqlalchemy_url):
        raise SettingsError(
            "LOUPE_DATABASE_URL: a worker beside the server needs PostgreSQL; with SQLite the "
            "server does its work itself."
        )
    async with open_resources(settings) as resources:
        shutdown = Shutdown(settings.shutdown_seconds)
        shutdown.handle_signals(shutdown.handle)
        log.info("worker ready")
        await shutdown.asked.wait()
        await resources.drain(shutdown)
