"""No hostile URL, name or redirect makes this machine connect to itself or to its network.

127.0.0.2 plays the public internet. Receivers listen on the rest of loopback, and everything that
is dialled at all is noted, so that a connection to an address where nobody listens counts too.
"""

import contextlib
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Row, insert, select

from app.db import Tx
from app.webhooks.models import attempts, deliveries
from tests.conftest import Serve
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver
from tests.files.helpers import nothing_left, on_sqlite_only, post_form, refused
from tests.files.support import make_due, wait_until, wake
from tests.outbound.support import (
    HOSTILE_LOCATIONS,
    HOSTILE_URLS,
    LOOPBACK_SPELLINGS,
    LOOPBACK_SPELLINGS_V6,
    NEVER_DIALLED,
    PRIVATE_LITERALS,
    PUBLIC,
    UNWRAPPED,
    CountingDialler,
    Names,
    ends,
)
from tests.server import LoupeServer
from tests.torture.harness import report

AT_LEAST = 150
ENDS = ends(NEVER_DIALLED + UNWRAPPED)
LITERALS = [
    *(LOOPBACK_SPELLINGS + LOOPBACK_SPELLINGS_V6 + PRIVATE_LITERALS),
    *(f"[{address}]" if ":" in address else address for address in ENDS),
]
# A relative one is no URL to upload from, and no JSON or form can carry a lone surrogate.
ABSOLUTE = [url for url in HOSTILE_URLS if re.match(r"\s*[a-z+-]+:", url) and "\ud800" not in url]


@dataclass
class Site:
    """A server whose every lookup and connection is seen; canaries on all loopback but `public`."""

    server: LoupeServer
    names: Names
    dialler: CountingDialler
    public: Receiver
    canaries: list[Receiver]

    @property
    def port(self) -> int:
        return self.canaries[0].port

    @property
    def forbidden(self) -> tuple[int, set[str]]:
        """Connections to canaries, and what was dialled that is not public."""
        return sum(each.connections for each in self.canaries), {*self.dialler.dialled} - {PUBLIC}

    def name(self, *answers: list[str]) -> str:
        """A new name with these answers: one list for each lookup, the last for all further."""
        name = f"n{len(self.names.answers)}.test"
        self.names.answers[name] = list(answers)
        return name

    def refuse_uploads(self, urls: Sequence[str]) -> None:
        with nothing_left(self.server):
            for url in urls:
                answer = post_form(self.server, {"file": url, "fileName": "a.jpg"})
                assert "root:" not in refused(answer, 400), url

    def refuse_submitted(self, urls: Sequence[str]) -> None:
        with nothing_left(self.server):
            for url in urls:
                message = refused(self.server.upload(b"text", webhookUrl=url), 400)
                assert "webhookUrl" in message, url

    def send(self, urls: Sequence[str]) -> dict[str, Row[Any]]:
        """The first attempt at a webhook to each, as if it had been accepted when submitted."""
        ids = {url: f"evt_{uuid4().hex}" for url in urls}
        self.server.write(lambda tx: _put(tx, ids))
        wake(self.server)
        return {url: self.attempt(event_id) for url, event_id in ids.items()}

    def attempt(self, event_id: str, number: int = 1) -> Row[Any]:
        which = (attempts.c.delivery_id == event_id, attempts.c.number == number)
        made = wait_until(
            lambda: self.server.rows(select(attempts).where(*which)), f"attempt {number}", 60
        )
        return made[0]


def _put(tx: Tx, ids: dict[str, str]) -> None:
    row = {
        "body": b"{}",
        "request_id": "r",
        "status": "pending",
        "attempts": 0,
        "due_at": tx.clock.now(),
        "created_at": tx.clock.now(),
    }
    rows = [
        {**row, "id": event_id, "run_id": event_id, "url": url, "host": event_id}
        for url, event_id in ids.items()
    ]
    tx.execute(insert(deliveries), rows)


@pytest.fixture
def site(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    server = serve(webhook_allow_cidrs=f"{PUBLIC}/32", webhook_schedule="0,3600")
    names, dialler = Names(), CountingDialler()
    monkeypatch.setattr(server.resources.outbound, "_resolve", names)
    monkeypatch.setattr(server.resources.outbound, "_dialler", dialler)
    with contextlib.ExitStack() as stack:
        canaries = [stack.enter_context(Receiver("0.0.0.0"))]
        with contextlib.suppress(OSError):  # a machine without IPv6
            canaries.append(stack.enter_context(Receiver("::1", canaries[0].port)))
        public = stack.enter_context(Receiver(PUBLIC))
        yield Site(server, names, dialler, public, canaries)


def redirects(site: Site) -> list[str]:
    """URLs of the public receiver that lead to where they must not."""
    inside = [f"http://{host}:{site.port}/secret" for host in LITERALS]
    inside += [f"http://{site.name(['127.0.0.1'])}:{site.port}/secret"]
    locations = [*inside, *HOSTILE_LOCATIONS]
    urls = [
        site.public.on(f"/to/{number}", replies.redirect(location, 301 + number % 2))
        for number, location in enumerate(locations)
    ]
    for hop in range(4):
        site.public.on(f"/hop/{hop}", replies.redirect(f"/hop/{hop + 1}"))
    loop = site.public.on("/loop", replies.redirect("/loop"))
    return [*urls, site.public.url_for("/hop/0"), loop]


@on_sqlite_only
def test_no_hostile_url_name_or_redirect_makes_a_connection(site: Site) -> None:
    literals = [f"http://{host}:{site.port}/x" for host in LITERALS]
    literals += [f"https://{host}/x" for host in LITERALS]
    named = [
        f"http://{site.name(answers)}:{site.port}/x"
        for address in ENDS
        for answers in ([address], [PUBLIC, address])
    ]
    site.refuse_uploads([*literals, *ABSOLUTE, *named])
    site.refuse_submitted([*literals, *ABSOLUTE])
    sent = site.send([*literals, *ABSOLUTE, *named])
    errors = {url: attempt.error for url, attempt in sent.items()}
    assert {errors[url] for url in [*literals, *named]} == {"blocked_address"}
    assert {errors[url] for url in ABSOLUTE} == {"invalid_url"}
    assert (site.dialler.dialled, site.public.connections) == ([], 0)

    led = redirects(site)
    site.refuse_uploads(led)
    assert {attempt.status_code for attempt in site.send(led).values()} == {301, 302}
    assert site.forbidden == (0, set())

    hostile = {*literals, *ABSOLUTE, *named, *led}
    assert len(hostile) >= AT_LEAST
    report(
        "ssrf",
        hostile=len(hostile),
        spellings=len(literals),
        malformed=len(ABSOLUTE),
        names=len(named),
        redirects=len(led),
        uploads=len(hostile),
        submitted=len(literals) + len(ABSOLUTE),
        deliveries=len(hostile),
        forbidden_connections=site.forbidden[0],
    )
    _connect_to(site.canaries)


def _connect_to(canaries: Sequence[Receiver]) -> None:
    """Shows that a connection would have been heard."""
    for number, canary in enumerate(canaries):
        host = ("127.0.0.1", "::1")[number]
        socket.create_connection((host, canary.port)).close()
        wait_until(lambda canary=canary: canary.connections, "canary to hear")  # type: ignore[misc]


@on_sqlite_only
def test_rebinding_name_is_dialled_only_at_the_address_that_was_checked(site: Site) -> None:
    rebinding = ([PUBLIC], ["127.0.0.1"])
    picture = f"http://{site.name(*rebinding)}:{site.public.port}/picture"
    site.public.serve("/picture", b"content")
    assert post_form(site.server, {"file": picture, "fileName": "a"}).status_code == 200
    assert site.dialler.dialled == [PUBLIC]
    site.refuse_uploads([picture])

    again = f"http://{site.name(*rebinding)}:{site.public.port}/again"
    site.public.on("/again", replies.redirect(f"{again}?inside"))
    site.refuse_uploads([again])

    hook = f"http://{site.name(*rebinding)}:{site.public.port}/hook"
    site.public.on("/hook", 500)
    first = site.send([hook])[hook]
    make_due(site.server)
    second = site.attempt(first.delivery_id, 2)
    assert (first.status_code, second.error) == (500, "blocked_address")
    assert (site.dialler.dialled, site.public.connections) == ([PUBLIC] * 3, 3)
    assert site.forbidden == (0, set())
