"""A wall clock that is set while the process runs: nothing bursts, nothing is lost."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo

import pytest

from app import clock
from app.clock import Clock
from tests.conftest import Serve
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver
from tests.files.helpers import accepted, anonymous, post_form, refused
from tests.files.support import all_deliveries, asking, wait_until, wake
from tests.server import LoupeServer
from tests.test_auth import FILE, signed

SetWall = Callable[[timedelta], None]
JUMPS = [timedelta(hours=-1), timedelta(days=1)]


@pytest.fixture
def set_wall(monkeypatch: pytest.MonkeyPatch) -> SetWall:
    """Sets the machine's clock, as far as the application can see."""
    ahead = [timedelta()]

    class Wall(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + ahead[0]

    monkeypatch.setattr(clock, "datetime", Wall)

    def set_to(by: timedelta) -> None:
        ahead[0] = by

    return set_to


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_schedules_go_by_the_time_since_the_start_and_signatures_by_the_wall(
    set_wall: SetWall, jump: timedelta
) -> None:
    ours = Clock()
    before = ours.now()
    set_wall(jump)
    assert timedelta() <= ours.now() - before < timedelta(minutes=5)
    assert abs(ours.wall() - datetime.now(UTC) - jump) < timedelta(minutes=5)
    assert ours.now().tzinfo is UTC


def upload_and_tell(server: LoupeServer, receiver: Receiver, path: str) -> None:
    fields = {"extensions": asking("google-auto-tagging"), "webhookUrl": receiver.url_for(path)}
    answer = accepted(post_form(server, FILE | fields))
    assert answer["extensionStatus"] == {"google-auto-tagging": "pending"}


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_what_waits_is_neither_hurried_nor_lost_when_the_wall_clock_is_set(
    serve: Serve, set_wall: SetWall, jump: timedelta
) -> None:
    server = serve(
        google_auto_tagging="local", sync_budget_seconds=0, webhook_schedule="0,3600,3600"
    )

    def told(path: str) -> int:
        return [request.path for request in receiver.requests].count(path)

    with Receiver() as receiver:
        receiver.on("/later", replies.status(503))
        upload_and_tell(server, receiver, "/later")
        wait_until(lambda: told("/later") == 1, "the first attempt", 30)
        set_wall(jump)
        wake(server)
        for path in ("/after", "/again"):  # the loops have looked at what is due
            upload_and_tell(server, receiver, path)
            wait_until(lambda path=path: told(path) == 1, path, 30)  # type: ignore[misc]
        assert told("/later") == 1
        waiting = [each for each in all_deliveries(server) if each.url.endswith("/later")]
        assert [(each.status, each.attempts) for each in waiting] == [("pending", 1)]
        stamp = int(receiver.requests[-1].headers["webhook-timestamp"])
        assert abs(stamp - time.time() - jump.total_seconds()) < 300


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_a_signature_is_as_old_as_the_wall_clock_says(
    serve: Serve, set_wall: SetWall, jump: timedelta
) -> None:
    server = serve()
    set_wall(jump)
    then = int(time.time() + jump.total_seconds())
    with anonymous(server) as client:
        accepted(post_form(server, FILE | signed(expire=then + 1800), client=client))
        refused(post_form(server, FILE | signed(), client=client), 400)
