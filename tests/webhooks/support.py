"""What tests of deliveries have in common: uploads that are told of, and ways to wait for it."""

import threading
from typing import Any

from sqlalchemy import Row, select

from app.extensions.schemas import GOOGLE
from app.webhooks.models import attempts
from tests.emulators.receiver import Line, Reply
from tests.files.support import deliveries_of, upload, wait_until
from tests.server import LoupeServer

# Every upload that asks for an extension is told of, at once and without a provider.
TELLING = {"google_auto_tagging": "off", "aws_auto_tagging": "off", "webhook_on": "all"}


def tell(server: LoupeServer, url: str) -> str:
    """The id of a file of which a webhook is sent to `url`."""
    file_id: str = upload(server, GOOGLE, content=b"text", webhook_url=url)["fileId"]
    return file_id


def delivery_of(server: LoupeServer, file_id: str) -> Row[Any]:
    [delivery] = deliveries_of(server, file_id)
    return delivery


def ended(server: LoupeServer, file_id: str) -> Row[Any]:
    def found() -> Row[Any] | None:
        row = delivery_of(server, file_id)
        return None if row.status == "pending" else row

    row = wait_until(found, "delivery ended")
    assert row is not None
    return row


def tried(server: LoupeServer, file_id: str, count: int = 1) -> list[Row[Any]]:
    """Its attempts once there are so many, and it waits for the next or has ended."""

    def found() -> list[Row[Any]] | None:
        row = delivery_of(server, file_id)
        made = attempts_of(server, row.id)
        return made if len(made) >= count and row.lease_until is None else None

    made = wait_until(found, f"{count} attempts")
    assert made is not None
    return made


def attempts_of(server: LoupeServer, delivery_id: str) -> list[Row[Any]]:
    statement = select(attempts).where(attempts.c.delivery_id == delivery_id)
    return list(server.rows(statement.order_by(attempts.c.number)))


def gated(gate: threading.Event) -> Reply:
    def reply(line: Line) -> None:
        gate.wait(20)
        line.send_head(200, {"Content-Length": "0", "Connection": "close"})

    return reply
