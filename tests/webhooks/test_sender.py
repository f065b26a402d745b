"""Deliveries on their way to a real receiver, from an upload on."""

import json
import threading
from collections.abc import Iterator

import pytest
from imagekitio import ImageKit
from sqlalchemy import text, update

from app import jobs
from app.webhooks.models import deliveries
from tests.conftest import Serve
from tests.emulators.receiver import (
    Receiver,
    Reply,
    hang,
    slow,
    status,
)
from tests.files.support import (
    ENGINES,
    SetClock,
    Stand,
    all_deliveries,
    make_due,
    standing,
    wait_until,
    wait_until_final,
    wake,
)
from tests.server import LoupeServer
from tests.webhooks.support import TELLING, delivery_of, ended, gated, tell, tried


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
    [status(200), status(204), status(299)],
    ids=["200", "204", "299"],
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


def test_receiver_that_is_down_is_tried_again(slow_server: LoupeServer) -> None:
    with Receiver() as receiver:
        port = receiver.port
    file_id = tell(slow_server, f"http://127.0.0.1:{port}/")
    [attempt] = tried(slow_server, file_id)
    assert attempt.error == "connect_failure"
    with Receiver(port=port):
        make_due(slow_server)
        assert ended(slow_server, file_id).status == "delivered"


# Many at once


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
