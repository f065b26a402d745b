"""How long the queues are and how long their rows wait: for `/metrics` and `/readyz`."""

from sqlalchemy import Table, func, select

from app import jobs, metrics
from app.db import Tx
from app.extensions.models import provider_states, runs
from app.webhooks.models import DEAD, deliveries

QUEUES: dict[str, Table] = {"run": runs, "delivery": deliveries}


def oldest_due_seconds(tx: Tx) -> dict[str, float]:
    """queue -> how long its oldest due row has waited for anyone to take it; 0 if none waits.

    Runs that an open breaker holds back do not count: no replica could take them.
    """
    held_back = select(provider_states.c.extension).where(
        provider_states.c.opened_until.is_not(None)
    )
    return {
        "run": jobs.longest_wait_seconds(tx, runs, runs.c.extension.not_in(held_back)),
        "delivery": jobs.longest_wait_seconds(tx, deliveries),
    }


def gauge_queues(tx: Tx) -> None:
    """Sets the gauges that only the database can tell."""
    for name, seconds in oldest_due_seconds(tx).items():
        metrics.oldest_due_seconds.labels(name).set(seconds)
        metrics.queue_depth.labels(name).set(_pending(tx, QUEUES[name]))
    dead = select(func.count()).where(deliveries.c.status == DEAD)
    metrics.dead_deliveries.set(tx.execute(dead).scalar_one())
    states = select(provider_states.c.extension, provider_states.c.opened_until)
    for extension, opened_until in tx.execute(states):
        metrics.breaker_open.labels(extension).set(opened_until is not None)


def _pending(tx: Tx, table: Table) -> int:
    count: int = tx.execute(
        select(func.count()).select_from(table).where(table.c.status == jobs.PENDING)
    ).scalar_one()
    return count
