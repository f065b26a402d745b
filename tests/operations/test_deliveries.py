"""Webhook deliveries through HTTP: listed, read, replayed."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter
from sqlalchemy import update

from app.operations import deliveries as deliveries_module
from app.operations.schemas import DeliveryDetails, DeliveryObject
from app.webhooks.models import deliveries
from tests.conftest import Serve
from tests.emulators.receiver import Receiver, status
from tests.operations.support import GOOGLE, UNKNOWN_ID, get, refusal, until, upload
from tests.server import LoupeServer

DELIVERIES = "/v1/webhook-deliveries"
UNKNOWN_EVENT = f"evt_{UNKNOWN_ID}"


@pytest.fixture
def telling(serve: Serve) -> LoupeServer:
    """Tells the end of every run, and after a first failure tries again in an hour."""
    return serve(
        google_auto_tagging="local",
        sync_budget_seconds=20,
        webhook_on="all",
        webhook_schedule="0,3600",
    )


def deliver(server: LoupeServer, url: str, wanted: str) -> dict[str, Any]:
    """The delivery of one upload, once it is so."""
    upload(server, webhookUrl=url)
    return wait_for(server, get(server, DELIVERIES, limit=1)[0]["id"], wanted)


def wait_for(server: LoupeServer, delivery_id: str, wanted: str) -> dict[str, Any]:
    def look() -> Any:
        delivery = get(server, f"{DELIVERIES}/{delivery_id}")
        return delivery if delivery["status"] == wanted and delivery["attempts"] else None

    found: dict[str, Any] = until(look)
    return found


def replay(server: LoupeServer, delivery_id: str) -> httpx.Response:
    return server.client.post(f"{DELIVERIES}/{delivery_id}/replay")


def replay_dead(server: LoupeServer, body: Any) -> httpx.Response:
    return server.client.post(f"{DELIVERIES}/replay", json=body)


def test_delivery_shows_its_body_and_its_attempts(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        receiver.reply = status(200, b"thank you \xff")
        url = receiver.url_for("/hook?token=1")
        delivery = deliver(telling, url, "delivered")
        (event,) = receiver.wait_for(1)
    assert list(delivery) == list(DeliveryDetails.model_json_schema()["properties"])
    TypeAdapter(DeliveryDetails).validate_python(delivery)
    assert delivery["id"] == event.headers["webhook-id"]
    assert delivery["body"] == json.loads(event.body)
    assert delivery["url"] == url
    assert (delivery["attempts"], delivery["lastError"]) == (1, None)
    assert delivery["nextAttemptAt"] is None
    assert delivery["finishedAt"] >= delivery["firstAttemptAt"]
    (attempt,) = delivery["attemptLog"]
    assert (attempt["number"], attempt["statusCode"], attempt["error"]) == (1, 200, None)
    assert attempt["replyBeginning"] == "thank you \ufffd"
    (run,) = get(telling, "/v1/extension-runs")
    assert run["id"] == delivery["runId"]


def test_failed_attempt_leaves_the_delivery_pending_and_says_why(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        receiver.reply = 500
        upload(telling, webhookUrl=receiver.url_for("/hook"))
        until(lambda: get(telling, DELIVERIES)[0]["lastError"])
    (delivery,) = get(telling, DELIVERIES)
    assert (delivery["status"], delivery["attempts"]) == ("pending", 1)
    assert delivery["lastError"] == "status 500"
    assert delivery["nextAttemptAt"] > delivery["firstAttemptAt"]
    assert delivery["finishedAt"] is None


def test_attempt_without_an_answer_has_an_error_instead_of_a_status(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        url = receiver.url_for("/hook")
    upload(telling, webhookUrl=url)
    delivery_id = get(telling, DELIVERIES)[0]["id"]
    (attempt,) = until(lambda: get(telling, f"{DELIVERIES}/{delivery_id}")["attemptLog"])
    assert attempt["statusCode"] is None
    assert attempt["error"]
    assert attempt["replyBeginning"] == ""


def test_deliveries_are_listed_newest_first_in_pages_and_without_bodies(
    telling: LoupeServer,
) -> None:
    with Receiver() as receiver:
        for number in range(4):
            upload(telling, webhookUrl=receiver.url_for(f"/{number}"))
        receiver.wait_for(4)
        listed = get(telling, DELIVERIES)
    assert [each["url"][-1] for each in listed] == ["3", "2", "1", "0"]
    assert list(listed[0]) == list(DeliveryObject.model_json_schema()["properties"])
    assert [each["url"][-1] for each in get(telling, DELIVERIES, limit=2, skip=1)] == ["2", "1"]


def test_deliveries_are_filtered_by_status_host_and_run(telling: LoupeServer) -> None:
    with Receiver() as good, Receiver() as gone:
        gone.reply = 410
        first = deliver(telling, good.url_for("/hook"), "delivered")
        second = deliver(telling, gone.url_for("/hook"), "dead")

        def found(**query: str) -> list[str]:
            return [each["id"] for each in get(telling, DELIVERIES, **query)]

        assert found(status="delivered") == [first["id"]]
        assert found(status="dead") == [second["id"]]
        assert found(status="pending") == []
        assert found(host=f"127.0.0.1:{good.port}") == [first["id"]]
        assert found(host="127.0.0.1") == []
        assert found(runId=second["runId"]) == [second["id"]]
        assert found(runId=second["runId"], status="delivered") == []


WRONG_QUERIES: list[tuple[dict[str, str | int], str]] = [
    ({"limit": 0}, "Minimum value of limit parameter is 1. Value sent is 0."),
    (
        {"status": "success"},
        "Your request contains invalid value for status parameter. "
        "Please provide one of the following: pending, delivered, dead.",
    ),
    ({"runId": "x"}, "Your request contains invalid runId parameter."),
    ({"host": "a\0b"}, "Your request contains invalid host parameter."),
]


def test_wrong_query_is_refused_by_name(server: LoupeServer) -> None:
    for query, message in WRONG_QUERIES:
        assert refusal(server, DELIVERIES, **query) == (400, message)


def test_unknown_and_malformed_ids_are_told_apart(server: LoupeServer) -> None:
    unknown = (404, "The requested webhook delivery does not exist.")
    malformed = (400, "Your request contains invalid deliveryId parameter.")
    assert refusal(server, f"{DELIVERIES}/{UNKNOWN_EVENT}") == unknown
    assert refusal(server, f"{DELIVERIES}/{UNKNOWN_ID}") == malformed
    assert refusal(server, f"{DELIVERIES}/evt_evt_{UNKNOWN_ID}") == malformed
    assert replay(server, UNKNOWN_EVENT).status_code == 404
    assert replay(server, UNKNOWN_ID).status_code == 400


def test_nobody_sees_deliveries_without_the_private_key(server: LoupeServer) -> None:
    for method, path in (
        ("GET", DELIVERIES),
        ("GET", f"{DELIVERIES}/{UNKNOWN_EVENT}"),
        ("POST", f"{DELIVERIES}/{UNKNOWN_EVENT}/replay"),
        ("POST", f"{DELIVERIES}/replay"),
    ):
        assert httpx.request(method, server.url + path).status_code == 401


def test_replay_sends_the_same_event_again(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        receiver.replies.append(410)
        dead = deliver(telling, receiver.url_for("/hook"), "dead")
        answer = replay(telling, dead["id"])
        assert answer.status_code == 200, answer.text
        pending = answer.json()
        TypeAdapter(DeliveryDetails).validate_python(pending)
        assert (pending["status"], pending["attempts"]) == ("pending", 1)
        assert pending["firstAttemptAt"] is None
        assert pending["finishedAt"] is None
        assert pending["attemptLog"] == dead["attemptLog"]
        first, second = receiver.wait_for(2)
        delivered = wait_for(telling, dead["id"], "delivered")
    assert second.headers["webhook-id"] == first.headers["webhook-id"] == dead["id"]
    assert second.body == first.body
    assert delivered["attempts"] == 2
    assert delivered["firstAttemptAt"] > dead["finishedAt"]
    log = [(each["number"], each["statusCode"]) for each in delivered["attemptLog"]]
    assert log == [(1, 410), (2, 200)]


def test_replay_has_24_hours_of_its_own(telling: LoupeServer) -> None:
    """A delivery that died of old age is tried again, not given up at once."""
    with Receiver() as receiver:
        receiver.reply = 410
        dead = deliver(telling, receiver.url_for("/hook"), "dead")
        long_ago = datetime.now(UTC) - timedelta(days=3)
        age(telling, dead["id"], first_attempt_at=long_ago)
        receiver.reply = 503
        replay(telling, dead["id"])
        receiver.wait_for(2)
        until(lambda: len(get(telling, f"{DELIVERIES}/{dead['id']}")["attemptLog"]) == 2)
    assert get(telling, f"{DELIVERIES}/{dead['id']}")["status"] == "pending"


def age(server: LoupeServer, delivery_id: str, **values: datetime) -> None:
    statement = update(deliveries).where(deliveries.c.id == delivery_id).values(**values)
    server.write(lambda tx: tx.execute(statement).rowcount)


def test_delivered_event_may_be_replayed_too(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        delivered = deliver(telling, receiver.url_for("/hook"), "delivered")
        assert replay(telling, delivered["id"]).status_code == 200
        receiver.wait_for(2)


def test_pending_delivery_cannot_be_replayed(telling: LoupeServer) -> None:
    with Receiver() as receiver:
        receiver.reply = 500
        pending = deliver(telling, receiver.url_for("/hook"), "pending")
        answer = replay(telling, pending["id"])
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert "still pending" in answer.json()["message"]


def test_all_dead_deliveries_of_a_time_are_replayed(
    telling: LoupeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries_module, "REPLAY_BATCH", 2)
    noon = datetime(2026, 11, 20, 12, tzinfo=UTC)
    with Receiver() as receiver:
        delivered = deliver(telling, receiver.url_for("/hook"), "delivered")
        age(telling, delivered["id"], created_at=noon)
        receiver.reply = 410
        dead = [deliver(telling, receiver.url_for("/hook"), "dead")["id"] for _ in range(7)]
        for number, each in enumerate(dead):
            age(telling, each, created_at=noon + timedelta(hours=number))
        span = {"from": "2026-11-20T13:00:00Z", "to": "2026-11-20T19:00:00+01:00"}
        answer = replay_dead(telling, span)
        assert (answer.status_code, answer.json()) == (200, {"replayed": 5})
        again = receiver.wait_for(8 + 5)[8:]
        for each in dead:
            wait_for(telling, each, "dead")
    assert sorted(event.headers["webhook-id"] for event in again) == sorted(dead[1:6])


def test_nothing_dead_is_nothing_replayed(server: LoupeServer) -> None:
    span = {"from": "2020-01-01T00:00:00Z", "to": "2021-01-01T00:00:00Z"}
    assert replay_dead(server, span).json() == {"replayed": 0}


FROM, TO = "2026-11-20T00:00:00Z", "2026-11-21T00:00:00Z"


NO_SPANS: list[Any] = [
    {},
    [],
    {"from": FROM},
    {"from": TO, "to": FROM},
    {"from": FROM, "to": FROM},
    {"from": "2026-11-20T00:00:00", "to": TO},
    {"from": "yesterday", "to": TO},
    {"from": 0, "to": TO},
    {"from": None, "to": TO},
    {"from": FROM, "to": TO, "status": "dead"},
]


def test_span_that_is_none_is_refused(server: LoupeServer) -> None:
    for body in NO_SPANS:
        answer = replay_dead(server, body)
        assert answer.status_code == 400, body
        assert "invalid" in answer.json()["message"]


def test_any_span_that_can_be_said_can_be_asked_for(server: LoupeServer) -> None:
    span = {"from": "0001-01-01T00:00:00+14:00", "to": "9999-12-31T23:59:59.999999-12:00"}
    assert replay_dead(server, span).json() == {"replayed": 0}


def test_webhook_url_with_a_password_never_becomes_a_delivery(telling: LoupeServer) -> None:
    fields = {"extensions": f'[{{"name":"{GOOGLE}","minConfidence":5,"maxTags":3}}]'}
    answer = telling.upload(b"x", webhookUrl="https://user:secret@example.com/", **fields)
    assert answer.status_code == 400
    assert get(telling, DELIVERIES) == []
