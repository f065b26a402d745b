"""Webhooks and downloads: no receiver holds us up or fills us."""

import asyncio
import contextlib
import gzip
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator

import pytest

from app.outbound.client import CHUNKS_BETWEEN_PAUSES, Outbound, WebhookReply
from app.outbound.errors import TooLarge
from tests.emulators import receiver as replies
from tests.emulators.receiver import Receiver
from tests.outbound.support import (
    HOSTILE_LOCATIONS,
    LOOPBACK_SPELLINGS,
    LOOPBACK_SPELLINGS_V6,
    PUBLIC,
    Names,
    failure,
    fetch,
    names,
    post,
    run,
)

# --- webhooks ---------------------------------------------------------------------------------


def test_webhook_arrives_byte_for_byte_with_its_headers(public: Receiver) -> None:
    body = '{"name": "Bücher\\n"}'.encode()

    async def send(outbound: Outbound) -> WebhookReply:
        return await outbound.post_webhook(
            f"{public.url}/hook?a=b%20c",
            body,
            {"content-type": "application/json", "webhook-id": "evt_1"},
        )

    public.reply = replies.status(201, b"thanks", {"Retry-After": "7"})
    assert run(send) == WebhookReply(status_code=201, body=b"thanks", retry_after="7")
    [received] = public.wait_for(1)
    assert (received.method, received.path, received.body) == ("POST", "/hook?a=b%20c", body)
    assert received.headers["Webhook-Id"] == "evt_1"
    assert received.headers["content-type"] == "application/json"
    assert received.headers["accept-encoding"] == "identity"
    assert received.json() == {"name": "Bücher\n"}


@pytest.mark.parametrize("status_code", [200, 204, 299, 301, 302, 307, 404, 410, 429, 500, 503])
def test_any_status_is_a_reply_and_no_redirect_is_followed(
    public: Receiver, canary: Receiver, status_code: int
) -> None:
    public.reply = replies.redirect(canary.url, status_code)
    assert run(post(public.url)).status_code == status_code
    assert (public.connections, canary.connections) == (1, 0)


def test_retry_after_is_handed_on_as_text(public: Receiver) -> None:
    for text in ("99999999", "-1", "junk", "Wed, 21 Oct 2026 07:28:00 GMT"):
        public.replies.append(replies.retry_after(text))
        reply = run(post(public.url))
        assert (reply.status_code, reply.retry_after) == (429, text)


def test_status_counts_when_the_body_never_ends_and_16_kib_of_it_are_kept(
    public: Receiver,
) -> None:
    public.reply = replies.endless_body()
    reply = run(post(public.url))
    assert (reply.status_code, reply.body) == (200, b"x" * 16 * 1024)


def test_long_body_is_cut_at_16_kib(public: Receiver) -> None:
    public.reply = replies.status(500, b"y" * 100_000)
    reply = run(post(public.url))
    assert (reply.status_code, reply.body) == (500, b"y" * 16 * 1024)


@pytest.mark.parametrize(
    ("reply", "beginning"),
    [
        (replies.hang_in_body(202, b"so far"), b"so far"),
        (replies.drip(202), b"x"),
        (replies.chunked([b"cut", b" off"], 202, ends=False), b"cut off"),
        (replies.wrong_length(b"short", 1000, 202), b"short"),
    ],
    ids=["hangs", "drips", "cut off", "short"],
)
def test_status_counts_when_the_body_breaks_or_hangs(
    public: Receiver, reply: replies.Reply, beginning: bytes
) -> None:
    public.reply = reply
    start = time.monotonic()
    answer = run(post(public.url, timeout_seconds=30))
    assert answer.status_code == 202
    assert answer.body.startswith(beginning)
    assert time.monotonic() - start < 15


def test_reply_is_not_inflated(public: Receiver) -> None:
    public.reply = replies.gzip_bomb()
    reply = run(post(public.url))
    assert reply.status_code == 200
    assert reply.body[:2] == b"\x1f\x8b"
    assert len(reply.body) == 16 * 1024


@pytest.mark.parametrize(
    "reply",
    [
        replies.close_early(),
        replies.huge_header(),
        replies.continue_flood(),
        replies.raw(b"SSH-2.0-OpenSSH_9.9\r\n"),
        replies.raw(b"HTTP/1.1 2x0 OK\r\n\r\n"),
        replies.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx"),
        replies.raw(b"HTTP/1.1 200 OK\r\nX: " + b"\r\n"),
        replies.raw(b"\x15\x03\x01\x00\x02\x02\x46"),
    ],
    ids=["close", "huge header", "100 flood", "ssh", "status", "lengths", "unfinished", "tls"],
)
def test_answer_that_is_no_http_is_a_protocol_error(public: Receiver, reply: replies.Reply) -> None:
    public.reply = reply
    assert failure(post(public.url)).reason == "protocol_error"


def test_receiver_that_says_nothing_ends_with_the_deadline(public: Receiver) -> None:
    public.reply = replies.hang()
    start = time.monotonic()
    assert failure(post(public.url, timeout_seconds=0.3)).reason == "timeout"
    assert time.monotonic() - start < 10


def test_receiver_that_drips_its_header_ends_with_the_deadline(public: Receiver) -> None:
    def drip_header(line: replies.Line) -> None:
        line.send(b"HTTP/1.1 200 OK\r\nX: ")
        while line.goes_on:
            line.send(b"x")
            line.wait(0.02)

    public.reply = drip_header
    assert failure(post(public.url, timeout_seconds=0.3)).reason == "timeout"


def test_receiver_that_does_not_read_ends_with_the_deadline() -> None:
    with socket.create_server((PUBLIC, 0)) as deaf:
        url = f"http://{PUBLIC}:{deaf.getsockname()[1]}/"
        error = failure(post(url, bytes(20_000_000), timeout_seconds=0.5))
    assert error.reason == "timeout"


def test_closed_port_is_a_connect_failure(public: Receiver) -> None:
    with socket.create_server((PUBLIC, 0)) as closed:
        url = f"http://{PUBLIC}:{closed.getsockname()[1]}/"
    assert failure(post(url)).reason == "connect_failure"


def test_twenty_at_once_each_get_their_own_answer(public: Receiver) -> None:
    for number in range(20):
        public.on(f"/{number}", replies.slow(0.05, replies.status(200, str(number).encode())))

    async def all_at_once(outbound: Outbound) -> list[WebhookReply]:
        return await asyncio.gather(
            *(outbound.post_webhook(f"{public.url}/{n}", b"{}", {}) for n in range(20))
        )

    assert [reply.body for reply in run(all_at_once)] == [str(n).encode() for n in range(20)]


def test_cancelled_request_closes_its_connection(public: Receiver) -> None:
    """A socket left open would end this as a ResourceWarning."""
    public.reply = replies.hang()

    async def cancel(outbound: Outbound) -> None:
        sending = asyncio.create_task(outbound.post_webhook(public.url, b"{}", {}))
        await asyncio.to_thread(public.wait_for, 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    run(cancel)


# --- TLS --------------------------------------------------------------------------------------


@pytest.fixture
def secure() -> Iterator[Receiver]:
    with Receiver(PUBLIC, tls=True, names=["secure.test"]) as receiver:
        yield receiver


def test_certificate_is_checked_against_the_name_and_not_the_address(secure: Receiver) -> None:
    trusting = ssl.create_default_context(cadata=secure.certificate_pem)
    resolver = names(secure=[PUBLIC], other=[PUBLIC])
    url = secure.url_for("/x", "secure.test")
    assert run(post(url), resolver=resolver, ssl_context=trusting).status_code == 200
    assert secure.requests[0].headers["host"] == f"secure.test:{secure.port}"
    other = secure.url_for("/x", "other.test")
    error = failure(post(other), resolver=resolver, ssl_context=trusting)
    assert error.reason == "tls_failure"


def test_self_signed_certificate_is_refused(secure: Receiver) -> None:
    error = failure(post(secure.url_for("/", "secure.test")), resolver=names(secure=[PUBLIC]))
    assert (error.reason, secure.requests) == ("tls_failure", [])


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_other_than_tls_behind_an_https_url_is_a_tls_failure(answer: bytes) -> None:
    def speak(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass

    with socket.create_server((PUBLIC, 0)) as listener:
        listener.settimeout(20)
        speaking = threading.Thread(target=speak, args=[listener])
        speaking.start()
        error = failure(post(f"https://{PUBLIC}:{listener.getsockname()[1]}/"))
        speaking.join()
    assert error.reason == "tls_failure"


def test_silent_tls_handshake_ends_with_the_deadline_and_leaves_no_socket() -> None:
    with socket.create_server((PUBLIC, 0)) as deaf:
        url = f"https://{PUBLIC}:{deaf.getsockname()[1]}/"
        assert failure(post(url, timeout_seconds=0.3)).reason == "timeout"


# --- downloads --------------------------------------------------------------------------------


def test_file_is_fetched_whole(public: Receiver) -> None:
    content = bytes(range(256)) * 1000
    url = public.serve("/picture.jpg", content, "image/jpeg")
    assert run(fetch(url)) == content
    [received] = public.requests
    assert (received.method, received.body) == ("GET", b"")
    assert received.headers["accept-encoding"] == "identity"
    assert "content-length" not in received.headers


def test_file_in_many_tiny_chunks_is_fetched_whole(public: Receiver) -> None:
    public.reply = replies.chunked([b"x"] * 5000)
    assert run(fetch(public.url)) == b"x" * 5000


def test_three_redirects_are_followed(public: Receiver) -> None:
    public.on("/a", replies.redirect("/b", 301))
    public.on("/b", replies.redirect(f"//hop.test:{public.port}/c?q#part", 307))
    public.on("/c", replies.redirect(public.url_for("/d"), 308))
    public.serve("/d", b"here")
    assert run(fetch(public.url_for("/a")), resolver=names(hop=[PUBLIC])) == b"here"
    assert [received.path for received in public.requests] == ["/a", "/b", "/c?q", "/d"]


def test_fourth_redirect_is_refused(public: Receiver) -> None:
    for hop in range(4):
        public.on(f"/{hop}", replies.redirect(f"/{hop + 1}"))
    public.serve("/4", b"too far")
    assert failure(fetch(public.url_for("/0"))).reason == "redirect_refused"
    assert len(public.requests) == 4


def test_redirect_loop_is_refused(public: Receiver) -> None:
    url = public.on("/loop", replies.redirect("/loop"))
    assert failure(fetch(url)).reason == "redirect_refused"
    assert len(public.requests) == 4


@pytest.mark.parametrize("host", LOOPBACK_SPELLINGS[:15] + LOOPBACK_SPELLINGS_V6 + ["inside.test"])
def test_redirect_to_a_private_address_is_not_followed(
    public: Receiver, canary: Receiver, host: str
) -> None:
    public.reply = replies.redirect(f"http://{host}:{canary.port}/secret")
    error = failure(fetch(public.url), resolver=names(inside=["127.0.0.1"]))
    assert error.reason == "blocked_address"
    assert (public.connections, canary.connections) == (1, 0)


@pytest.mark.parametrize("location", HOSTILE_LOCATIONS)
def test_redirect_to_what_is_no_plain_http_url_is_refused(public: Receiver, location: str) -> None:
    public.reply = replies.redirect(location)
    resolver = Names()
    assert failure(fetch(public.url), resolver=resolver).reason == "redirect_refused"
    assert (public.connections, resolver.asked) == (1, [])


@pytest.mark.parametrize("status_code", [206, 300, 302, 304, 400, 401, 403, 404, 410, 500, 503])
def test_status_that_brings_no_whole_file_is_an_error(public: Receiver, status_code: int) -> None:
    public.reply = status_code
    error = failure(fetch(public.url))
    assert (error.reason, error.message) == (
        "http_status",
        "The host answered with an error status.",
    )


def test_file_of_exactly_the_cap_is_taken(public: Receiver) -> None:
    assert len(run(fetch(public.serve("/x", bytes(1000)), max_bytes=1000))) == 1000


def test_declared_length_beyond_the_cap_is_refused_before_reading(public: Receiver) -> None:
    public.reply = replies.hang_in_body(200, bytes(500))
    error = failure(fetch(public.url, max_bytes=1000, total_seconds=30))
    assert isinstance(error, TooLarge)
    assert error.reason == "too_large"


@pytest.mark.parametrize(
    "reply",
    [replies.endless_body(), replies.chunked([bytes(700), bytes(700)])],
    ids=["endless", "chunked"],
)
def test_undeclared_length_beyond_the_cap_is_refused(
    public: Receiver, reply: replies.Reply
) -> None:
    public.reply = reply
    assert isinstance(failure(fetch(public.url, max_bytes=1000)), TooLarge)


def test_no_more_than_the_cap_is_ever_handed_on(public: Receiver) -> None:
    public.reply = replies.endless_body()

    async def count(outbound: Outbound) -> int:
        size_bytes = 0
        with contextlib.suppress(TooLarge):
            async with outbound.fetch(public.url, max_bytes=300_000) as chunks:
                async for chunk in chunks:
                    size_bytes += len(chunk)
        return size_bytes

    assert 0 < run(count) <= 300_000


@pytest.mark.parametrize(
    "reply",
    [
        replies.wrong_length(b"short", 1000),
        replies.chunked([b"cut", b"off"], ends=False),
        replies.close_early(),
        replies.huge_header(),
        replies.continue_flood(),
        replies.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
        replies.status(200, gzip.compress(bytes(1000)), {"Content-Encoding": "gzip"}),
        replies.status(200, b"x", {"Content-Encoding": "identity, br"}),
    ],
    ids=["short", "cut off", "close", "huge header", "100 flood", "chunk", "gzip", "br"],
)
def test_broken_or_encoded_answer_is_an_error(public: Receiver, reply: replies.Reply) -> None:
    public.reply = reply
    assert failure(fetch(public.url)).reason == "protocol_error"


def test_bytes_beyond_the_declared_length_are_not_taken(public: Receiver) -> None:
    public.reply = replies.wrong_length(b"four and more", 4)
    assert run(fetch(public.url)) == b"four"


def test_header_deadline_holds_for_all_hops_together(public: Receiver) -> None:
    public.reply = replies.slow(0.4, replies.redirect("/next"))
    start = time.monotonic()
    error = failure(fetch(public.url, header_seconds=0.6))
    assert (error.reason, len(public.requests)) == ("timeout", 2)
    assert time.monotonic() - start < 8


def test_dripping_file_ends_with_the_total_deadline(public: Receiver) -> None:
    public.reply = replies.drip()
    assert failure(fetch(public.url, total_seconds=0.5)).reason == "timeout"


def test_header_deadline_does_not_end_a_slow_body(public: Receiver) -> None:
    public.reply = replies.chunked(_slowly([b"a", b"b", b"c"], pause_seconds=0.3))
    assert run(fetch(public.url, header_seconds=0.5)) == b"abc"


def _slowly(chunks: Iterable[bytes], pause_seconds: float) -> Iterator[bytes]:
    for chunk in chunks:
        time.sleep(pause_seconds)
        yield chunk


def test_download_left_early_closes_its_connection(public: Receiver) -> None:
    public.reply = replies.endless_body()

    async def first_chunk(outbound: Outbound) -> bytes:
        async with outbound.fetch(public.url, max_bytes=10_000_000) as chunks:
            async for chunk in chunks:
                return chunk
        return b""

    assert run(first_chunk).startswith(b"x")


def test_error_of_the_reader_passes_through_unchanged(public: Receiver) -> None:
    public.serve("/", b"content")

    async def fail(outbound: Outbound) -> None:
        async with outbound.fetch(public.url_for("/"), max_bytes=100):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(fail)


def test_many_tiny_chunks_leave_the_event_loop_to_others(public: Receiver) -> None:
    body = b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n"
    public.reply = replies.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    chunks_in_turn: list[int] = [0]

    async def take_turns() -> None:
        while True:
            chunks_in_turn.append(0)
            await asyncio.sleep(0)

    async def read(outbound: Outbound) -> None:
        others = asyncio.create_task(take_turns())
        async with outbound.fetch(public.url, max_bytes=10_000) as chunks:
            async for _ in chunks:
                chunks_in_turn[-1] += 1
        others.cancel()

    run(read)
    assert sum(chunks_in_turn) == 10_000
    assert max(chunks_in_turn) <= CHUNKS_BETWEEN_PAUSES


# --- logs -------------------------------------------------------------------------------------


def test_no_credential_query_or_address_is_logged_or_said(
    public: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(post(f"{public.url}/hook?token=hunter2"))
    said = [
        failure(post("http://me:hunter2@name.test/?hunter2"), resolver=Names()),
        failure(fetch("http://unknown.test/?hunter2"), resolver=Names()),
        failure(fetch("http://name.test/?hunter2"), resolver=names(name=["10.20.30.40"])),
    ]
    for text in [caplog.text, *(error.message for error in said)]:
        assert "hunter2" not in text
        assert "10.20.30.40" not in text
