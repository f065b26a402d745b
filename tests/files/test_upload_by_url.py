"""Files that the server fetches: redirects, deadlines, limits, and addresses out of reach."""

from typing import Any

import httpx
import pytest

from tests import pictures
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver, Reply
from tests.files.helpers import (
    PICTURE,
    accepted,
    nothing_left,
    post_form,
    refused,
    upload_as,
)
from tests.files.test_upload import stored_bytes
from tests.server import LoupeServer


def fetch(server: LoupeServer, url: str, **fields: str) -> httpx.Response:
    return post_form(server, {"file": url, "fileName": "fetched.jpg", **fields})


def test_a_file_is_fetched_and_stored(server: LoupeServer) -> None:
    with Receiver() as remote:
        url = remote.serve("/a%20b.html?x=1".partition("?")[0], PICTURE, "text/html")
        answer = accepted(fetch(server, f"{url}?x=1", responseFields="tags", tags="a"))
        [request] = remote.requests
    assert (answer["fileType"], answer["size"]) == ("image", len(PICTURE))
    assert answer["name"].startswith("fetched_")
    assert answer["tags"] == ["a"]
    assert stored_bytes(server, answer["fileId"]) == PICTURE
    assert (request.method, request.path) == ("GET", "/a%20b.html?x=1")
    for header in ("authorization", "cookie", "referer"):
        assert header not in request.headers


def test_a_url_may_have_blanks_around_it(shared_server: LoupeServer) -> None:
    with Receiver() as remote:
        url = remote.serve("/a.jpg", PICTURE)
        accepted(fetch(shared_server, f"\n {url.replace('http', 'HTTP')} \r\n"))


def test_a_url_as_a_binary_part_is_a_file_of_its_own(shared_server: LoupeServer) -> None:
    with Receiver() as remote:
        answer = upload_as(shared_server, "link.txt", remote.url_for("/a.jpg").encode())
        assert remote.connections == 0
    assert answer["fileType"] == "non-image"


@pytest.mark.parametrize(
    "reply",
    [
        replies.chunked([PICTURE[:1000], PICTURE[1000:]]),
        replies.slow(0.2, replies.status(200, PICTURE)),
        replies.raw(b"HTTP/1.0 200 OK\r\n\r\n" + PICTURE),
        replies.status(203, PICTURE),
    ],
    ids=["chunked", "slow", "until-close", "203"],
)
def test_a_file_may_come_in_many_ways(shared_server: LoupeServer, reply: Reply) -> None:
    with Receiver() as remote:
        answer = accepted(fetch(shared_server, remote.on("/a.jpg", reply)))
    assert stored_bytes(shared_server, answer["fileId"]) == PICTURE


def chain(remote: Receiver, hops: int) -> str:
    url = remote.serve("/end", PICTURE)
    for hop in range(hops):
        url = remote.on(f"/{hop}", replies.redirect(url, (301, 302, 303, 307, 308)[hop % 5]))
    return url


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_three_redirects_are_followed(shared_server: LoupeServer, hops: int) -> None:
    with Receiver() as remote:
        accepted(fetch(shared_server, chain(remote, hops)))
        assert len(remote.requests) == hops + 1


def test_a_form_is_checked_before_anything_is_fetched(shared_server: LoupeServer) -> None:
    with Receiver() as remote, nothing_left(shared_server, remote):
        url = remote.serve("/a.jpg", PICTURE)
        fields: dict[str, Any]
        for fields in (
            {"tags": "50%"},
            {"extensions": "{"},
            {"webhookUrl": "ftp://x"},
            {"fileName": " "},
            {"folder": ".."},
        ):
            refused(fetch(shared_server, url, **fields), 400)


def test_pictures_that_only_claim_to_be_are_typed_by_content(shared_server: LoupeServer) -> None:
    with Receiver() as remote:
        page = remote.serve("/a.jpg", b"<html>", "image/jpeg")
        assert accepted(fetch(shared_server, page))["fileType"] == "non-image"
        gif = remote.serve("/b.html", pictures.gif(), "text/html")
        answer = accepted(fetch(shared_server, gif))
    assert shared_server.details(answer["fileId"])["mime"] == "image/gif"
