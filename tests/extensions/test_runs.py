"""The transactions of runs and the rules of trying again, on both databases."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Row, select, update

from app.db import Tx
from app.extensions import runs as transactions
from app.extensions.models import runs
from app.extensions.outcomes import Failed, Outcome, Succeeded, TryAgain
from app.extensions.provider import RETRYABLE, Reason
from app.extensions.schemas import AWS, GOOGLE, parse_extensions
from tests.test_db import Running

VERSION = "v" * 24
SUCCEEDED = Succeeded([], "vision", 7)
GARBLED = TryAgain(Reason.BAD_REPLY, "Unreadable.", None, "vision", 7)
THROTTLED = TryAgain(Reason.THROTTLED, "Throttled.", None, "vision", 7)
DELETED = Failed(Reason.FILE_DELETED, "Deleted.")


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


class Runs:
    def __init__(self, running: Running) -> None:
        self._running = running

    def write(self, function: Any) -> Any:
        return self._running.run(self._running.db.write(function))

    def start(self, *extensions: str, version_id: str = VERSION, owner: str = "me") -> list[str]:
        """The ids of new runs of one request."""
        wanted = [
            {"name": name, "minConfidence": 12.5, "maxTags": 3} for name in extensions or (GOOGLE,)
        ]
        started = self.write(
            lambda tx: transactions.start_runs(
                tx,
                parse_extensions(wanted),
                file_id="f",
                version_id=version_id,
                webhook_url="http://h",
                owner=owner,
                request_id="r",
            )
        )
        return [run.id for run in started]

    def row(self, run_id: str) -> Row[Any]:
        statement = select(runs).where(runs.c.id == run_id)
        return self._running.run(self._running.db.read(lambda tx: tx.execute(statement).one()))

    def finish(self, run_id: str, outcome: Outcome, attempt: int | None = None) -> Row[Any] | None:
        counts = self.row(run_id).attempts if attempt is None else attempt
        found: Row[Any] | None = self.write(
            lambda tx: transactions.finish_run(tx, run_id, counts, outcome)
        )
        return found

    def change(self, run_id: str, **values: Any) -> None:
        def write(tx: Tx) -> None:
            tx.execute(update(runs).where(runs.c.id == run_id).values(**values))

        self.write(write)

    def let_deadline_pass(self, run_id: str) -> None:
        self.change(run_id, expires_at=self.row(run_id).created_at - timedelta(seconds=1))

    def take_over(self, owner: str = "other") -> list[Row[Any]]:
        """Claims all that is pending, as if it were due and its leases had run out."""

        def claim(tx: Tx) -> list[Row[Any]]:
            tx.execute(update(runs).values(due_at=tx.now(-1), lease_until=None))
            return transactions.claim_runs(tx, owner, {GOOGLE: 100, AWS: 100}, 8)

        found: list[Row[Any]] = self.write(claim)
        return found


@pytest.fixture
def store(running: Running) -> Runs:
    return Runs(running)


# Born


def test_run_is_born_pending_leased_and_with_its_limits(store: Runs) -> None:
    run = store.row(store.start(GOOGLE)[0])
    assert (run.status, run.attempts, run.lease_owner, run.announced) == ("pending", 1, "me", False)
    assert (run.min_confidence, run.max_tags, run.webhook_url) == (12.5, 3, "http://h")
    assert 10 < (run.lease_until - run.created_at).total_seconds() < 20
    assert abs((run.expires_at - run.created_at).total_seconds() - 24 * 3600) < 5


def test_runs_of_one_version_and_extension_are_numbered(store: Runs) -> None:
    ids = [
        *store.start(GOOGLE, AWS),
        *store.start(GOOGLE),
        *store.start(GOOGLE, version_id="w"),
        *store.start(AWS, GOOGLE),
    ]
    assert [store.row(run_id).number for run_id in ids] == [1, 1, 2, 1, 2, 3]


def test_nothing_asked_for_is_nothing_started(store: Runs) -> None:
    assert (
        store.write(
            lambda tx: transactions.start_runs(
                tx, [], file_id="f", version_id="v", webhook_url=None, owner="me", request_id="r"
            )
        )
        == []
    )


# Finished


def test_success_is_final(store: Runs) -> None:
    [run_id] = store.start()
    ended = store.finish(run_id, SUCCEEDED)
    assert ended == store.row(run_id)
    assert (ended.status, ended.provider, ended.elapsed_ms) == ("success", "vision", 7)
    assert (ended.lease_until, ended.lease_owner, ended.reason) == (None, None, None)
    assert ended.finished_at is not None


def test_failure_is_final_with_its_reason(store: Runs) -> None:
    [run_id] = store.start()
    ended = store.finish(run_id, DELETED)
    assert ended is not None
    assert (ended.status, ended.reason, ended.last_error) == ("failed", "file_deleted", "Deleted.")


def test_success_after_failed_attempts_clears_their_reason(store: Runs) -> None:
    [run_id] = store.start()
    store.finish(run_id, THROTTLED)
    store.take_over()
    ended = store.finish(run_id, SUCCEEDED)
    assert ended is not None
    assert (ended.reason, ended.last_error) == (None, None)


@pytest.mark.parametrize("reason", sorted(RETRYABLE))
def test_attempt_that_is_to_be_made_again_leaves_the_run_pending_and_free(
    store: Runs, reason: Reason
) -> None:
    [run_id] = store.start()
    assert store.finish(run_id, TryAgain(reason, "Not now.", None, "vision", 7)) is None
    run = store.row(run_id)
    assert (run.status, run.reason, run.last_error) == ("pending", reason, "Not now.")
    assert (run.lease_until, run.lease_owner, run.finished_at) == (None, None, None)
    assert -1 < (run.due_at - run.created_at).total_seconds() < 3


def test_only_the_latest_attempt_counts_and_only_once(store: Runs) -> None:
    [run_id] = store.start()
    store.take_over()
    assert store.finish(run_id, SUCCEEDED, attempt=1) is None
    assert store.row(run_id).status == "pending"
    assert store.finish(run_id, DELETED, attempt=2) is not None
    assert store.finish(run_id, SUCCEEDED, attempt=2) is None
    assert store.row(run_id).status == "failed"


def test_third_unreadable_reply_in_a_row_is_final(store: Runs) -> None:
    [run_id] = store.start()
    for _ in range(2):
        assert store.finish(run_id, GARBLED) is None
        store.take_over()
    ended = store.finish(run_id, GARBLED)
    assert ended is not None
    assert (ended.status, ended.reason) == ("failed", "provider_reply")


def test_unreadable_replies_are_counted_anew_after_another_failure(store: Runs) -> None:
    [run_id] = store.start()
    for outcome in (GARBLED, GARBLED, THROTTLED, GARBLED, GARBLED):
        assert store.finish(run_id, outcome) is None
        store.take_over()
    assert store.finish(run_id, GARBLED) is not None


@pytest.mark.parametrize("retry_after", [100.0, 3600.0])
def test_what_the_vendor_asks_for_is_waited(store: Runs, retry_after: float) -> None:
    [run_id] = store.start()
    store.finish(run_id, TryAgain(Reason.THROTTLED, "Throttled.", retry_after))
    run = store.row(run_id)
    assert retry_after - 1 < (run.due_at - run.created_at).total_seconds() < retry_after + 30


@pytest.mark.parametrize("retry_after", [86_500.0, 1e12, 1e300])
def test_what_the_vendor_asks_for_does_not_outlast_the_deadline(
    store: Runs, retry_after: float
) -> None:
    [run_id] = store.start()
    assert store.finish(run_id, TryAgain(Reason.THROTTLED, "Throttled.", retry_after)) is None
    assert store.row(run_id).due_at == store.row(run_id).expires_at


def test_attempt_that_fails_after_the_deadline_is_the_last(store: Runs) -> None:
    [run_id] = store.start()
    store.let_deadline_pass(run_id)
    ended = store.finish(run_id, THROTTLED)
    assert ended is not None
    assert (ended.status, ended.reason) == ("failed", "provider_throttled")


def test_attempt_that_succeeds_after_the_deadline_counts(store: Runs) -> None:
    [run_id] = store.start()
    store.let_deadline_pass(run_id)
    ended = store.finish(run_id, SUCCEEDED)
    assert ended is not None
    assert ended.status == "success"


# Claimed


def test_claimed_run_is_announced_since_nobody_waits_for_it(store: Runs) -> None:
    [run_id] = store.start()
    [claimed] = store.take_over("other")
    assert (claimed.id, claimed.attempts, claimed.announced) == (run_id, 2, True)
    assert claimed.lease_owner == "other"


def test_each_extension_is_claimed_up_to_its_own_limit(store: Runs) -> None:
    for _ in range(3):
        store.start(GOOGLE, AWS)

    def claim(tx: Tx) -> list[str]:
        tx.execute(update(runs).values(lease_until=None))
        claimed = transactions.claim_runs(tx, "other", {GOOGLE: 2, AWS: 0}, 8)
        return [run.extension for run in claimed]

    assert store.write(claim) == [GOOGLE, GOOGLE]


# Ended from outside


def test_only_the_pending_runs_of_the_version_are_ended(store: Runs) -> None:
    [done] = store.start(GOOGLE)
    store.finish(done, SUCCEEDED)
    pending = store.start(GOOGLE, AWS)
    [elsewhere] = store.start(GOOGLE, version_id="w")
    ended = store.write(lambda tx: transactions.end_pending_runs(tx, VERSION, DELETED))
    assert sorted(run.id for run in ended) == sorted(pending)
    assert {store.row(run_id).reason for run_id in pending} == {"file_deleted"}
    assert store.row(done).status == "success"
    assert store.row(elsewhere).status == "pending"


# Told


def test_response_says_what_stands_and_marks_the_pending_ones(store: Runs) -> None:
    google, aws = store.start(GOOGLE, AWS)
    store.finish(google, SUCCEEDED)
    told = store.write(lambda tx: transactions.announce(tx, [google, aws], []))
    assert told == {GOOGLE: "success", AWS: "pending"}
    assert not store.row(google).announced
    assert store.row(aws).announced
    assert store.row(aws).lease_owner == "me"


def test_runs_given_back_are_free_at_once_and_an_ended_one_stays_ended(store: Runs) -> None:
    google, aws = store.start(GOOGLE, AWS)
    store.finish(google, DELETED)
    store.write(lambda tx: transactions.announce(tx, [google, aws], [google, aws]))
    assert (store.row(aws).lease_until, store.row(aws).lease_owner) == (None, None)
    assert store.row(google).status == "failed"
    claimed = store.write(lambda tx: transactions.claim_runs(tx, "other", {GOOGLE: 9, AWS: 9}, 8))
    assert [run.id for run in claimed] == [aws]


def test_older_run_is_superseded_by_a_newer_success_and_by_nothing_else(store: Runs) -> None:
    [first], [second], [third] = (store.start(GOOGLE) for _ in range(3))
    [other] = store.start(AWS)
    [elsewhere] = store.start(GOOGLE, version_id="w")

    def superseded(run_id: str) -> bool:
        row = store.row(run_id)
        found: bool = store.write(lambda tx: transactions.is_superseded(tx, row))
        return found

    for run_id in (other, elsewhere):
        store.finish(run_id, SUCCEEDED)
    store.finish(third, DELETED)
    assert not superseded(first)
    store.finish(second, SUCCEEDED)
    assert [superseded(run_id) for run_id in (first, second, third)] == [True, False, False]


def test_status_of_an_extension_is_that_of_its_latest_run_on_the_version(store: Runs) -> None:
    [first], [second] = (store.start(GOOGLE) for _ in range(2))
    store.start(AWS)
    store.start(GOOGLE, version_id="w")
    store.finish(second, DELETED)
    store.finish(first, SUCCEEDED)
    found = store.write(lambda tx: transactions.latest_statuses(tx, VERSION))
    assert found == {GOOGLE: "failed", AWS: "pending"}
