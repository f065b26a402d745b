"""Parts of files. Source: RFC 9110, section 14."""

import pytest

from tests.delivery.support import put, raw_exchange, visit
from tests.server import LoupeServer

CONTENT = bytes(range(256)) * 4
SIZE = len(CONTENT)


@pytest.fixture(scope="module")
def url(shared_server: LoupeServer) -> str:
    return str(put(shared_server, CONTENT, "bytes.bin")["url"])


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-199", 100, 200),
        ("bytes=1000-", 1000, SIZE),
        ("bytes=1000-9999999", 1000, SIZE),
        ("bytes=0-", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-100", SIZE - 100, SIZE),
        ("bytes=-9999999", 0, SIZE),
        ("bytes= 5-6", 5, 7),
    ],
)
def test_one_range_gets_that_part(url: str, asked: str, start: int, end: int) -> None:
    answer = visit(url, range=asked)
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert answer.headers["content-length"] == str(end - start)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"] == visit(url).headers["etag"]


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_outside_the_file_is_416_and_says_how_long_the_file_is(
    url: str, asked: str
) -> None:
    answer = visit(url, range=asked)
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    assert set(answer.json()) == {"message", "help"}


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1,5-6",
        "bytes=" + ",".join(["0-"] * 1000),
        "bytes=9-5",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "bytes=+1-2",
        "bytes=١-٢",
        "lines=0-1",
        "0-1",
        "bytes=" + "0" * 10_000 + "-1",
    ],
    ids=lambda asked: asked[:16],
)
def test_several_ranges_or_none_that_makes_sense_get_the_whole(url: str, asked: str) -> None:
    answer = visit(url, range=asked.encode("utf-8"))  # type: ignore[arg-type]
    assert answer.status_code == 200
    assert answer.content == CONTENT
    assert "content-range" not in answer.headers


def test_if_range_gets_the_part_only_of_the_same_bytes(url: str) -> None:
    etag = visit(url).headers["etag"]
    assert visit(url, range="bytes=0-9", if_range=etag).status_code == 206
    for other in ('"other"', f"W/{etag}", "Mon, 23 Nov 2026 00:00:00 GMT"):
        answer = visit(url, range="bytes=0-9", if_range=other)
        assert (answer.status_code, answer.content) == (200, CONTENT)


def test_an_outdated_if_range_beats_a_range_outside_the_file(url: str) -> None:
    assert visit(url, range=f"bytes={SIZE}-", if_range='"other"').status_code == 200


def test_not_modified_comes_before_the_range(url: str) -> None:
    etag = visit(url).headers["etag"]
    assert visit(url, range="bytes=0-9", if_none_match=etag).status_code == 304


def test_a_range_belongs_to_get_only(shared_server: LoupeServer, url: str) -> None:
    answer = visit(url, "HEAD", range="bytes=0-9")
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(SIZE)


def test_a_part_of_a_large_file_is_streamed_from_its_middle(shared_server: LoupeServer) -> None:
    content = b"".join(number.to_bytes(4) for number in range(250_000))
    url = put(shared_server, content, "numbers.bin")["url"]
    start, end = 400_001, 900_003
    answer = visit(url, range=f"bytes={start}-{end - 1}")
    assert answer.content == content[start:end]


def test_a_range_sent_twice_is_no_error(shared_server: LoupeServer, url: str) -> None:
    path = url.removeprefix(shared_server.url).encode()
    head = b"GET " + path + b" HTTP/1.1\r\nRange: bytes=0-1\r\nRange: bytes=2-3"
    with raw_exchange(shared_server, head) as answer:
        assert answer.status in (200, 206)
