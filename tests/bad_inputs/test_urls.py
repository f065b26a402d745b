"""URLs that hostile callers name: to upload from, and to be told at. Each gets its status, and
no row, file, staged file, run or connection is left."""

import contextlib
import functools
import gzip
import inspect
import itertools
import time

import pytest
import structlog.testing

from app.extensions.schemas import GOOGLE
from app.outbound.client import MAX_REDIRECTS, Outbound
from tests.conftest import Serve
from tests.emulators import receiver as replies
from tests.emulators.receiver import Line, Receiver, Reply
from tests.files.helpers import (
    PICTURE,
    accepted,
    nothing_left,
    on_sqlite_only,
    patch,
    refused,
    upload,
)
from tests.files.support import asking, wait_until
from tests.files.test_upload_by_url import chain, fetch
from tests.server import LoupeServer

GZIPPED = gzip.compress(bytes(1_000_000))
OFFERED_BYTES = 200_000_000


def refused_fetch(server: LoupeServer, url: str) -> str:
    """The message for a URL that cannot be fetched; nothing of it is stored."""
    with nothing_left(server):
        message = refused(fetch(server, url), 400)
    assert message.startswith("Your request contains invalid file parameter. ")
    return message.removeprefix("Your request contains invalid file parameter. ")


@pytest.fixture
def impatient(shared_server: LoupeServer, monkeypatch: pytest.MonkeyPatch) -> LoupeServer:
    """Its deadlines, of 8 s for the headers and 60 s for all, are a second and two."""
    outbound = shared_server.resources.outbound
    short = functools.partial(outbound.fetch, header_timeout_seconds=1.0, total_timeout_seconds=2.0)
    monkeypatch.setattr(outbound, "fetch", short)
    return shared_server


def test_deadlines_and_redirects_are_those_of_the_contract() -> None:
    parameters = inspect.signature(Outbound.fetch).parameters
    assert parameters["header_timeout_seconds"].default == 8.0
    assert parameters["total_timeout_seconds"].default == 60.0
    assert parameters["max_redirects"].default == MAX_REDIRECTS == 3


def test_a_fourth_redirect_is_not(shared_server: LoupeServer) -> None:
    with Receiver() as remote:
        assert "redirect" in refused_fetch(shared_server, chain(remote, 4))
        assert len(remote.requests) == 4


@pytest.mark.parametrize(
    "location",
    [
        "/again",
        "file:///etc/passwd",
        "gopher://127.0.0.1:70/",
        "ftp://example.com/a",
        "data:image/png;base64,QQ==",
        "http://user:password@127.0.0.1/",
        "http://",
        "http://127.0.0.1:22/",
        "\\\\127.0.0.1\\a",
    ],
)
def test_a_redirect_that_leads_nowhere_is_400(shared_server: LoupeServer, location: str) -> None:
    with Receiver() as remote:
        assert "redirect" in refused_fetch(
            shared_server, remote.on("/again", replies.redirect(location))
        )


@on_sqlite_only
def test_a_redirect_to_where_it_may_not_go_makes_no_connection(serve: Serve) -> None:
    server = serve(webhook_allow_cidrs="127.0.0.2/32")
    with Receiver(host="127.0.0.2") as allowed, Receiver() as forbidden:
        url = allowed.on("/a", replies.redirect(forbidden.serve("/a", PICTURE)))
        message = refused_fetch(server, url)
        assert (allowed.connections, forbidden.connections) == (1, 0)
        assert "127.0.0" not in message
        accepted(fetch(server, allowed.serve("/b", PICTURE)))


# --- addresses --------------------------------------------------------------------------------

SPELLINGS = [
    "127.0.0.1",
    "0",
    "0.0.0.0",
    "2130706433",
    "0x7f.1",
    "0x7f000001",
    "0177.0.0.1",
    "127.1",
    "127.0.1",
    "127.0.0.1.",
    "１２７.0.0.1",
    "127。0。0。1",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:7f00:1::]",
    "[fec0::1]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fd00::1]",
    "169.254.169.254",
    "168.63.129.16",
    "10.0.0.1",
    "100.64.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "198.18.0.1",
    "224.0.0.1",
    "255.255.255.255",
]


@on_sqlite_only
def test_private_addresses_are_refused_in_every_spelling(serve: Serve) -> None:
    """Two receivers listen on all of this machine's loopback, and hear nothing."""
    server = serve(webhook_allow_cidrs="")
    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver(host="0.0.0.0"))]
        with contextlib.suppress(OSError):  # a machine without IPv6
            receivers.append(stack.enter_context(Receiver(host="::1", port=receivers[0].port)))
        started = time.monotonic()
        with nothing_left(server, *receivers):
            for host, port in itertools.product(SPELLINGS, ("", f":{receivers[0].port}")):
                message = refused_fetch(server, f"http://{host}{port}/a.jpg")
                assert "127.0.0.1" not in message, host
        assert time.monotonic() - started < 30


def test_the_receivers_of_that_test_can_be_heard(shared_server: LoupeServer) -> None:
    """So that the test above shows that it is the guard which keeps the server from them."""
    with Receiver(host="0.0.0.0") as remote:
        remote.serve("/a.jpg", PICTURE)
        for host in ("127.0.0.1", "2130706433", "0x7f.1", "[::ffff:7f00:1]", "localhost"):
            accepted(fetch(shared_server, f"http://{host}:{remote.port}/a.jpg"))


@on_sqlite_only
def test_a_name_with_one_private_answer_is_refused_whole(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(webhook_allow_cidrs="")
    answers: list[list[str]] = []

    async def resolve(host: str, port: int) -> list[str]:
        return answers[0]

    monkeypatch.setattr(server.resources.outbound, "_resolve", resolve)
    with Receiver() as remote, nothing_left(server, remote):
        for answer in (
            ["93.184.216.34", "127.0.0.1"],
            ["127.0.0.1"],
            ["::ffff:127.0.0.1"],
            ["fec0::1"],
            ["168.63.129.16"],
        ):
            answers[:] = [answer]
            message = refused_fetch(server, f"http://rebound.example:{remote.port}/a.jpg")
            assert message == "The host has a private or reserved address."


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a",
        "https://",
        "http://a b/",
        "http://user:hunter2@example.com/a.jpg",
        "http://user@example.com/",
        "http://example.com:99999/",
        "http://example.com:22/",
        "http://example.com:0/",
        "http://example.com:/\\evil",
        "http://exa\nmple.com/",
        "http://[::1/",
        "http://1.2.3.4.5/",
        "http://256.256.256.256/",
        "http://example.com/" + "a" * 3000,
        "http://xn--/",
        "http://\ud7ff\u0000/",
    ],
)
def test_an_invalid_url_is_400_and_its_password_never_logged(
    shared_server: LoupeServer, url: str
) -> None:
    with structlog.testing.capture_logs() as logs:
        message = refused_fetch(shared_server, url)
        # A request's line is written once its answer has been sent.
        wait_until(lambda: logs, "a line")
    for text in (message, str(logs)):
        assert "hunter2" not in text
        assert "example.com" not in text


# --- a remote that fails ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply",
    [
        replies.status(404, PICTURE),
        replies.status(500, PICTURE),
        replies.status(206, PICTURE),
        replies.status(204),
        replies.status(304),
        replies.status(302, PICTURE),
        replies.close_early(),
        replies.raw(b"not http at all\r\n\r\n"),
        replies.raw(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc"),
        replies.huge_header(),
        replies.continue_flood(),
        replies.wrong_length(PICTURE, len(PICTURE) + 1),
        replies.chunked([PICTURE], ends=False),
        replies.gzip_bomb(1_000_000),
        replies.status(200, b""),
    ],
    ids=lambda reply: reply.__qualname__.split(".")[0],
)
def test_a_remote_that_fails_is_400_and_leaves_nothing(
    shared_server: LoupeServer, reply: Reply
) -> None:
    with Receiver() as remote:
        message = refused_by_status(shared_server, remote.on("/a.jpg", reply))
    assert "127.0.0.1" not in message
    assert "Errno" not in message


def test_the_message_names_the_class_of_the_cause_only(shared_server: LoupeServer) -> None:
    with Receiver() as remote, Receiver(tls=True) as encrypted:
        secret = remote.on("/a.jpg", replies.status(418, b"internal secret"))
        assert refused_fetch(shared_server, secret) == "The host answered with an error status."
        untrusted = encrypted.serve("/a.jpg", PICTURE)
        expected = "No secure connection to the host could be made."
        assert refused_fetch(shared_server, untrusted) == expected
        unencrypted = remote.url_for("/a.jpg").replace("http:", "https:")
        assert refused_fetch(shared_server, unencrypted) == expected
        closed_port = remote.port
    expected = "No connection to the host could be made."
    url = f"http://127.0.0.1:{closed_port}/a.jpg"
    assert refused_fetch(shared_server, url) == expected
    unknown = "http://no-such-host.invalid/a.jpg"
    assert refused_fetch(shared_server, unknown) == "The host's name could not be resolved."


def refused_by_status(server: LoupeServer, url: str) -> str:
    """As `refused_fetch`, whatever the message begins with."""
    with nothing_left(server):
        return refused(fetch(server, url), 400)


def test_silent_remote_is_400_within_9_seconds(shared_server: LoupeServer) -> None:
    """The deadline as it is by default, and not a shorter one."""
    with Receiver() as remote:
        url = remote.on("/a.jpg", replies.hang())
        started = time.monotonic()
        message = refused_fetch(shared_server, url)
        elapsed = time.monotonic() - started
    assert message == "The host did not answer in time."
    assert 8 <= elapsed <= 9


@pytest.mark.parametrize(
    "file",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://example.com/a.jpg",
        "gopher://127.0.0.1:70/",
        "data:data:image/png;base64,QQ==",
        "data:image/png;base64,data:image/png;base64,QQ==",
        "data:text/plain,http://127.0.0.1/",
        "jar:http://127.0.0.1/",
        "//127.0.0.1:80/a",
    ],
)
def test_other_scheme_than_http_is_400_and_opens_nothing(
    shared_server: LoupeServer, file: str
) -> None:
    with Receiver() as canary, nothing_left(shared_server, canary):
        message = refused(fetch(shared_server, file.replace(":80/", f":{canary.port}/")), 400)
    assert "root:" not in message


def test_encoded_body_is_refused_and_not_inflated(shared_server: LoupeServer) -> None:
    """A gigabyte behind a thousandth of it, of which not even that is taken."""
    sent = 0

    def bomb(line: Line) -> None:
        nonlocal sent
        line.send_head(200, {"Content-Encoding": "gzip", "Connection": "close"})
        while line.goes_on and sent < OFFERED_BYTES:
            line.send(GZIPPED)
            sent += len(GZIPPED)

    with Receiver() as remote:
        refused_fetch(shared_server, remote.on("/a.jpg", bomb))
    # What the kernel's buffers took before the connection was closed.
    assert sent < shared_server.resources.settings.max_upload_bytes


def _slow_headers() -> Reply:
    """A byte of a header now and then, for ever."""

    def send(line: Line) -> None:
        line.send(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while line.goes_on:
            line.send(b"x")
            line.wait(0.05)

    return send


@pytest.mark.parametrize("reply", [replies.hang(), _slow_headers()], ids=["hang", "slow-headers"])
def test_headers_that_do_not_come_in_time_are_400(impatient: LoupeServer, reply: Reply) -> None:
    started = time.monotonic()
    with Receiver() as remote:
        message = refused_fetch(impatient, remote.on("/a.jpg", reply))
    assert message == "The host did not answer in time."
    assert time.monotonic() - started < 10


def test_redirects_share_one_deadline(impatient: LoupeServer) -> None:
    started = time.monotonic()
    with Receiver() as remote:
        third = remote.on("/3", replies.slow(0.6, replies.status(200, PICTURE)))
        second = remote.on("/2", replies.slow(0.6, replies.redirect(third)))
        first = remote.on("/1", replies.slow(0.6, replies.redirect(second)))
        assert refused_fetch(impatient, first) == "The host did not answer in time."
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "reply",
    [replies.drip(), replies.hang_in_body(200, PICTURE)],
    ids=["drip", "hang-in-body"],
)
def test_a_body_that_does_not_end_in_time_is_400(impatient: LoupeServer, reply: Reply) -> None:
    started = time.monotonic()
    with Receiver() as remote:
        message = refused_fetch(impatient, remote.on("/a.jpg", reply))
    assert message == "The host did not answer in time."
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "reply",
    [
        replies.endless_body(),
        replies.wrong_length(b"x", 10**12),
        replies.status(200, bytes(1_000_001)),
        replies.chunked([bytes(100_000)] * 11),
    ],
    ids=["endless", "declared", "one-byte-more", "chunked"],
)
@on_sqlite_only
def test_a_remote_file_that_is_too_large_is_400(serve: Serve, reply: Reply) -> None:
    server = serve(max_upload_bytes=1_000_000)
    with Receiver() as remote:
        message = refused_fetch(server, remote.on("/a.jpg", reply))
        assert message == "The file size exceeds limits."
        accepted(fetch(server, remote.serve("/b.jpg", bytes(1_000_000))))


# --- webhookUrl -------------------------------------------------------------------------------

WEBHOOK_URLS = [
    "javascript:alert(1)",
    "ftp://example.com/hook",
    "file:///etc/passwd",
    "data:text/plain,x",
    "/relative",
    "//example.com/hook",
    "example.com/hook",
    "http:",
    "http://",
    "http:///hook",
    "https://user:hunter2@example.com/",
    "https://user@example.com/",
    "http://example.com:22/",
    "http://example.com:1023/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:x/",
    "http://example.com/" + "x" * 10_000,
    "http://127.0.0.1/",
    "http://127.0.0.1:8080/",
    "http://127.1/",
    "http://0/",
    "http://2130706433/",
    "http://0x7f.1/",
    "http://0177.0.0.1/",
    "http://10.0.0.1/",
    "http://192.168.1.1:8080/",
    "http://169.254.169.254/latest/meta-data",
    "http://168.63.129.16/",
    "http://[::1]/",
    "http://[::ffff:7f00:1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:7f00:1::]/",
    "http://[fec0::1]/",
    "http://[fe80::1%25eth0]/",
    "http://exa mple.com/",
    "http://example.com\\@127.0.0.1/",
    "http://exam\nple.com/",
    "http://example.com/\0",
]


@on_sqlite_only
def test_bad_webhook_urls_are_400_at_once(serve: Serve) -> None:
    """Whether or not anything would ever be sent to them."""
    server = serve(webhook_allow_cidrs="")
    file_id = upload(server)["fileId"]
    for url, extensions in itertools.product(WEBHOOK_URLS, ("", asking(GOOGLE))):
        with nothing_left(server):
            fields = {"webhookUrl": url, "extensions": extensions}
            message = refused(server.upload(PICTURE, **fields), 400)
            assert "webhookUrl" in message, url
            refused(patch(server, file_id, {"webhookUrl": url, "tags": ["new"]}), 400)
        for secret in ("hunter2", "169.254"):
            assert secret not in message
    assert server.details(file_id)["tags"] is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://example.com/hook?a=b&c=%20",
        "http://example.com:8080/hook",
        "HTTPS://EXAMPLE.COM",
        "https://exämple.com/",
        "https://93.184.216.34:443/",
        "http://127.0.0.1:5000/allowed-by-setting",
    ],
)
def test_good_webhook_urls_are_taken(shared_server: LoupeServer, url: str) -> None:
    upload(shared_server, webhookUrl=url)
