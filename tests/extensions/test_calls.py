"""Providers are asked once, within their cap and rate, and left alone while they fail."""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from functools import cache
from itertools import count
from typing import Any

import httpx
import pytest
from sqlalchemy import Row, delete, insert, select, update

from app.clock import Clock
from app.db import Tx
from app.extensions.calls import (
    Admission,
    CallPolicy,
    Granted,
    Held,
    NoSlot,
    TooSoon,
    admit,
    callable_now,
    forget_expired_answers,
    make_slots,
    record_answer,
    record_failure,
)
from app.extensions.models import answers, provider_states, runs, slots, usage
from app.extensions.outcomes import Failed, NotNow
from app.extensions.provider import Answer, CallLimits, Label, ProviderError, Reason
from app.extensions.providers.vision import Vision
from app.extensions.runs import resume_runs
from app.extensions.tagger import TaggingRequest
from app.images import ProviderCopy
from app.settings import BudgetExhausted
from tests import pictures
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.server import LoupeServer
from tests.test_db import on_postgres, on_sqlite

GOOGLE = "google-auto-tagging"
AWS = "aws-auto-tagging"
LONG = 20.0
DONE = {GOOGLE: "success"}
WAITS = {GOOGLE: "pending"}
FAILS = {GOOGLE: "failed"}


@pytest.fixture
def serve(serve: Serve) -> Serve:
    """Servers that keep answers, as they do unless told otherwise."""

    def start(**settings: Any) -> LoupeServer:
        return serve(**{"result_ttl_days": 30, **settings})

    return start


@cache
def picture(number: int = 0) -> bytes:
    """Small, and another one for each number below 256."""
    return pictures.as_jpeg(pictures.plain(90, 90, (number, 255 - number, number * 7 % 256)))


def wanting(*names: str, min_confidence: float = 5, max_tags: int = 3) -> str:
    return json.dumps(
        [{"name": n, "minConfidence": min_confidence, "maxTags": max_tags} for n in names]
    )


def upload(server: LoupeServer, number: int = 0, *names: str, **fields: str) -> dict[str, Any]:
    fields = {"extensions": wanting(*(names or (GOOGLE,))), **fields}
    answer = server.upload(picture(number), **fields)
    assert answer.status_code == 200, answer.text
    uploaded: dict[str, Any] = answer.json()
    return uploaded


def upload_all(servers: list[LoupeServer], numbers: list[int]) -> list[dict[str, str]]:
    """Uploads at once, to each server in turn. Returns the statuses in the responses."""

    def one(index: int) -> dict[str, str]:
        server = servers[index % len(servers)]
        statuses: dict[str, str] = upload(server, numbers[index])["extensionStatus"]
        return statuses

    with ThreadPoolExecutor(min(100, len(numbers))) as pool:
        return list(pool.map(one, range(len(numbers))))


def replicas(serve: Serve, database_url: str, **settings: Any) -> list[LoupeServer]:
    """Two servers on PostgreSQL, one on SQLite."""
    servers = 2 if database_url.startswith("postgresql") else 1
    return [serve(google_auto_tagging="vision", **settings) for _ in range(servers)]


def until(condition: Callable[[], Any], *, timeout_seconds: float = 30) -> Any:
    """What `condition` returns, once it is true."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)
    return value


def used(server: LoupeServer, extension: str = GOOGLE) -> tuple[int, int, int]:
    """Calls, reused answers and refused calls, on all days."""
    rows = server.rows(select(usage).where(usage.c.extension == extension))
    return (
        sum(row.calls for row in rows),
        sum(row.reused for row in rows),
        sum(row.refused for row in rows),
    )


def statuses(server: LoupeServer) -> set[str]:
    return {row.status for row in server.rows(select(runs.c.status))}


def tag_names(details: dict[str, Any]) -> list[str]:
    return [tag["name"] for tag in details["AITags"] or []]


# Never twice


def test_same_picture_at_five_paths_is_one_call(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    uploads = [upload(server, fileName=f"{number}.jpg") for number in range(5)]
    assert len({each["filePath"] for each in uploads}) == 5
    assert [tag_names(each) for each in uploads] == [["Cat", "Animal"]] * 5
    assert len(vision.calls) == 1
    assert used(server) == (1, 4, 0)


def test_new_limits_cost_no_call_and_are_the_runs_own(serve: Serve, vision: VisionEmulator) -> None:
    vision.labels = [("Cat", 90.0), ("Animal", 80.0), ("Pet", 70.0)]
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    first = upload(server, extensions=wanting(GOOGLE, min_confidence=85))
    assert tag_names(first) == ["Cat"]
    wanted = [{"name": GOOGLE, "minConfidence": 0, "maxTags": 2}]
    patched = server.client.patch(
        f"/v1/files/{first['fileId']}/details", json={"extensions": wanted}
    ).json()
    assert tag_names(patched) == ["Cat", "Animal"]
    assert tag_names(upload(server, extensions=wanting(GOOGLE, max_tags=30))) == [
        "Cat",
        "Animal",
        "Pet",
    ]
    assert len(vision.calls) == 1


def test_parallel_uploads_of_one_picture_are_one_call(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, sync_budget_seconds=LONG)
    vision.delay_seconds = 0.3
    assert upload_all(servers, [0] * 16) == [DONE] * 16
    assert len(vision.calls) == 1
    assert used(servers[0]) == (1, 15, 0)


def test_answer_is_kept_with_the_models_version(
    serve: Serve, rekognition: RekognitionEmulator
) -> None:
    server = serve(aws_auto_tagging="rekognition", sync_budget_seconds=LONG)
    assert upload(server, 0, AWS)["extensionStatus"] == {AWS: "success"}
    (kept,) = server.rows(select(answers))
    assert kept.key.startswith("rekognition:1:")
    assert kept.labels == [["Cat", 98.5], ["Animal", 97.25]]
    assert kept.model_version == "3.0"
    assert kept.lease_until is None
    lifetime = kept.expires_at - datetime.now(UTC)
    assert abs(lifetime - timedelta(days=30)) < timedelta(hours=1)


def test_no_labels_are_an_answer_too(serve: Serve, vision: VisionEmulator) -> None:
    vision.labels = []
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    assert [upload(server)["extensionStatus"] for _ in range(2)] == [DONE] * 2
    assert len(vision.calls) == 1


@pytest.mark.parametrize("fault", ["image_rejected", "inner_error"])
def test_final_error_is_never_kept(serve: Serve, vision: VisionEmulator, fault: str) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    vision.faults.append(fault)
    assert upload(server)["extensionStatus"] == FAILS
    assert server.rows(select(answers)) == []
    assert upload(server)["extensionStatus"] == DONE
    assert len(vision.calls) == 2


@pytest.mark.parametrize("fault", ["unavailable", "throttle", "garbage", "empty"])
def test_transient_error_and_garbage_are_never_kept(
    serve: Serve, vision: VisionEmulator, fault: str
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    vision.faults.append(fault)
    file = upload(server)
    assert file["extensionStatus"] == WAITS
    until(lambda: statuses(server) == {"success"})
    assert len(vision.calls) == 2
    assert tag_names(server.details(file["fileId"])) == ["Cat", "Animal"]


def test_zero_days_keep_nothing(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG, result_ttl_days=0)
    assert [upload(server)["extensionStatus"] for _ in range(3)] == [DONE] * 3
    assert len(vision.calls) == 3
    assert server.rows(select(answers)) == []
    assert used(server) == (3, 0, 0)


def test_expired_answer_is_asked_for_again(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    upload(server)
    server.write(lambda tx: tx.execute(update(answers).values(expires_at=tx.now(-1))).rowcount)
    vision.labels = [("Dog", 90.0)]
    assert tag_names(upload(server)) == ["Dog"]
    assert tag_names(upload(server)) == ["Dog"]
    assert len(vision.calls) == 2


def test_expired_answers_are_forgotten(server: LoupeServer) -> None:
    def put(tx: Tx) -> None:
        for number in range(-2, 3):
            row = {"labels": [], "created_at": tx.clock.now(), "expires_at": tx.now(number * 60)}
            tx.execute(insert(answers).values(key=f"key {number}", **row))

    server.write(put)
    assert server.write(forget_expired_answers) == 3
    assert {row.key for row in server.rows(select(answers))} == {"key 1", "key 2"}


def test_each_provider_and_each_answer_version_is_asked_itself(
    serve: Serve,
    vision: VisionEmulator,
    rekognition: RekognitionEmulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serve(
        google_auto_tagging="vision", aws_auto_tagging="rekognition", sync_budget_seconds=LONG
    )
    upload(server, 0, GOOGLE, AWS)
    assert (len(vision.calls), len(rekognition.calls)) == (1, 1)
    server.stop()
    monkeypatch.setattr(Vision, "ANSWER_VERSION", Vision.ANSWER_VERSION + 1)
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    upload(server)
    assert len(vision.calls) == 2


def test_local_tagger_keeps_and_counts_nothing(serve: Serve) -> None:
    server = serve(google_auto_tagging="local", google_monthly_calls=1, sync_budget_seconds=LONG)
    assert [upload(server)["extensionStatus"] for _ in range(3)] == [DONE] * 3
    assert server.rows(select(answers)) == []
    assert used(server) == (0, 0, 0)


def test_run_that_finds_the_call_held_finishes_from_its_answer_with_its_own_limits_and_webhook(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, sync_budget_seconds=0.3)
    vision.hold()
    with Receiver() as receiver:
        files = [
            upload(
                servers[number % len(servers)],
                extensions=wanting(GOOGLE, max_tags=number + 1),
                webhookUrl=receiver.url_for(f"/{number}"),
            )
            for number in range(2)
        ]
        assert [file["extensionStatus"] for file in files] == [WAITS] * 2
        vision.release()
        told = {event.path: event.json() for event in receiver.wait_for(2)}
    for number, file in enumerate(files):
        event = told[f"/{number}"]
        assert event["status"] == "SUCCESS"
        assert event["fileObject"]["fileId"] == file["fileId"]
        assert tag_names(event["fileObject"]) == ["Cat", "Animal"][: number + 1]
    assert len(vision.calls) == 1
    assert used(servers[0]) == (1, 1, 0)


def test_held_call_is_waited_for_within_the_budget(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    vision.hold()
    with ThreadPoolExecutor(2) as pool:
        uploads = [pool.submit(upload, server) for _ in range(2)]
        vision.wait_for_calls(1)
        time.sleep(0.3)
        assert not any(each.done() for each in uploads)
        vision.release()
        assert [each.result(LONG)["extensionStatus"] for each in uploads] == [DONE] * 2
    assert len(vision.calls) == 1


def test_claim_of_a_dead_process_is_taken_over(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    upload(server)
    (kept,) = server.rows(select(answers.c.key))

    def claim_as_if_by_another(tx: Tx) -> None:
        tx.execute(delete(answers))
        lease = {"lease_until": tx.now(1), "lease_owner": "dead"}
        tx.execute(insert(answers).values(key=kept.key, created_at=tx.clock.now(), **lease))

    server.write(claim_as_if_by_another)
    started = time.monotonic()
    assert upload(server)["extensionStatus"] == DONE
    assert time.monotonic() - started > 0.8
    assert len(vision.calls) == 2


def test_late_answer_of_a_process_that_lost_its_claim_is_not_kept(server: LoupeServer) -> None:
    def claim_with_lease(tx: Tx) -> Granted:
        granted = admit(tx, POLICY, "key", "frozen")
        assert isinstance(granted, Granted)
        tx.execute(update(answers).values(lease_until=tx.now(-1)))
        return granted

    server.write(lambda tx: make_slots(tx, POLICY))
    granted = server.write(claim_with_lease)
    assert isinstance(server.write(lambda tx: admit(tx, POLICY, "key", "other")), Granted)
    late = Answer([Label("Late", 50.0)])
    server.write(lambda tx: record_answer(tx, POLICY, granted, late))
    error = ProviderError(Reason.TIMEOUT, "Late.")
    server.write(lambda tx: record_failure(tx, POLICY, granted, error))
    (row,) = server.rows(select(answers))
    assert (row.labels, row.lease_owner) == (None, "other")


def test_claim_that_could_not_be_ended_ends_by_itself(serve: Serve, vision: VisionEmulator) -> None:
    """Nobody renews it: it lasts as long as a call can."""
    server = serve(google_auto_tagging="vision", provider_timeout_seconds=2, sync_budget_seconds=0)
    vision.hold()
    upload(server)
    vision.wait_for_calls(1)
    (claim,) = server.rows(select(answers))
    assert claim.labels is None
    assert timedelta(seconds=2) < claim.lease_until - claim.created_at < timedelta(seconds=30)
    vision.release()


def test_run_given_up_while_it_is_admitted_leaves_no_claim_and_no_unit(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", google_monthly_calls=9, sync_budget_seconds=LONG)
    upload(server)
    db, tagger = server.resources.db, server.resources.tagger

    def hold_the_state(tx: Tx) -> None:
        tx.execute(select(provider_states).with_for_update())
        time.sleep(0.5)

    async def copy() -> ProviderCopy:
        return ProviderCopy(picture(1), 90, 90, 90, 90, 0.0)

    async def give_up_meanwhile() -> None:
        holding = asyncio.create_task(db.write(hold_the_state))
        await asyncio.sleep(0.15)
        attempt = asyncio.create_task(tagger.attempt(TaggingRequest(GOOGLE, 5, 3), copy))
        await asyncio.sleep(0.15)
        attempt.cancel()
        await holding
        with pytest.raises(asyncio.CancelledError):
            await attempt

    server.run(give_up_meanwhile())
    assert used(server) == (1, 0, 0)
    assert len(server.rows(select(answers))) == 1
    assert len(vision.calls) == 1
    assert upload(server, 1)["extensionStatus"] == DONE


# The cap


def test_200_parallel_uploads_with_50_left_make_exactly_50_calls(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(
        serve,
        database_url,
        sync_budget_seconds=60,
        google_monthly_calls=50,
        max_concurrent_uploads=400,
    )
    answered = upload_all(servers, list(range(200)))
    assert answered.count(DONE) == 50
    assert answered.count(WAITS) == 150
    assert len(vision.calls) == 50
    assert used(servers[0]) == (50, 0, 150)


def test_stored_answers_are_still_had_when_the_cap_is_reached(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", google_monthly_calls=1, sync_budget_seconds=LONG)
    got = [upload(server, number)["extensionStatus"] for number in (0, 1, 0)]
    assert got == [DONE, WAITS, DONE]
    assert used(server) == (1, 1, 1)


def test_cap_of_one_provider_leaves_the_other_alone(
    serve: Serve, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = serve(
        google_auto_tagging="vision",
        aws_auto_tagging="rekognition",
        google_monthly_calls=1,
        sync_budget_seconds=LONG,
    )
    upload(server, 0, GOOGLE)
    assert upload(server, 1, GOOGLE, AWS)["extensionStatus"] == {GOOGLE: "pending", AWS: "success"}


def test_beyond_the_cap_runs_fail_at_once_where_the_operator_wants_it(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(
        google_auto_tagging="vision",
        google_monthly_calls=1,
        budget_exhausted="failed",
        sync_budget_seconds=LONG,
    )
    assert [upload(server, n)["extensionStatus"] for n in (0, 1)] == [DONE, FAILS]
    (failed,) = server.rows(select(runs).where(runs.c.status == "failed"))
    assert failed.reason == "budget"
    assert len(vision.calls) == 1


def test_refused_connection_gives_its_unit_back(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with VisionEmulator() as closed:
        port = closed.port
    monkeypatch.setenv("LOUPE_VISION_ENDPOINT", f"127.0.0.1:{port}")
    monkeypatch.setenv("LOUPE_VISION_INSECURE", "true")
    server = serve(google_auto_tagging="vision", google_monthly_calls=1, sync_budget_seconds=LONG)
    assert upload(server)["extensionStatus"] == WAITS
    with VisionEmulator(port=port) as vision:
        until(lambda: statuses(server) == {"success"})
        assert used(server)[0] == 1
        assert len(vision.calls) == 1


def test_throttled_call_gives_its_unit_back(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", google_monthly_calls=1, sync_budget_seconds=LONG)
    vision.faults.extend(["throttle"] * 3)
    assert upload(server)["extensionStatus"] == WAITS
    until(lambda: statuses(server) == {"success"})
    assert len(vision.calls) == 4
    assert used(server)[0] == 1


def test_call_that_timed_out_keeps_its_unit(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(
        google_auto_tagging="vision",
        google_monthly_calls=1,
        provider_timeout_seconds=0.5,
        sync_budget_seconds=LONG,
    )
    vision.faults.append("hang")
    assert upload(server)["extensionStatus"] == WAITS
    assert used(server)[0] == 1
    until(lambda: used(server)[2] == 1)
    (run,) = server.rows(select(runs))
    assert (run.status, run.reason) == ("pending", "budget")
    assert len(vision.calls) == 1


def test_call_that_a_stop_cuts_short_keeps_its_unit_and_no_claim(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", google_monthly_calls=9, sync_budget_seconds=1)
    vision.hold()
    assert upload(server)["extensionStatus"] == WAITS
    vision.wait_for_calls(1)
    server.stop()
    again = serve()
    assert used(again) == (1, 0, 0)
    assert again.rows(select(answers)) == []
    assert held_slots(again) == []


def test_aws_has_a_cap_and_a_rate_of_its_own(
    serve: Serve, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = serve(
        google_auto_tagging="vision",
        aws_auto_tagging="rekognition",
        aws_monthly_calls=2,
        aws_calls_per_second=2,
        sync_budget_seconds=LONG,
    )
    got = [upload(server, n, GOOGLE, AWS)["extensionStatus"] for n in range(3)]
    assert [each[GOOGLE] for each in got] == ["success"] * 3
    assert [each[AWS] for each in got] == ["success", "success", "pending"]
    first, second = rekognition.calls
    assert second.at_seconds - first.at_seconds > 0.4
    assert used(server, AWS) == (2, 0, 1)


class MovedClock(Clock):
    """Runs as fast as any other; its wall clock starts where it is set."""

    def __init__(self, wall: datetime) -> None:
        super().__init__()
        self.set(wall)

    def set(self, wall: datetime) -> None:
        self._ahead = wall - datetime.now(UTC)

    def wall(self) -> datetime:
        return datetime.now(UTC) + self._ahead


def test_cap_begins_anew_with_the_month(serve: Serve, vision: VisionEmulator) -> None:
    clock = MovedClock(datetime(2030, 1, 31, 12, tzinfo=UTC))
    server = serve(
        clock=clock, google_auto_tagging="vision", google_monthly_calls=1, sync_budget_seconds=LONG
    )
    assert upload(server, 0)["extensionStatus"] == DONE
    clock.set(datetime(2030, 1, 31, 23, 59, 58, tzinfo=UTC))
    assert upload(server, 1)["extensionStatus"] == WAITS
    assert len(vision.calls) == 1
    until(lambda: statuses(server) == {"success"})
    counted = {row.day: (row.calls, row.refused) for row in server.rows(select(usage))}
    assert counted == {date(2030, 1, 31): (1, 1), date(2030, 2, 1): (1, 0)}


def test_wait_for_the_next_month_does_not_count_against_the_24_hours(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(
        clock=MovedClock(datetime(2030, 1, 10, tzinfo=UTC)),
        google_auto_tagging="vision",
        google_monthly_calls=1,
        sync_budget_seconds=LONG,
    )
    for number in range(2):
        upload(server, number)
    (run,) = server.rows(select(runs).where(runs.c.status == "pending"))
    assert (run.reason, run.attempts) == ("budget", 0)
    a_minute = timedelta(minutes=1)
    assert abs(run.due_at - run.created_at - timedelta(days=22)) < a_minute
    assert abs(run.expires_at - run.due_at - timedelta(hours=24)) < a_minute


JANUARY = datetime(2030, 1, 10, tzinfo=UTC)


def waiting_for_february(serve: Serve, *, count: int) -> None:
    """One call is made and all others are put off; then the server stops."""
    server = serve(
        clock=MovedClock(JANUARY),
        google_auto_tagging="vision",
        google_monthly_calls=1,
        sync_budget_seconds=LONG,
    )
    assert [upload(server, n)["extensionStatus"] for n in range(1 + count)] == [
        DONE,
        *[WAITS] * count,
    ]
    server.stop()


@pytest.mark.parametrize("cap", [{"google_monthly_calls": 3}, {"google_monthly_calls": 0}])
def test_raised_cap_makes_waiting_runs_due_at_the_next_start(
    serve: Serve, vision: VisionEmulator, cap: dict[str, int]
) -> None:
    waiting_for_february(serve, count=2)
    server = serve(clock=MovedClock(JANUARY), google_auto_tagging="vision", **cap)
    until(lambda: statuses(server) == {"success"})
    assert len(vision.calls) == 3
    assert used(server)[0] == 3
    for run in server.rows(select(runs)):
        assert abs(run.expires_at - run.created_at - timedelta(hours=24)) < timedelta(minutes=2)


def test_cap_of_another_provider_holds_no_run_back(serve: Serve, vision: VisionEmulator) -> None:
    waiting_for_february(serve, count=2)
    server = serve(clock=MovedClock(JANUARY), google_auto_tagging="local", google_monthly_calls=1)
    until(lambda: statuses(server) == {"success"})
    assert len(vision.calls) == 1


def test_cap_that_is_not_raised_leaves_runs_waiting(serve: Serve, vision: VisionEmulator) -> None:
    waiting_for_february(serve, count=2)
    server = serve(clock=MovedClock(JANUARY), google_auto_tagging="vision", google_monthly_calls=1)
    time.sleep(1.5)  # its background has looked
    assert used(server) == (1, 0, 2)
    for run in server.rows(select(runs).where(runs.c.status == "pending")):
        assert run.due_at - run.created_at > timedelta(days=21)
        assert run.expires_at - run.created_at > timedelta(days=22)


def test_cap_that_is_raised_a_little_lets_the_oldest_runs_go(
    serve: Serve, vision: VisionEmulator
) -> None:
    waiting_for_february(serve, count=3)
    server = serve(clock=MovedClock(JANUARY), google_auto_tagging="vision", google_monthly_calls=3)
    vision.wait_for_calls(3)
    until(lambda: [run.status for run in oldest_first(server)] == ["success"] * 3 + ["pending"])
    assert used(server) == (3, 0, 3)  # the one left is not refused again


def test_time_that_a_run_has_waited_for_the_month_does_not_count_when_the_cap_is_raised(
    server: LoupeServer,
) -> None:
    """Put off 10 days ago for 22, with 5 of its 24 hours left."""

    def resume(tx: Tx) -> None:
        now, due_at, expires_at = tx.execute(
            select(tx.now(), tx.now(12 * 86400), tx.now(12 * 86400 + 5 * 3600))
        ).one()
        put_run(tx, "waiting", created_at=now, due_at=due_at, expires_at=expires_at)
        put_run(tx, "other", created_at=now, due_at=due_at, expires_at=expires_at, reason="other")
        resume_runs(tx, POLICY)

    server.write(resume)
    rows = {run.id: run for run in server.rows(select(runs))}
    assert rows["waiting"].expires_at - rows["waiting"].due_at == pytest.approx(
        timedelta(hours=5), abs=timedelta(seconds=1)
    )
    assert rows["waiting"].due_at - rows["waiting"].created_at < timedelta(minutes=1)
    assert rows["other"].due_at - rows["other"].created_at > timedelta(days=11)


def put_run(tx: Tx, run_id: str, **values: Any) -> None:
    """A run that waits."""
    columns = {
        "id": run_id,
        "file_id": run_id,
        "version_id": run_id,
        "extension": GOOGLE,
        "number": 1,
        "min_confidence": 0,
        "max_tags": 1,
        "announced": True,
        "status": "pending",
        "reason": "budget",
        "attempts": 0,
        "garbled_replies": 0,
        "request_id": "r",
    }
    tx.execute(insert(runs).values(**{**columns, **values}))


def oldest_first(server: LoupeServer) -> Sequence[Row[Any]]:
    return server.rows(select(runs).order_by(runs.c.created_at))


# The rate


def test_calls_keep_to_the_rate_over_all_replicas(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, google_calls_per_second=5, sync_budget_seconds=LONG)
    assert upload_all(servers, list(range(6))) == [DONE] * 6
    times = sorted(call.at_seconds for call in vision.calls)
    assert len(times) == 6
    assert times[-1] - times[0] > 5 * 0.2 - 0.15


def test_calls_beyond_the_rate_go_on_in_the_background(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", google_calls_per_second=4, sync_budget_seconds=0.1)
    assert upload_all([server], list(range(5))).count(WAITS) >= 3
    until(lambda: statuses(server) == {"success"})
    times = sorted(call.at_seconds for call in vision.calls)
    assert len(times) == 5
    assert times[-1] - times[0] > 4 * 0.25 - 0.15
    assert {run.attempts for run in server.rows(select(runs))} <= {1, 2}


# Slots


def test_calls_in_flight_keep_to_the_concurrency_over_all_replicas(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, provider_concurrency=3, sync_budget_seconds=LONG)
    vision.delay_seconds = 0.2
    assert upload_all(servers, list(range(12))) == [DONE] * 12
    assert vision.max_in_flight == 3
    assert len(vision.calls) == 12
    assert held_slots(servers[0]) == []


def test_requests_that_find_no_slot_in_their_budget_are_finished_in_the_background(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, provider_concurrency=2, sync_budget_seconds=0.5)
    vision.hold()
    assert upload_all(servers, list(range(6))) == [WAITS] * 6
    assert len(vision.calls) == 2
    time.sleep(1.5)  # the background looks, and finds no slot either
    assert len(vision.calls) == 2
    vision.release()
    until(lambda: statuses(servers[0]) == {"success"})
    assert vision.max_in_flight == 2
    assert len(vision.calls) == 6


@on_postgres
def test_background_takes_half_of_the_slots_over_all_replicas_and_requests_find_the_rest(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, provider_concurrency=4, sync_budget_seconds=0)
    patient = serve(google_auto_tagging="vision", provider_concurrency=4, sync_budget_seconds=LONG)
    vision.hold()
    for number in range(8):
        upload(servers[number % 2], number)
    vision.wait_for_calls(2)
    time.sleep(1.5)  # three processes have looked for more
    assert len(vision.calls) == 2
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(upload, patient, number) for number in range(8, 11)]
        vision.wait_for_calls(4)
        vision.release()
        assert [each.result(LONG)["extensionStatus"] for each in asked] == [DONE] * 3
    until(lambda: statuses(patient) == {"success"})
    assert vision.max_in_flight == 4
    assert len(vision.calls) == 11


@on_postgres
def test_run_that_finds_no_slot_in_the_background_is_put_off_and_leaves_nothing(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", provider_concurrency=2)
    server.write(hold_all_slots)
    outcome = server.run(server.resources.tagger.attempt(TaggingRequest(GOOGLE, 5, 3), a_copy))
    assert isinstance(outcome, NotNow)
    assert not outcome.extends_deadline
    assert vision.calls == []
    assert used(server) == (0, 0, 0)
    assert server.rows(select(answers)) == []


@on_postgres
def test_background_claims_no_more_runs_than_there_are_free_slots(server: LoupeServer) -> None:
    calls = Calls(server, concurrency=6)
    assert calls.background_may_make() == 3
    granted = [calls.start(in_background=True) for _ in range(3)]
    assert [each.slot.number for each in granted if each.slot] == [2, 1, 0]
    assert isinstance(calls.ask(in_background=True), NoSlot)
    assert calls.background_may_make() == 0
    requests = [calls.start() for _ in range(3)]
    assert [each.slot.number for each in requests if each.slot] == [5, 4, 3]
    assert isinstance(calls.ask(), NoSlot)
    calls.end(granted[0])
    assert calls.background_may_make() == 1


@on_postgres
def test_extension_without_slots_is_claimed_up_to_its_limit(server: LoupeServer) -> None:
    assert server.write(lambda tx: callable_now(tx, {AWS: 3}, 3)) == {AWS: 3}


@on_postgres
def test_slot_of_a_dead_process_is_free_when_its_call_can_last_no_longer(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", provider_concurrency=1, sync_budget_seconds=LONG)
    server.write(lambda tx: hold_all_slots(tx, seconds=1))
    started = time.monotonic()
    assert upload(server)["extensionStatus"] == DONE
    assert time.monotonic() - started > 0.8


@on_postgres
def test_call_that_outlived_its_slot_does_not_free_it_for_the_next_one(
    server: LoupeServer,
) -> None:
    calls = Calls(server, concurrency=1)
    late = calls.start()
    server.write(lambda tx: hold_all_slots(tx, seconds=-1))
    calls.start()
    calls.end(late)
    assert isinstance(calls.ask(), NoSlot)


@on_postgres
def test_replicas_that_disagree_take_slots_up_to_their_own_number(server: LoupeServer) -> None:
    few, many = Calls(server, concurrency=1), Calls(server, concurrency=3)
    few.start()
    assert isinstance(few.ask(), NoSlot)
    assert [type(many.ask()) for _ in range(3)] == [Granted, Granted, NoSlot]


@on_sqlite
def test_one_process_has_no_slots(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    assert upload(server)["extensionStatus"] == DONE
    assert server.rows(select(slots)) == []


class Calls:
    """Calls to one provider, each about another picture."""

    def __init__(self, server: LoupeServer, *, concurrency: int) -> None:
        self._server = server
        self._limits = CallLimits(10, concurrency)
        self._policy = replace(POLICY, limits=self._limits)
        server.write(lambda tx: make_slots(tx, self._policy))

    def ask(self, *, in_background: bool = False) -> Admission:
        key = f"key {next(_NUMBERS)}"
        return self._server.write(
            lambda tx: admit(tx, self._policy, key, "owner", in_background=in_background)
        )

    def start(self, *, in_background: bool = False) -> Granted:
        granted = self.ask(in_background=in_background)
        assert isinstance(granted, Granted)
        return granted

    def end(self, granted: Granted) -> None:
        self._server.write(lambda tx: record_answer(tx, self._policy, granted, Answer([])))

    def background_may_make(self) -> int:
        slots = self._limits.background_slots
        return self._server.write(lambda tx: callable_now(tx, {GOOGLE: slots}, slots))[GOOGLE]


async def a_copy() -> ProviderCopy:
    return ProviderCopy(picture(), 90, 90, 90, 90, 0.0)


def hold_all_slots(tx: Tx, *, seconds: float = 3600) -> None:
    """As if calls of other processes were under way."""
    tx.execute(update(slots).values(lease_until=tx.now(seconds), lease_owner="others"))


def held_slots(server: LoupeServer) -> list[int]:
    held = select(slots.c.number).where(slots.c.lease_owner.is_not(None))
    return [row.number for row in server.rows(held)]


# The breaker

_NUMBERS = count()
LIMITS = CallLimits(timeout_seconds=10, concurrency=40)
POLICY = CallPolicy(GOOGLE, "vision:1", 3600, LIMITS, 0, 0, BudgetExhausted.PENDING)


class Breaker:
    """One provider's breaker. Each question is about another picture."""

    def __init__(self, server: LoupeServer, policy: CallPolicy = POLICY) -> None:
        self._server = server
        self._policy = policy
        server.write(lambda tx: make_slots(tx, policy))

    def ask(self) -> Admission:
        key = f"key {next(_NUMBERS)}"
        return self._server.write(lambda tx: admit(tx, self._policy, key, "owner"))

    def fail(self, granted: Admission, reason: Reason = Reason.UNAVAILABLE) -> None:
        assert isinstance(granted, Granted)
        error = ProviderError(reason, "It failed.")
        self._server.write(lambda tx: record_failure(tx, self._policy, granted, error))

    def succeed(self) -> None:
        granted = self.ask()
        assert isinstance(granted, Granted)
        self._server.write(lambda tx: record_answer(tx, self._policy, granted, Answer([])))

    def cool_down(self) -> None:
        """As if the time until the next probe were over."""
        over = update(provider_states)
        self._server.write(lambda tx: tx.execute(over.values(opened_until=tx.now(-0.1))).rowcount)

    @property
    def cooldown_seconds(self) -> float:
        (state,) = self._server.rows(select(provider_states))
        return float(state.cooldown_seconds)

    @property
    def is_open(self) -> bool:
        (state,) = self._server.rows(select(provider_states))
        return state.opened_until is not None

    def callable(self) -> int:
        return self._server.write(lambda tx: callable_now(tx, {GOOGLE: 8}, 8))[GOOGLE]


@pytest.fixture
def breaker(server: LoupeServer) -> Breaker:
    return Breaker(server)


def test_breaker_opens_after_five_transient_failures_in_a_row(breaker: Breaker) -> None:
    for _ in range(4):
        breaker.fail(breaker.ask())
    assert not breaker.is_open
    breaker.succeed()
    for _ in range(4):
        breaker.fail(breaker.ask(), Reason.TIMEOUT)
    breaker.fail(breaker.ask(), Reason.IMAGE_REJECTED)
    for _ in range(4):
        breaker.fail(breaker.ask(), Reason.BAD_REPLY)
    assert not breaker.is_open
    breaker.fail(breaker.ask(), Reason.THROTTLED)
    assert breaker.is_open
    refused = breaker.ask()
    assert isinstance(refused, NotNow)
    assert 0 < refused.seconds <= 2
    assert refused.reason is Reason.THROTTLED
    assert breaker.callable() == 0


def test_cool_down_doubles_from_2_to_30_seconds_with_one_probe_each(breaker: Breaker) -> None:
    for _ in range(5):
        breaker.fail(breaker.ask())
    for seconds in (2, 4, 8, 16, 30, 30):
        assert breaker.cooldown_seconds == seconds
        assert isinstance(breaker.ask(), NotNow)
        breaker.cool_down()
        assert breaker.callable() == 1
        probe = breaker.ask()
        assert isinstance(probe, Granted)
        assert probe.is_probe
        assert isinstance(breaker.ask(), NotNow)
        assert breaker.callable() == 0
        breaker.fail(probe)
    breaker.cool_down()
    breaker.succeed()
    assert not breaker.is_open
    assert breaker.callable() == 8
    assert isinstance(breaker.ask(), Granted)


def test_of_all_replicas_one_makes_the_probe(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    breakers = [Breaker(server) for server in replicas(serve, database_url)]
    for granted in [breakers[0].ask() for _ in range(5)]:
        breakers[0].fail(granted)
    breakers[0].cool_down()
    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(lambda n: breakers[n % len(breakers)].ask(), range(16)))
    assert sorted(type(each).__name__ for each in asked) == ["Granted"] + ["NotNow"] * 15


def test_calls_that_were_under_way_when_it_opened_do_not_lengthen_the_cool_down(
    breaker: Breaker,
) -> None:
    for granted in [breaker.ask() for _ in range(16)]:
        breaker.fail(granted)
    assert breaker.cooldown_seconds == 2


def test_probe_that_the_provider_answers_by_refusing_the_picture_closes_the_breaker(
    breaker: Breaker,
) -> None:
    for _ in range(5):
        breaker.fail(breaker.ask())
    breaker.cool_down()
    breaker.fail(breaker.ask(), Reason.IMAGE_REJECTED)
    assert not breaker.is_open


def test_probe_that_the_rate_or_the_cap_holds_back_is_not_used_up(server: LoupeServer) -> None:
    slow = Breaker(server, replace(POLICY, calls_per_second=0.01))
    granted = slow.ask()
    for _ in range(5):
        slow.fail(granted)
    slow.cool_down()
    assert [type(slow.ask()) for _ in range(2)] == [TooSoon] * 2
    assert slow.callable() == 1
    spent = Breaker(server, replace(POLICY, monthly_calls=1))
    assert [type(spent.ask()) for _ in range(2)] == [NotNow] * 2
    assert spent.callable() == 1
    assert isinstance(Breaker(server).ask(), Granted)


def test_bad_credentials_open_at_once_and_hold_no_run_back(breaker: Breaker) -> None:
    breaker.fail(breaker.ask(), Reason.CREDENTIALS)
    refused = breaker.ask()
    assert isinstance(refused, Failed)
    assert refused.reason is Reason.CREDENTIALS
    assert breaker.callable() == 8


def test_admission_tells_a_held_call_from_a_stored_answer(server: LoupeServer) -> None:
    def ask(tx: Tx) -> Admission:
        return admit(tx, POLICY, "key", "owner")

    server.write(lambda tx: make_slots(tx, POLICY))
    granted = server.write(ask)
    assert isinstance(granted, Granted)
    assert isinstance(server.write(ask), Held)
    answer = Answer([Label("Cat", 98.5)], "3.0")
    server.write(lambda tx: record_answer(tx, POLICY, granted, answer))
    assert server.write(ask) == answer


def test_dead_provider_costs_few_calls_delays_nobody_and_its_backlog_drains_by_itself(
    serve: Serve,
    database_url: str,
    vision: VisionEmulator,
    rekognition: RekognitionEmulator,
) -> None:
    servers = replicas(
        serve, database_url, aws_auto_tagging="rekognition", sync_budget_seconds=LONG
    )
    vision.fault = "unavailable"
    for number in range(5):
        assert upload(servers[0], number)["extensionStatus"] == WAITS
    until(lambda: any(row.opened_until for row in servers[0].rows(select(provider_states))))
    started, called = time.monotonic(), len(vision.calls)
    for number in range(5, 25):
        statuses_now = upload(servers[number % len(servers)], number, GOOGLE, AWS)
        assert statuses_now["extensionStatus"] == {GOOGLE: "pending", AWS: "success"}
    seconds = time.monotonic() - started
    assert seconds < 15
    assert len(vision.calls) - called <= 1 + seconds / 2
    waiting = servers[0].rows(select(runs).where(runs.c.status == "pending"))
    assert len(waiting) == 25
    assert sum(run.attempts for run in waiting) <= len(vision.calls)
    vision.fault = None
    until(lambda: statuses(servers[0]) == {"success"})
    attempts = servers[0].rows(select(runs.c.attempts).where(runs.c.extension == GOOGLE))
    assert sum(row.attempts for row in attempts) == len(vision.calls)
    assert len(rekognition.calls) == 20


def test_bad_credentials_fail_later_runs_without_a_call_until_a_probe_passes(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, sync_budget_seconds=LONG)
    vision.fault = "credentials"
    assert upload(servers[0], 0)["extensionStatus"] == FAILS
    keep_open(servers[0])
    vision.fault = None
    assert [upload(servers[-1], n)["extensionStatus"] for n in (1, 2)] == [FAILS] * 2
    assert {run.reason for run in servers[0].rows(select(runs))} == {"provider_credentials"}
    assert len(vision.calls) == 1
    keep_open(servers[0], seconds=-1)
    assert [upload(servers[-1], n)["extensionStatus"] for n in (3, 4)] == [DONE] * 2
    assert len(vision.calls) == 3


def keep_open(server: LoupeServer, *, seconds: float = 3600) -> None:
    """Puts the next probe off, so that a slow machine makes none meanwhile."""
    statement = update(provider_states)
    server.write(lambda tx: tx.execute(statement.values(opened_until=tx.now(seconds))).rowcount)


def test_runs_that_waited_fail_at_once_when_credentials_turn_bad(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    vision.fault = "unavailable"
    for number in range(5):
        upload(server, number)
    vision.fault = "credentials"
    until(lambda: statuses(server) == {"failed"})
    assert {run.reason for run in server.rows(select(runs))} == {"provider_credentials"}


def test_wait_for_the_breaker_does_not_outlast_the_deadline(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=LONG)
    vision.fault = "unavailable"
    for number in range(5):
        upload(server, number)
    until(lambda: any(row.opened_until for row in server.rows(select(provider_states))))
    server.write(lambda tx: tx.execute(update(runs).values(expires_at=tx.now(-1))).rowcount)
    until(lambda: statuses(server) == {"failed"})
    assert {run.reason for run in server.rows(select(runs))} == {"provider_unavailable"}


def test_usage_is_read_where_it_is_shared(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    servers = replicas(serve, database_url, sync_budget_seconds=LONG)
    for number, server in enumerate(servers):
        upload(server, number)
    today = datetime.now(UTC).date()
    span = {"startDate": today - timedelta(days=1), "endDate": today + timedelta(days=2)}
    for server in servers:
        answer: httpx.Response = server.client.get(
            "/v1/accounts/usage", params={name: str(day) for name, day in span.items()}
        )
        assert answer.json()["extensions"][GOOGLE]["calls"] == len(servers)
