"""Tells every process that rows have become due: PostgreSQL's NOTIFY and LISTEN.

Only a hint. A process that misses one, for its connection was cut or a pooler in transaction mode
keeps none open, finds the row at its next poll.
"""

import asyncio
from collections.abc import Callable, Mapping

import psycopg
import structlog
from psycopg import AsyncConnection
from sqlalchemy import Table, func, select
from sqlalchemy.engine import make_url

from app.db import Tx

log = structlog.get_logger(__name__)

CHANNEL = "loupe_due"
# A process looks at most so often for what others made due, however many rows there are.
PAUSE_SECONDS = 0.05
FIRST_RECONNECT_SECONDS = 1.0
LONGEST_RECONNECT_SECONDS = 30.0
# So that a peer that vanished without a word is noticed.
_KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

Wakers = Mapping[str, Callable[[], None]]


def notify_due(tx: Tx, table: Table) -> None:
    """With the commit, wakes whoever takes rows of this table. Elsewhere than on PostgreSQL there
    is one process, which wakes itself."""
    if tx.is_postgres:
        tx.execute(select(func.pg_notify(CHANNEL, table.name)))


async def listen(url: str, wakers: Wakers) -> None:
    """Until cancelled, on a connection of its own. wakers: by the table's name."""
    delay = FIRST_RECONNECT_SECONDS
    while True:
        try:
            async with await _connect(url) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                delay = FIRST_RECONNECT_SECONDS
                await _wake_when_told(connection, wakers)
        except (psycopg.Error, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("not listening for due rows, polling goes on", reason=reason)
        await asyncio.sleep(delay)
        delay = min(LONGEST_RECONNECT_SECONDS, 2 * delay)


async def _connect(url: str) -> AsyncConnection:
    """As the pool's own connections: by the same URL, with what its query says."""
    parsed = make_url(url)
    _, parameters = parsed.get_dialect()().create_connect_args(parsed)
    options = {"connect_timeout": 10, **_KEEPALIVE, **parameters}
    return await AsyncConnection.connect(**options, autocommit=True)


async def _wake_when_told(connection: AsyncConnection, wakers: Wakers) -> None:
    """Raises psycopg.Error when the connection ends."""
    due = set(wakers)  # who knows what was missed until now
    while True:
        for name in due.intersection(wakers):
            wakers[name]()
        await asyncio.sleep(PAUSE_SECONDS)
        due = {each.payload async for each in connection.notifies(stop_after=1)}
