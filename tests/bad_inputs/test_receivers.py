"""Receivers of webhooks that misbehave: each attempt fails with its cause and is made again."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Row

from tests.conftest import Serve
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver, Reply
from tests.files.helpers import on_sqlite_only
from tests.files.support import ENGINES, SetClock, Stand, make_due, standing, wait_until
from tests.server import LoupeServer
from tests.webhooks.support import TELLING, attempts_of, delivery_of, ended, tell, tried


@pytest.fixture(scope="module", params=ENGINES)
def module_stand(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with standing(request) as stand:
        yield stand


@pytest.fixture
def server(module_stand: Stand) -> Iterator[LoupeServer]:
    """Its second attempt is far off, so that a test decides when."""
    yield module_stand.server(**TELLING, webhook_schedule="0,40", webhook_timeout_seconds=2)
    module_stand.reset()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (replies.status(500), "status 500"),
        (replies.status(404), "status 404"),
        (replies.status(304), "status 304"),
        (replies.continue_flood(), "protocol_error"),
        (replies.huge_header(), "protocol_error"),
        (replies.close_early(), "protocol_error"),
        (replies.raw(b"nonsense\r\n\r\n"), "protocol_error"),
        (replies.hang(), "timeout"),
    ],
    ids=["500", "404", "304", "100s for ever", "1 MB header", "closed", "no HTTP", "hang"],
)
def test_bad_answer_is_recorded_with_its_cause_and_tried_again(
    server: LoupeServer, receiver: Receiver, reply: Reply, cause: str
) -> None:
    receiver.replies.append(reply)
    file_id = tell(server, receiver.url)
    [attempt] = tried(server, file_id)
    delivery = delivery_of(server, file_id)
    assert (delivery.status, delivery.last_error) == ("pending", cause)
    assert cause in (attempt.error, f"status {attempt.status_code}")
    assert attempt.reply_beginning == b""
    make_due(server)
    assert ended(server, file_id).status == "delivered"
    first, second = receiver.wait_for(2)
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == delivery.id
    assert first.body == second.body == delivery.body


@pytest.mark.parametrize("status_code", [301, 302, 307, 308])
def test_redirect_is_a_failure_and_never_followed(
    server: LoupeServer, receiver: Receiver, status_code: int
) -> None:
    with Receiver("127.0.0.3") as inside:
        receiver.reply = replies.redirect(inside.url, status_code)
        [attempt] = tried(server, tell(server, receiver.url))
        assert attempt.status_code == status_code
        assert inside.connections == 0


def test_certificate_that_nobody_vouches_for_is_a_failure(server: LoupeServer) -> None:
    with Receiver(tls=True) as encrypted:
        file_id = tell(server, encrypted.url)
        tried(server, file_id)
        make_due(server)
        first, second = tried(server, file_id, 2)
        assert encrypted.requests == []
    assert first.error == second.error == "tls_failure"
    assert delivery_of(server, file_id).status == "pending"


def test_endless_body_after_a_two_hundred_is_success_and_cut(
    server: LoupeServer, receiver: Receiver
) -> None:
    receiver.reply = replies.endless_body()
    delivery = ended(server, tell(server, receiver.url))
    [attempt] = attempts_of(server, delivery.id)
    assert (delivery.status, attempt.status_code) == ("delivered", 200)
    assert attempt.reply_beginning == b"x" * 1024
    assert len(receiver.requests) == 1


def test_gone_ends_the_delivery_at_once(server: LoupeServer, receiver: Receiver) -> None:
    receiver.reply = 410
    file_id = tell(server, receiver.url)
    assert ended(server, file_id).status == "dead"
    assert len(tried(server, file_id)) == 1
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("value", "at_least", "at_most"),
    [
        ("99999999", 64, 97),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 64, 97),
        ("60", 59, 61),
        ("-1", 31, 49),
        ("junk", 31, 49),
        ("", 31, 49),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 31, 49),
    ],
)
def test_retry_after_counts_within_bounds(
    server: LoupeServer, receiver: Receiver, value: str, at_least: float, at_most: float
) -> None:
    receiver.reply = replies.retry_after(value)
    file_id = tell(server, receiver.url)
    [attempt] = tried(server, file_id)
    ended_at = attempt.started_at.timestamp() + attempt.elapsed_ms / 1000
    delay = delivery_of(server, file_id).due_at.timestamp() - ended_at
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


def made_or_ended(server: LoupeServer, file_id: str, count: int) -> list[Row[Any]] | None:
    """Its attempts once there are so many, or no more will be made."""
    delivery = delivery_of(server, file_id)
    made = attempts_of(server, delivery.id)
    is_over = delivery.status != "pending"
    return made if is_over or (len(made) >= count and delivery.lease_until is None) else None


@on_sqlite_only
def test_name_that_turns_out_private_is_never_dialled_and_dead_after_24_hours(
    serve: Serve, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a public address when it is handed in, and a private one whenever it is dialled."""
    clock = SetClock()
    server = serve(clock=clock, **TELLING, webhook_allow_cidrs="", webhook_schedule="0,3600")

    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "127.0.0.1"]

    monkeypatch.setattr(server.resources.outbound, "_resolve", resolve)
    file_id = tell(server, f"http://public.example:{receiver.port}/")
    made = tried(server, file_id)
    while delivery_of(server, file_id).status == "pending":
        wanted = len(made) + 1
        assert wanted < 25
        clock.forward(hours=1.21)
        make_due(server)
        wait_until(lambda wanted=wanted: made_or_ended(server, file_id, wanted), "an attempt")  # type: ignore[misc]
        made = attempts_of(server, delivery_of(server, file_id).id)
    assert {attempt.error for attempt in made} == {"blocked_address"}
    assert len(made) == 20
    lasted = made[-1].started_at - made[0].started_at
    assert 22.5 < lasted.total_seconds() / 3600 <= 24
    delivery = delivery_of(server, file_id)
    assert (delivery.status, delivery.last_error) == ("dead", "blocked_address")
    assert receiver.connections == 0
