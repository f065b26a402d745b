"""A receiver that is down for half a day and then flaky: it gets every event, each as it was."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, func, or_, select, text

from app.db import Tx
from app.extensions.schemas import GOOGLE
from app.settings import Settings
from app.webhooks.models import attempts, deliveries
from tests.conftest import Serve
from tests.emulators.receiver import Line, Receiver, hang, status
from tests.files.support import SetClock, upload, wait_until, wake
from tests.postgres import make_clock_movable
from tests.server import LoupeServer
from tests.torture.harness import new_seed, report, size

EVENTS_PER_STEP = size(2, 10)
LONGEST_JITTER = 1.21
HOURLY = 3600 * LONGEST_JITTER
# The delays of the schedule as it is by default, each let pass as a whole; 12 hours in all.
SCHEDULE = Settings.model_fields["webhook_schedule"].default
STEPS_DOWN = [seconds * LONGEST_JITTER for seconds in SCHEDULE[1:]] + [HOURLY] * 9
STEPS_UP = 9
"""At most: a tenth would be later than a day after the first attempt."""
TIMEOUT_SECONDS = 2.0
RECEIVER_HOST = "127.0.7.7"  # where no other test would take the port meanwhile


class Flaky:
    """Of 20 requests, in an order of its own, 4 are answered with 500 and 1 is never answered."""

    def __init__(self, order: random.Random) -> None:
        self._order = order
        self._hand: list[int | None] = []
        self.dealt: Counter[int | None] = Counter()

    def __call__(self, line: Line) -> None:
        if not self._hand:
            self._hand = [500] * 4 + [None] + [200] * 15
            self._order.shuffle(self._hand)
        code = self._hand.pop()
        self.dealt[code] += 1
        (hang() if code is None else status(code))(line)


class World:
    """A server, and time that passes only as it is told, for the process and for its database."""

    def __init__(self, serve: Serve, database_url: str) -> None:
        self._moves_database = not database_url.startswith("sqlite")
        if self._moves_database:
            make_clock_movable(database_url)
        self._clock = SetClock()
        self.server: LoupeServer = serve(
            clock=self._clock,
            webhook_on="all",
            webhook_schedule=",".join(map(str, SCHEDULE)),
            webhook_timeout_seconds=TIMEOUT_SECONDS,
        )

    def forward(self, seconds: float) -> None:
        """Returns when all that has become due has been tried."""
        if self._moves_database:
            ahead = text("UPDATE clock_ahead SET ahead_by = ahead_by + make_interval(secs => :by)")
            self.server.write(lambda tx: tx.execute(ahead, {"by": seconds}) and None)
        self._clock.forward(seconds=seconds)
        wake(self.server)
        self.settle()

    def settle(self) -> None:
        def nothing_to_do(tx: Tx) -> bool:
            left = select(func.count()).where(
                deliveries.c.status == "pending",
                or_(deliveries.c.due_at <= tx.now(), deliveries.c.lease_until.is_not(None)),
            )
            return bool(tx.execute(left).scalar_one() == 0)

        read = self.server.resources.db.read
        wait_until(lambda: self.server.run(read(nothing_to_do)), "everything tried", 120)

    def tell(self, url: str) -> None:
        """An upload whose webhook is due at once."""
        upload(self.server, GOOGLE, content=b"text", webhook_url=url)

    def pending(self) -> int:
        return sum(row.status == "pending" for row in self.deliveries())

    def deliveries(self) -> Sequence[Row[Any]]:
        return self.server.rows(select(deliveries))

    def attempts(self) -> Sequence[Row[Any]]:
        statement = select(attempts).order_by(attempts.c.delivery_id, attempts.c.number)
        return self.server.rows(statement)


def test_receiver_down_for_12_hours_then_flaky_gets_every_event(
    serve: Serve, database_url: str
) -> None:
    flaky = Flaky(new_seed("receiver down"))
    world = World(serve, database_url)
    with Receiver(RECEIVER_HOST) as receiver:
        port, url = receiver.port, receiver.url
    for seconds in STEPS_DOWN:
        for _ in range(EVENTS_PER_STEP):
            world.tell(url)
        world.settle()
        world.forward(seconds)
    events = EVENTS_PER_STEP * len(STEPS_DOWN)
    assert (world.pending(), sum(STEPS_DOWN) > 12 * 3600) == (events, True)
    steps = 0
    with Receiver(RECEIVER_HOST, port) as receiver:
        receiver.reply = flaky
        while world.pending():
            assert steps < STEPS_UP
            world.forward(HOURLY)
            steps += 1
        received = list(receiver.requests)
    told = world.deliveries()
    tries = world.attempts()
    assert {(row.status, row.last_error) for row in told} == {("delivered", None)}
    bodies = {(request.headers["webhook-id"], request.body) for request in received}
    assert bodies == {(row.id, row.body) for row in told}
    assert len(told) == events
    last = {row.delivery_id: row.status_code for row in tries}
    assert set(last.values()) == {200}
    assert Counter(row.number for row in tries)[1] == events
    assert min(flaky.dealt[reply] for reply in (200, 500, None)) > 0
    report(
        "receiver down",
        events=events,
        attempts=len(tries),
        requests=len(received),
        **{f"replies_{code or 'none'}": count for code, count in flaky.dealt.items()},
        hours_up=f"{steps * HOURLY / 3600:.0f}",
    )
