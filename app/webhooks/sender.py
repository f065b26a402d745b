"""Sends what is due: signs the stored body afresh, posts it, records the attempt."""

from collections import Counter
from collections.abc import Sequence
from time import monotonic
from typing import Any

import structlog
from sqlalchemy import Row

from app import metrics
from app.db import Database
from app.outbound import Outbound, OutboundError, WebhookReply
from app.webhooks.deliveries import claim_deliveries, give_up, is_expired, record_attempt
from app.webhooks.signing import signature_headers

log = structlog.get_logger(__name__)

MAX_IN_FLIGHT = 512
KEPT_REPLY_BYTES = 1024


class WebhookSender:
    def __init__(
        self,
        db: Database,
        outbound: Outbound,
        *,
        owner: str,
        secret: str,
        schedule: tuple[float, ...],
        timeout_seconds: float,
    ) -> None:
        self._db = db
        self._outbound = outbound
        self._owner = owner
        self._secret = secret
        self._schedule = schedule
        self._timeout_seconds = timeout_seconds
        self._in_flight: Counter[str] = Counter()
        self._last_host = ""

    async def take(self) -> Sequence[Row[Any]]:
        """Claims deliveries that can be sent now."""
        free = MAX_IN_FLIGHT - self._in_flight.total()
        if free <= 0:
            return []
        in_flight = dict(self._in_flight)
        claimed = await self._db.write(
            claim_deliveries, self._owner, in_flight, free, self._last_host
        )
        self._in_flight.update(row.host for row in claimed)
        if claimed:
            self._last_host = claimed[-1].host
        return claimed

    async def send(self, delivery: Row[Any]) -> None:
        """One attempt at one delivery."""
        try:
            await self._attempt(delivery)
        finally:
            self._in_flight[delivery.host] -= 1
            if not self._in_flight[delivery.host]:
                del self._in_flight[delivery.host]

    async def _attempt(self, delivery: Row[Any]) -> None:
        started_at, started = self._db.clock.now(), monotonic()
        if is_expired(delivery, started_at):
            await self._db.write(give_up, delivery.id, delivery.attempts)
            return
        reply, error = await self._post(delivery)
        elapsed_ms = round((monotonic() - started) * 1000)
        status_code = reply.status_code if reply else None
        log.info(
            "webhook attempt",
            event_id=delivery.id,
            attempt=delivery.attempts,
            request_id=delivery.request_id,
            status_code=status_code,
            error=error,
            elapsed_ms=elapsed_ms,
        )
        metrics.webhook_attempts.labels(_outcome(status_code)).inc()
        await self._db.write(
            record_attempt,
            delivery.id,
            delivery.attempts,
            self._schedule,
            started_at=started_at,
            elapsed_ms=elapsed_ms,
            status_code=status_code,
            error=error,
            reply_beginning=reply.body[:KEPT_REPLY_BYTES] if reply else b"",
            retry_after=reply.retry_after if reply else None,
        )

    async def _post(self, delivery: Row[Any]) -> tuple[WebhookReply | None, str | None]:
        headers = {
            "content-type": "application/json",
            "user-agent": "Loupe-Webhooks/1",
            **signature_headers(self._secret, delivery.id, delivery.body, self._db.clock.wall()),
        }
        try:
            reply = await self._outbound.post_webhook(
                delivery.url, delivery.body, headers, timeout_seconds=self._timeout_seconds
            )
        except OutboundError as error:
            return None, error.reason
        return reply, None


def _outcome(status_code: int | None) -> str:
    if status_code is None:
        return "failed"
    return "delivered" if 200 <= status_code < 300 else "refused"
