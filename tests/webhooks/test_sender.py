"""Deliveries on their way to a real receiver, from an upload on."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from imagekitio import ImageKit
from sqlalchemy import Row, select, text, update

from app import jobs
from app.extensions.schemas import GOOGLE
from app.webhooks.models import attempts, deliveries
from tests.conftest import Serve
from tests.emulators.receiver import (
    Line,
    Receiver,
    Reply,
    close_early,
    endless_body,
    hang,
    raw,
    redirect,
    retry_after,
    slow,
    status,
)
from tests.files.support import (
    ENGINES,
    SetClock,
    Stand,
    all_deliveries,
    deliveries_of,
    make_due,
    standing,
    upload,
    wait_until,
    wait_until_final,
    wake,
)
from tests.server import LoupeServer

# Every upload that asks for an extension is told of, at once and without a provider.
TELLING = {"google_auto_tagging": "off", "aws_auto_tagging": "off", "webhook_on": "all"}


@pytest.fixture(scope="module", params=ENGINES)
def module_stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with standing(request) as stand:
        yield stand


@pytest.fixture
def server(module_stand: Stand) -> Iterator[LoupeServer]:
    yield module_stand.server(**TELLING)
    module_stand.reset()


@pytest.fixture
def slow_server(module_stand: Stand) -> Iterator[LoupeServer]:
    """Its second attempt is far off, so that a test decides when."""
    yield module_stand.server(**TELLING, webhook_schedule="0,40")
    module_stand.reset()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


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


def test_every_attempt_has_the_same_id_and_bytes_and_its_own_signature(
    server: LoupeServer, receiver: Receiver
) -> None:
    receiver.replies.extend([503, 500, 200])
    delivery = ended(server, tell(server, receiver.url_for("/hook?a=b")))
    requests = receiver.wait_for(3)
    assert {request.headers["webhook-id"] for request in requests} == {delivery.id}
    assert {request.body for request in requests} == {delivery.body}
    assert {(request.method, request.path) for request in requests} == {("POST", "/hook?a=b")}
    assert len({request.headers["x-ik-signature"] for request in requests}) == 3
    secret = server.resources.keys.webhook_secret
    for request in requests:
        assert request.headers["content-type"] == "application/json"
        assert abs(int(request.headers["webhook-timestamp"]) - request.time) < 5
        client = ImageKit(private_key="private", webhook_secret=secret)
        client.webhooks.unwrap(request.body.decode(), headers=dict(request.headers))
    assert (delivery.status, delivery.attempts) == ("delivered", 3)


@pytest.mark.parametrize(
    "reply",
    [status(200), status(204), status(299), endless_body()],
    ids=["200", "204", "299", "endless"],
)
def test_two_hundreds_end_the_delivery(
    server: LoupeServer, receiver: Receiver, reply: Reply
) -> None:
    receiver.reply = reply
    file_id = tell(server, receiver.url)
    assert ended(server, file_id).status == "delivered"
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("reply", "status_code", "beginning"),
    [
        (status(500, b"sorry"), 500, b"sorry"),
        (status(404, b"x" * 5000), 404, b"x" * 1024),
        (status(199, b""), None, b""),
    ],
    ids=["500", "404", "199"],
)
def test_attempt_is_recorded_with_status_time_and_beginning_of_the_reply(
    slow_server: LoupeServer,
    receiver: Receiver,
    reply: Reply,
    status_code: int | None,
    beginning: bytes,
) -> None:
    receiver.reply = reply
    file_id = tell(slow_server, receiver.url)
    [attempt] = tried(slow_server, file_id)
    assert (attempt.number, attempt.status_code) == (1, status_code)
    assert attempt.reply_beginning == beginning
    assert attempt.elapsed_ms >= 0
    delivery = delivery_of(slow_server, file_id)
    assert delivery.status == "pending"
    assert delivery.first_attempt_at == attempt.started_at
    assert 30 < (delivery.due_at - attempt.started_at).total_seconds() < 60


@pytest.mark.parametrize("reply", [close_early(), raw(b"nonsense\r\n\r\n")], ids=["closed", "raw"])
def test_broken_answer_is_recorded_with_its_cause_and_tried_again(
    slow_server: LoupeServer, receiver: Receiver, reply: Reply
) -> None:
    receiver.replies.append(reply)
    file_id = tell(slow_server, receiver.url)
    [attempt] = tried(slow_server, file_id)
    assert (attempt.status_code, attempt.reply_beginning) == (None, b"")
    assert attempt.error
    make_due(slow_server)
    assert ended(slow_server, file_id).status == "delivered"


def test_receiver_that_is_down_is_tried_again(slow_server: LoupeServer) -> None:
    with Receiver() as receiver:
        port = receiver.port
    file_id = tell(slow_server, f"http://127.0.0.1:{port}/")
    [attempt] = tried(slow_server, file_id)
    assert attempt.error == "connect_failure"
    with Receiver(port=port):
        make_due(slow_server)
        assert ended(slow_server, file_id).status == "delivered"


def test_redirect_is_a_failure_and_not_followed(
    slow_server: LoupeServer, receiver: Receiver
) -> None:
    with Receiver() as elsewhere:
        receiver.reply = redirect(elsewhere.url)
        [attempt] = tried(slow_server, tell(slow_server, receiver.url))
        assert attempt.status_code == 302
        assert elsewhere.connections == 0


def test_gone_ends_the_delivery_at_once(server: LoupeServer, receiver: Receiver) -> None:
    receiver.reply = 410
    file_id = tell(server, receiver.url)
    assert ended(server, file_id).status == "dead"
    assert len(tried(server, file_id)) == 1
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("value", "at_least", "at_most"),
    [("99999999", 64, 97), ("60", 59, 61), ("-1", 31, 49), ("junk", 31, 49)],
)
def test_retry_after_counts_within_bounds(
    slow_server: LoupeServer, receiver: Receiver, value: str, at_least: float, at_most: float
) -> None:
    receiver.reply = retry_after(value)
    file_id = tell(slow_server, receiver.url)
    [attempt] = tried(slow_server, file_id)
    ended_at = attempt.started_at.timestamp() + attempt.elapsed_ms / 1000
    delay = delivery_of(slow_server, file_id).due_at.timestamp() - ended_at
    assert at_least - 0.5 < delay < at_most + 5


def test_address_that_may_not_be_dialled_is_recorded_and_tried_again(
    module_stand: Stand, receiver: Receiver
) -> None:
    server = module_stand.server(**TELLING, webhook_allow_cidrs="")
    file_id = tell(server, f"http://localhost:{receiver.port}/")
    for attempt in tried(server, file_id, 2):
        assert (attempt.status_code, attempt.error) == (None, "blocked_address")
    assert delivery_of(server, file_id).last_error == "blocked_address"
    assert receiver.connections == 0
    module_stand.reset()


# Many at once


def gated(gate: threading.Event) -> Reply:
    def reply(line: Line) -> None:
        gate.wait(20)
        line.send_head(200, {"Content-Length": "0", "Connection": "close"})

    return reply


def test_at_most_four_go_to_one_host_at_once_while_another_is_served(
    server: LoupeServer, receiver: Receiver
) -> None:
    gate = threading.Event()
    receiver.reply = gated(gate)
    try:
        for _ in range(7):
            tell(server, receiver.url)
        receiver.wait_for(4)
        with Receiver("127.0.0.2") as other:
            tell(server, other.url)
            other.wait_for(1, timeout_seconds=5)
        assert receiver.connections == 4
    finally:
        gate.set()
    receiver.wait_for(7)
    wait_until_final(server)
    assert len(receiver.requests) == 7


def test_slow_receiver_is_waited_for(server: LoupeServer, receiver: Receiver) -> None:
    receiver.reply = slow(0.3)
    file_id = tell(server, receiver.url)
    assert ended(server, file_id).status == "delivered"
    [attempt] = tried(server, file_id)
    assert attempt.elapsed_ms >= 290


# A process that goes away, a database that fails


def test_delivery_under_way_is_given_back_by_a_server_that_stops(
    serve: Serve, receiver: Receiver
) -> None:
    receiver.replies.append(hang())
    first = serve(**TELLING)
    tell(first, receiver.url)
    receiver.wait_for(1)
    first.stop()
    second = serve(**TELLING)
    requests = receiver.wait_for(2, timeout_seconds=5)  # much less than a lease
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    assert len({request.body for request in requests}) == 1
    wait_until_final(second)


def test_attempt_that_could_not_be_recorded_is_made_again(
    serve: Serve, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LEASE_SECONDS", 0.6)
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.1)
    server = serve(**TELLING)
    gate = threading.Event()
    receiver.replies.append(gated(gate))
    tell(server, receiver.url)
    receiver.wait_for(1)
    rename(server, "webhook_attempts", "away")
    gate.set()
    requests = receiver.wait_for(2)
    rename(server, "away", "webhook_attempts")
    wait_until_final(server)
    assert {request.headers["webhook-id"] for request in requests} == {
        delivery.id for delivery in all_deliveries(server)
    }


def rename(server: LoupeServer, table: str, to: str) -> None:
    server.write(lambda tx: tx.execute(text(f"ALTER TABLE {table} RENAME TO {to}")) and None)


# The deadline

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@on_sqlite
def test_delivery_is_dead_when_the_next_attempt_would_start_after_24_hours(
    serve: Serve, receiver: Receiver
) -> None:
    clock = SetClock()
    server = serve(clock=clock, **TELLING, webhook_schedule="0,3600")
    receiver.reply = 500
    file_id = tell(server, receiver.url)
    tried(server, file_id)
    for count, hours in enumerate([12, 10], start=2):
        clock.forward(hours=hours)
        make_due(server)
        tried(server, file_id, count)
        assert delivery_of(server, file_id).status == "pending"
    clock.forward(hours=1, minutes=50)
    make_due(server)
    assert len(tried(server, file_id, 4)) == 4
    assert ended(server, file_id).status == "dead"
    assert len(receiver.requests) == 4


@on_sqlite
def test_delivery_that_nobody_could_try_for_24_hours_is_dead_without_another_attempt(
    serve: Serve, receiver: Receiver
) -> None:
    clock = SetClock()
    server = serve(clock=clock, **TELLING, webhook_schedule="0,3600")
    receiver.reply = 500
    file_id = tell(server, receiver.url)
    tried(server, file_id)
    clock.forward(hours=25)
    wake(server)
    assert ended(server, file_id).status == "dead"
    assert len(receiver.requests) == 1


@on_sqlite
def test_delivery_that_has_never_been_tried_is_tried_however_late(
    serve: Serve, receiver: Receiver
) -> None:
    clock = SetClock()
    server = serve(clock=clock, **TELLING, webhook_schedule="3600")
    file_id = tell(server, receiver.url)
    clock.forward(hours=48)
    wake(server)
    assert ended(server, file_id).status == "delivered"
    assert json.loads(receiver.requests[0].body)["fileId"] == file_id
    headers = receiver.requests[0].headers
    # Signed by the wall clock, which receivers compare with their own.
    assert abs(int(headers["webhook-timestamp"]) - receiver.requests[0].time) < 5


@pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
def test_delivery_of_a_server_that_stands_still_is_taken_over_under_the_same_id(
    serve: Serve, receiver: Receiver
) -> None:
    gate = threading.Event()
    receiver.replies.append(gated(gate))
    first, second = serve(**TELLING), serve(**TELLING)
    tell(first, receiver.url)
    receiver.wait_for(1)

    def let_lease_run_out() -> bool:
        held = (deliveries.c.status == "pending", deliveries.c.attempts == 1)
        first.write(
            lambda tx: (
                tx.execute(update(deliveries).where(*held).values(lease_until=tx.now(-1))) and None
            )
        )
        wake(second)
        return len(receiver.requests) == 2

    try:
        wait_until(let_lease_run_out, "taken over")
    finally:
        gate.set()
    wait_until_final(second)
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    [delivery] = all_deliveries(first)
    assert (delivery.status, delivery.attempts) == ("delivered", 2)
