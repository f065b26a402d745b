"""A hundred hosts that take a webhook and never answer: one that answers does not wait for them."""

import contextlib
import socket
import time
from collections.abc import Iterator

from sqlalchemy import func, select

from app.db import Tx
from app.extensions.schemas import GOOGLE
from app.webhooks.deliveries import PER_HOST, enqueue
from app.webhooks.models import deliveries
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.files.support import upload, wait_until, wake
from tests.server import LoupeServer
from tests.torture.harness import report, size

HOSTS = 100
WAITING_AT_EACH = size(8, 50)
HANG_SECONDS = 15.0
PROMISED_SECONDS = 2.0
TIMES_QUIET = 10
"""On a machine so busy that a quiet server breaks the promise, how much longer it may take."""
NEWCOMERS = size(3, 12)
PAUSE_SECONDS = size(0, 1)
"""Between newcomers, so that they come all the while that the others hang."""


@contextlib.contextmanager
def hanging_hosts() -> Iterator[list[str]]:
    """URLs of hosts whose kernel accepts a connection, but which nobody ever reads from."""
    with contextlib.ExitStack() as stack:
        listening = [
            stack.enter_context(socket.create_server((f"127.0.8.{number}", 0), backlog=64))
            for number in range(1, HOSTS + 1)
        ]
        addresses = [each.getsockname() for each in listening]
        yield [f"http://{host}:{port}/" for host, port in addresses]


def tell_all(server: LoupeServer, urls: list[str]) -> None:
    """Several deliveries for each, all due before anything that comes later."""
    for number in range(WAITING_AT_EACH):
        server.write(lambda tx, number=number: tell_each(tx, urls, number))  # type: ignore[misc]
    wake(server)


def tell_each(tx: Tx, urls: list[str], number: int) -> None:
    for url in urls:
        enqueue(
            tx,
            run_id=f"{number} {url}",
            url=url,
            payload={"number": number},
            request_id="r",
            first_delay=0,
        )


def wait_of_newcomer(server: LoupeServer, receiver: Receiver) -> float:
    """Seconds from an upload's answer until its webhook has arrived."""
    before = len(receiver.requests)
    upload(server, GOOGLE, content=b"text", webhook_url=receiver.url)
    answered_at = time.time()
    return receiver.wait_for(before + 1, timeout_seconds=60)[-1].time - answered_at


def in_flight(server: LoupeServer) -> int:
    leased = select(func.count()).where(deliveries.c.lease_until.is_not(None))
    [[count]] = server.rows(leased)
    return int(count)


def test_host_that_answers_is_told_within_2_seconds_while_100_hang(serve: Serve) -> None:
    server = serve(webhook_on="all", webhook_timeout_seconds=HANG_SECONDS)
    with hanging_hosts() as urls, Receiver("127.0.9.1") as receiver:
        quiet = max(wait_of_newcomer(server, receiver) for _ in range(3))
        tell_all(server, urls)
        # As many as may be, while the rest stand at the front of what is due.
        wait_until(lambda: in_flight(server) == HOSTS * PER_HOST, "all hosts to hang", 60)
        waits: list[float] = []
        for _ in range(NEWCOMERS):
            waits.append(wait_of_newcomer(server, receiver))
            assert in_flight(server) > HOSTS * PER_HOST // 2
            time.sleep(PAUSE_SECONDS)
    report(
        "hanging hosts",
        hosts=HOSTS,
        waiting=HOSTS * WAITING_AT_EACH,
        newcomers=NEWCOMERS,
        quiet_seconds=f"{quiet:.3f}",
        longest_wait_seconds=f"{max(waits):.3f}",
    )
    assert max(waits) < max(PROMISED_SECONDS, TIMES_QUIET * quiet)
