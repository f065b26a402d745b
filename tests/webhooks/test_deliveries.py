"""The transactions of deliveries, and the rules of when to try again, on both databases."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import Row, create_engine, delete, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from app import jobs
from app.db import Tx
from app.webhooks.deliveries import (
    DEADLINE_SECONDS,
    PER_HOST,
    claim_deliveries,
    delay_before,
    enqueue,
    give_up,
    host_of,
    is_expired,
    record_attempt,
    seconds_of,
    share_places,
)
from app.webhooks.models import attempts, deliveries
from tests.test_db import Running, Watched

SCHEDULE = (0.0, 10.0, 100.0)
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


class Outbox:
    def __init__(self, running: Running) -> None:
        self._running = running

    def write(self, function: Any) -> Any:
        return self._running.run(self._running.db.write(function))

    def add(self, *hosts: str, first_delay: float = 0) -> None:
        for host in hosts:
            self.write(lambda tx, host=host: put(tx, f"http://{host}/hook", first_delay))

    def claim(
        self, in_flight: dict[str, int] | None = None, limit: int = 100, last_host: str = ""
    ) -> list[Row[Any]]:
        found: list[Row[Any]] = self.write(
            lambda tx: claim_deliveries(tx, "me", in_flight or {}, limit, last_host)
        )
        return found

    def claim_one(self) -> Row[Any]:
        """The only delivery, whenever it is due."""
        self.write(
            lambda tx: (
                tx.execute(update(deliveries).values(due_at=tx.now(-1), lease_until=None)) and None
            )
        )
        [row] = self.claim()
        return row

    def record(self, delivery: Row[Any], **how: Any) -> None:
        self.write(lambda tx: record(tx, delivery, **how))

    @property
    def row(self) -> Row[Any]:
        return self.rows(select(deliveries))[0]

    def rows(self, statement: Any) -> list[Row[Any]]:
        return self._running.run(self._running.db.read(lambda tx: list(tx.execute(statement))))

    def seconds_until_due(self) -> float:
        return float((self.row.due_at - datetime.now(UTC)).total_seconds())


@pytest.fixture
def outbox(running: Running) -> Outbox:
    return Outbox(running)


def put(tx: Tx, url: str, first_delay: float = 0, run_id: str | None = None) -> None:
    enqueue(
        tx,
        run_id=run_id or f"{random.random()}",
        url=url,
        payload={"status": "SUCCESS", "name": "Bücher"},
        request_id="r",
        first_delay=first_delay,
    )


def record(tx: Tx, delivery: Row[Any], **how: Any) -> None:
    values = {
        "started_at": tx.clock.now(),
        "elapsed_ms": 12,
        "status_code": 500,
        "error": None,
        "reply_beginning": b"no",
        "retry_after": None,
        **how,
    }
    record_attempt(tx, delivery.id, delivery.attempts, SCHEDULE, **values)


# Written


def test_delivery_is_written_with_its_exact_body(outbox: Outbox) -> None:
    outbox.add("a.example:8080")
    row = outbox.row
    assert row.id.startswith("evt_")
    assert row.body == orjson.dumps({"status": "SUCCESS", "name": "Bücher"})
    assert (row.status, row.attempts, row.host) == ("pending", 0, "a.example:8080")


def test_end_of_a_run_is_told_once_whoever_writes_it(running: Running) -> None:
    running.run(running.db.write(put, "http://a", 0, "run"))
    with pytest.raises(IntegrityError):
        running.run(running.db.write(put, "http://a", 0, "run"))


def test_first_attempt_waits_as_the_schedule_says(outbox: Outbox) -> None:
    outbox.add("a", first_delay=100)
    assert 75 < outbox.seconds_until_due() < 121
    assert outbox.claim() == []


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://A.example/x", "a.example"),
        ("https://a.example:8443/x?y=z#f", "a.example:8443"),
        ("http://[::1]:80/", "[::1]:80"),
    ],
)
def test_hosts_are_counted_by_name_and_port(url: str, host: str) -> None:
    assert host_of(url) == host


# Claimed


def test_at_most_four_to_one_host_are_claimed_and_another_host_is_not_held_up(
    outbox: Outbox,
) -> None:
    outbox.add(*["slow"] * 6, "quick")
    hosts = [row.host for row in outbox.claim()]
    assert (hosts.count("slow"), hosts.count("quick")) == (PER_HOST, 1)


def test_what_is_in_flight_counts(outbox: Outbox) -> None:
    outbox.add(*["slow"] * 6, *["full"] * 2)
    hosts = [row.host for row in outbox.claim({"slow": 3, "full": PER_HOST})]
    assert hosts == ["slow"]


def test_limit_bounds_all_hosts_together(outbox: Outbox) -> None:
    outbox.add(*[f"{number}" for number in range(8)])
    assert len(outbox.claim(limit=3)) == 3
    assert len(outbox.claim()) == 5


def test_hosts_that_are_full_do_not_hide_one_that_is_free(outbox: Outbox) -> None:
    outbox.add(*["a", "b", "c"] * 2, "free")
    full = dict.fromkeys("abc", PER_HOST)
    assert [row.host for row in outbox.claim(full, limit=1)] == ["free"]


def test_places_go_one_by_one_to_the_host_with_the_fewest(outbox: Outbox) -> None:
    outbox.add(*["a", "b", "c"] * 5)
    hosts = [row.host for row in outbox.claim({"a": 2}, limit=6)]
    assert Counter(hosts) == {"a": 1, "b": 3, "c": 2}


def test_host_with_none_in_flight_comes_before_all_that_have(outbox: Outbox) -> None:
    in_flight = {f"{number:03}": 1 + number % 3 for number in range(150)}
    outbox.add(*in_flight, "newcomer")
    assert [row.host for row in outbox.claim(in_flight, limit=1)] == ["newcomer"]


def test_turns_go_round_so_that_no_backlog_starves_a_host(outbox: Outbox) -> None:
    """With one free place at a time, and more to do at every host than is ever done."""
    outbox.add(*["a", "b", "c", "d"] * 3)
    claimed = [""]
    for _ in range(8):
        [row] = outbox.claim(limit=1, last_host=claimed[-1])
        claimed.append(row.host)
    assert claimed[1:] == ["a", "b", "c", "d"] * 2


def test_turns_go_on_behind_a_host_that_has_nothing_left(outbox: Outbox) -> None:
    outbox.add("a", "b", "d")
    assert [row.host for row in outbox.claim(limit=2, last_host="c")] == ["d", "a"]


def test_all_places_are_given_while_anything_is_due() -> None:
    hosts = [f"{number}" for number in range(10)]
    assert share_places(hosts, {}, 100) == dict.fromkeys(hosts, PER_HOST)
    assert sum(share_places(hosts, {"3": 2}, 17).values()) == 17
    assert share_places([], {}, 5) == {}


def test_host_is_not_due_while_its_rows_wait_or_are_leased(outbox: Outbox) -> None:
    outbox.add("leased", "due")
    outbox.add(*["later"] * 3, first_delay=100)
    assert len(outbox.claim()) == 2
    outbox.add("due")
    assert [row.host for row in outbox.claim()] == ["due"]


# What a claim costs


class Work:
    """What the database did for the writes inside: SQLite's virtual machine instructions,
    PostgreSQL's rows read."""

    def __init__(self, tx: Tx) -> None:
        self._tx = tx
        self.amount = 0

    def __enter__(self) -> "Work":
        if self._tx.is_postgres:
            self.amount = -self._rows_read()
        else:
            self._watch(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        if self._tx.is_postgres:
            self.amount += self._rows_read()
        else:
            self._watch(None)

    def _count(self) -> int:
        self.amount += 1
        return 0

    def _watch(self, count: Callable[[], int] | None) -> None:
        self._tx._connection.connection.driver_connection.set_progress_handler(count, 1)  # type: ignore[union-attr]

    def _rows_read(self) -> int:
        read = text(
            "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables"
            " WHERE relname = 'webhook_deliveries'"
        )
        return int(self._tx.execute(read).scalar_one())


def fill(tx: Tx, host: str, count: int, due_in: float) -> None:
    """Many pending rows at once. due_in: seconds; negative for due ones."""
    row = {
        "url": f"http://{host}/",
        "host": host,
        "body": b"{}",
        "request_id": "r",
        "status": "pending",
        "attempts": 0,
        "created_at": tx.clock.now(),
        "due_at": tx.clock.now() + timedelta(seconds=due_in),
    }
    ids = [f"{host} {due_in} {number}" for number in range(count)]
    tx.execute(insert(deliveries), [{**row, "id": each, "run_id": each} for each in ids])


def analyze(running: Running) -> None:
    """As PostgreSQL's autovacuum would soon; SQLite has no statistics, here and in real use."""
    if running.url.startswith("postgresql"):
        engine = create_engine(running.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text("ANALYZE webhook_deliveries"))
        engine.dispose()


def work_of(running: Running, function: Callable[[Tx], object]) -> int:
    def measured(tx: Tx) -> int:
        with Work(tx) as work:
            function(tx)
        return work.amount

    return running.run(running.db.write(measured))


FULL = {"full": PER_HOST}
MEASURED: dict[str, Callable[[Tx], object]] = {
    "claim": lambda tx: claim_deliveries(tx, "me", FULL, 100),
    "claim round the end": lambda tx: claim_deliveries(tx, "me", FULL, 100, "m"),
    "next due": lambda tx: jobs.seconds_to_next_due(tx, deliveries),
}


def cost(running: Running, rows: int) -> dict[str, int]:
    """Of each statement, with a few hosts that are due among hosts with `rows` rows that are
    blocked, or due later."""

    def put_all(tx: Tx) -> None:
        tx.execute(delete(deliveries))
        for number in range(20):
            fill(tx, f"h{number:02}", 1, -1)
        fill(tx, "full", rows, -1000)
        fill(tx, "later", rows, 1000)
        fill(tx, "some due", 1, -1)
        fill(tx, "some due", rows, 1000)

    running.run(running.db.write(put_all))
    analyze(running)
    return {name: work_of(running, function) for name, function in MEASURED.items()}


def test_claim_costs_by_the_number_of_hosts_and_not_of_rows(running: Running) -> None:
    few, many = cost(running, 1000), cost(running, 20_000)
    for name in MEASURED:
        assert many[name] <= 2 * few[name], (name, few, many)


def plan_of(tx: Tx, function: Callable[[Tx], object]) -> str:
    """How the database goes about the statements of a function."""
    watched = Watched(tx)
    function(watched)
    # PostgreSQL shows the steps of a recursion only when it takes them.
    explain = "EXPLAIN ANALYZE " if tx.is_postgres else "EXPLAIN QUERY PLAN "
    steps = [
        str(row[-1])
        for statement, parameters in watched.statements
        for row in tx.execute_driver(explain + statement, parameters)
    ]
    return "\n".join(steps)


@pytest.mark.parametrize("name", MEASURED)
def test_due_deliveries_are_found_by_indexes_and_never_sorted(running: Running, name: str) -> None:
    cost(running, 5000)
    plan = running.run(running.db.write(plan_of, MEASURED[name]))
    assert "ix_webhook_deliveries_" in plan
    for whole_table in ("Seq Scan on webhook", "SCAN webhook_deliveries", "TEMP B-TREE", "Sort"):
        assert whole_table not in plan, plan


# Recorded


@pytest.mark.parametrize("status_code", [200, 201, 204, 299])
def test_two_hundreds_are_success(outbox: Outbox, status_code: int) -> None:
    outbox.add("a")
    delivery = outbox.claim_one()
    outbox.record(delivery, status_code=status_code, reply_beginning=b"thanks")
    row = outbox.row
    assert (row.status, row.last_error, row.lease_until) == ("delivered", None, None)
    assert row.finished_at is not None
    [attempt] = outbox.rows(select(attempts))
    assert (attempt.delivery_id, attempt.number) == (delivery.id, 1)
    assert (attempt.status_code, attempt.elapsed_ms, attempt.reply_beginning) == (
        status_code,
        12,
        b"thanks",
    )


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"status_code": 500}, "status 500"),
        ({"status_code": 301}, "status 301"),
        ({"status_code": 100}, "status 100"),
        ({"status_code": None, "error": "timeout"}, "timeout"),
        ({"status_code": None, "error": "blocked_address"}, "blocked_address"),
    ],
)
def test_anything_else_is_tried_again(outbox: Outbox, how: dict[str, Any], problem: str) -> None:
    outbox.add("a")
    outbox.record(outbox.claim_one(), **how)
    row = outbox.row
    assert (row.status, row.last_error, row.lease_until) == ("pending", problem, None)
    assert 7 < outbox.seconds_until_due() < 12.1
    assert [attempt.error for attempt in outbox.rows(select(attempts))] == [how.get("error")]


def test_delays_follow_the_schedule_and_its_last_entry_repeats(outbox: Outbox) -> None:
    outbox.add("a")
    for expected in (10, 100, 100, 100):
        outbox.record(outbox.claim_one())
        assert 0.75 * expected < outbox.seconds_until_due() < 1.21 * expected
    assert [attempt.number for attempt in outbox.rows(select(attempts))] == [1, 2, 3, 4]


def test_gone_ends_the_delivery(outbox: Outbox) -> None:
    outbox.add("a")
    outbox.record(outbox.claim_one(), status_code=410)
    assert (outbox.row.status, outbox.row.last_error) == ("dead", "status 410")


def test_no_attempt_starts_later_than_24_hours_after_the_first(outbox: Outbox) -> None:
    outbox.add("a")
    first = datetime.now(UTC) - timedelta(seconds=DEADLINE_SECONDS - 300)
    outbox.record(outbox.claim_one(), started_at=first)
    outbox.record(outbox.claim_one())
    assert outbox.row.status == "pending"
    earlier = first - timedelta(seconds=250)
    outbox.write(
        lambda tx: tx.execute(update(deliveries).values(first_attempt_at=earlier)) and None
    )
    outbox.record(outbox.claim_one())
    assert outbox.row.status == "dead"
    assert len(outbox.rows(select(attempts))) == 3


def test_late_attempt_of_a_claim_that_was_lost_changes_nothing(outbox: Outbox) -> None:
    outbox.add("a")
    lost = outbox.claim_one()
    latest = outbox.claim_one()
    outbox.record(lost, status_code=200)
    assert outbox.row.status == "pending"
    assert outbox.rows(select(attempts)) == []
    outbox.record(latest, status_code=200)
    outbox.record(latest, status_code=500)
    assert outbox.row.status == "delivered"
    assert [attempt.number for attempt in outbox.rows(select(attempts))] == [2]


def test_giving_up_ends_the_delivery_unless_the_claim_was_lost(outbox: Outbox) -> None:
    outbox.add("a")
    lost = outbox.claim_one()
    latest = outbox.claim_one()
    outbox.write(lambda tx: give_up(tx, lost.id, lost.attempts))
    assert outbox.row.status == "pending"
    outbox.write(lambda tx: give_up(tx, latest.id, latest.attempts))
    assert (outbox.row.status, outbox.row.lease_until) == ("dead", None)


def test_delivery_expires_24_hours_after_its_first_attempt_and_never_before_one(
    outbox: Outbox,
) -> None:
    outbox.add("a")
    assert not is_expired(outbox.row, datetime.now(UTC) + timedelta(days=30))
    started_at = datetime.now(UTC)
    outbox.record(outbox.claim_one(), started_at=started_at)
    assert not is_expired(outbox.row, started_at + timedelta(hours=24))
    assert is_expired(outbox.row, started_at + timedelta(hours=24, seconds=1))


# Retry-After


@pytest.mark.parametrize("retry_after", ["99999999", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_far_retry_after_is_clamped_to_twice_the_delay(outbox: Outbox, retry_after: str) -> None:
    outbox.add("a")
    outbox.record(outbox.claim_one(), status_code=429, retry_after=retry_after)
    assert 15 < outbox.seconds_until_due() < 24.1


@pytest.mark.parametrize(
    "retry_after",
    [
        "-1",
        "0",
        "",
        "soon",
        "1e3",
        "٣٠",
        "Mon, 01 Jan 1990 00:00:00 GMT",
        "Mon, 01 Jan 99999999999999999999999 00:00:00 GMT",
        "Mon, 01 Jan 2024 00:00:00 +99999999999999999999",
        "\x00",
    ],
)
def test_near_past_or_senseless_retry_after_leaves_the_delay(
    outbox: Outbox, retry_after: str
) -> None:
    outbox.add("a")
    outbox.record(outbox.claim_one(), status_code=429, retry_after=retry_after)
    assert 7 < outbox.seconds_until_due() < 12.1


@pytest.mark.parametrize(
    "retry_after", ["14", format_datetime(NOW + timedelta(seconds=14), usegmt=True)]
)
def test_retry_after_within_bounds_is_what_was_asked_for(retry_after: str) -> None:
    assert seconds_of(retry_after, NOW) == 14


@given(st.text() | st.from_regex(r"\w{3}, \d+ \w{3} \d+ \d+:\d+:\d+ ([+-]\d+|GMT)"))
@example("1 Jan 2024 00:00:00 +99999999999999999999")
def test_any_retry_after_is_seconds_or_nothing(retry_after: str) -> None:
    seconds = seconds_of(retry_after, NOW)
    assert seconds is None or isinstance(seconds, float)


# The schedule


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 0), (2, 10), (3, 100), (4, 100), (99, 100)])
def test_jitter_is_a_fifth_either_way(attempt: int, seconds: float) -> None:
    drawn = [delay_before(SCHEDULE, attempt) for _ in range(500)]
    assert min(drawn) >= 0.8 * seconds
    assert max(drawn) <= 1.2 * seconds
    assert min(drawn) <= 0.85 * seconds
    assert max(drawn) >= 1.15 * seconds
