"""The multipart form as it arrives: the file in four shapes, and forms that are not right."""

import base64
import random
from collections.abc import Iterator

import pytest

from app.files.form import MAX_FIELD_BYTES, MAX_PART_HEADER_BYTES, MAX_PARTS
from tests import pictures
from tests.files.helpers import (
    BOUNDARY,
    PICTURE,
    UPLOAD,
    RawConnection,
    accepted,
    form_body,
    form_part,
    nothing_left,
    on_sqlite_only,
    post_body,
    post_form,
    refused,
    upload,
)
from tests.files.test_upload import stored_bytes
from tests.server import LoupeServer

NAME = form_part("fileName", b"a.jpg")
NO_FILE = "Your request is missing file parameter."
NO_NAME = "Your request is missing fileName parameter."
SAMPLE = random.Random(1).randbytes(10_000_000)  # of a fixed seed


def send_file_as_text(server: LoupeServer, text: str, **fields: str) -> bytes:
    """What is stored when `file` is sent as text."""
    fields = {"fileName": "a.bin", **fields}
    answer = accepted(post_form(server, {"file": text, **fields}))
    content = stored_bytes(server, answer["fileId"])
    assert answer["size"] == len(content)
    return content


# --- the shapes of a file ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 1023, 1024 * 1024 - 1, 1024 * 1024, 3_000_001])
def test_a_binary_part_is_stored_as_it_is(shared_server: LoupeServer, size: int) -> None:
    content = SAMPLE[:size]
    assert stored_bytes(shared_server, upload(shared_server, content)["fileId"]) == content


def test_a_file_that_holds_a_boundary_of_another_form_is_stored_whole(
    shared_server: LoupeServer,
) -> None:
    content = b"\r\n--" + BOUNDARY[:-1] + b"\r\n\r\n--\r\n--other--\r\n" * 1000
    answer = post_body(shared_server, form_body(NAME, form_part("file", content, "a")))
    assert stored_bytes(shared_server, accepted(answer)["fileId"]) == content


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"], ids=["bare", "data-uri"])
def test_base64_of_10_megabytes_is_stored(shared_server: LoupeServer, prefix: str) -> None:
    text = prefix + base64.b64encode(SAMPLE).decode()
    assert send_file_as_text(shared_server, text) == SAMPLE


@pytest.mark.parametrize("size", range(1, 14))
def test_base64_of_any_length_is_decoded(shared_server: LoupeServer, size: int) -> None:
    content = SAMPLE[:size]
    assert send_file_as_text(shared_server, base64.b64encode(content).decode()) == content


def test_base64_may_have_line_breaks_and_the_url_safe_alphabet(
    shared_server: LoupeServer,
) -> None:
    content = SAMPLE[:5000]
    for text in (
        base64.encodebytes(content).decode(),
        base64.encodebytes(content).decode().replace("\n", "\r\n "),
        base64.urlsafe_b64encode(content).decode(),
        f"\n {base64.b64encode(content).decode()} \n",
    ):
        assert send_file_as_text(shared_server, text) == content


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/jpeg;base64,{}",
        "data:;base64,{}",
        "data:text/html;charset=utf-8;base64,{}",
        "DATA:image/gif;BASE64,{}",
        'data:image/png;name="a.png";base64,{}',
    ],
)
def test_a_data_uri_is_typed_by_its_content(shared_server: LoupeServer, uri: str) -> None:
    text = uri.format(base64.b64encode(PICTURE).decode())
    answer = accepted(post_form(shared_server, {"file": text, "fileName": "a.html"}))
    assert answer["fileType"] == "image"
    assert shared_server.details(answer["fileId"])["mime"] == "image/jpeg"


def test_the_transparent_dot_of_web_pages_is_an_image(shared_server: LoupeServer) -> None:
    fields = {"file": pictures.transparent_gif_data_uri(), "fileName": "dot.gif"}
    answer = accepted(post_form(shared_server, fields))
    assert (answer["fileType"], answer["width"], answer["height"]) == ("image", 1, 1)


@pytest.mark.parametrize(
    "text",
    [
        "QQ",
        "QQ=",
        "Q===",
        "QQ==QQ==",
        "QQ==" + "Q" * 4000,
        "A" * 100_001,
        "A" * 100_000 + "!AAA",
        "=AAA",
        "*&^%",
        "just some text, no base64",
        "file:///etc/passwd",
        "ftp://example.com/a.jpg",
        "gopher://example.com/",
        "javascript:alert(1)",
        "//example.com/a.jpg",
        "data:",
        "data:image/png;base64",
        "data:image/png,plain",
        "data:image/png;base64,QQ",
        "data:image/png;base64,data:image/png;base64,QQ==",
        "data:" + "x" * 100_000 + ";base64,QQ==",
        "\0\0\0\0",
        "ＱＱ＝＝",
    ],
)
def test_text_that_is_no_file_is_400(shared_server: LoupeServer, text: str) -> None:
    with nothing_left(shared_server):
        answer = post_form(shared_server, {"file": text, "fileName": "a.jpg"})
        assert "file parameter" in refused(answer, 400)


def test_a_file_may_come_in_tiny_pieces(shared_server: LoupeServer) -> None:
    """Each byte of the framing and of the base64 in a chunk of its own."""
    content = SAMPLE[:200]
    for part in (
        form_part("file", content, "a.bin"),
        form_part("file", base64.b64encode(content)),
        form_part("file", b"data:image/png;base64," + base64.b64encode(content)),
    ):
        body = form_body(NAME, part)
        answer = post_body(shared_server, (body[i : i + 1] for i in range(len(body))))
        assert stored_bytes(shared_server, accepted(answer)["fileId"]) == content


@pytest.mark.parametrize("epilogue", [b"", b"\n", b" ", b"\r\nan epilogue, to be ignored"])
def test_what_follows_the_closing_boundary_means_nothing(
    shared_server: LoupeServer, epilogue: bytes
) -> None:
    body = form_body(NAME, form_part("file", b"content", "a.txt"))[:-2]
    accepted(post_body(shared_server, body + epilogue))
    accepted(post_body(shared_server, iter([body, epilogue or b"\r\n"])))


def test_a_form_that_goes_on_after_its_end_is_400(shared_server: LoupeServer) -> None:
    body = form_body(NAME, form_part("file", b"content", "a.txt"))
    with nothing_left(shared_server):
        refused(post_body(shared_server, iter([body, *[b"x" * 100_000] * 30])), 400)


# --- what is missing --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [form_part("file", b"", "a.jpg")],
        [form_part("file", b"", "")],
        [form_part("file", b"")],
        [form_part("file", b" \r\n ")],
        [form_part("file", b"data:text/html;base64,")],
        [form_part("File", b"content", "a.jpg")],
    ],
)
def test_a_missing_or_empty_file_is_400(shared_server: LoupeServer, parts: list[bytes]) -> None:
    with nothing_left(shared_server):
        refused(post_body(shared_server, form_body(NAME, *parts)), 400, NO_FILE)


@pytest.mark.parametrize("name", [None, "", " ", "   ", ".", "..", " . ", "\t", "\u3000"])
def test_a_missing_file_name_is_400(shared_server: LoupeServer, name: str | None) -> None:
    parts = [] if name is None else [form_part("fileName", name.encode())]
    file = form_part("file", PICTURE, "named-here.jpg")
    with nothing_left(shared_server):
        refused(post_body(shared_server, form_body(file, *parts)), 400, NO_NAME)
        refused(post_body(shared_server, form_body(*parts, file)), 400, NO_NAME)


# --- forms that are not right -----------------------------------------------------------------

FILE = form_part("file", b"content", "a.txt")
GOOD = form_body(NAME, FILE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        GOOD[:-4],
        GOOD[: len(GOOD) // 2],
        GOOD.replace(b"\r\n\r\n", b"\r\n"),
        form_body(NAME, FILE, FILE),
        form_body(NAME, FILE, form_part("file", b"QQ==")),
        form_body(NAME, NAME, FILE),
        form_body(NAME, FILE, *[form_part("token", b"t")] * 2),
        form_body(NAME, FILE, *[form_part("signature", b"s")] * 2),
        form_body(NAME, FILE, *(form_part(f"f{n}", b"") for n in range(1001))),
        form_body(NAME, FILE, form_part("description", b"x" * (MAX_FIELD_BYTES + 1))),
        form_body(NAME, FILE, form_part("description", b"\xff\xfe")),
        form_body(form_part("fileName", b"\xffa.jpg"), FILE),
        form_body(NAME, form_part("x" * MAX_PART_HEADER_BYTES, b""), FILE),
        form_body(NAME, b"--" + BOUNDARY + b"\r\nX: " + b"y" * 65536 + b"\r\n\r\n\r\n", FILE),
        form_body(NAME, b"--" + BOUNDARY + b"\r\nContent-Type: text/plain\r\n\r\nx\r\n", FILE),
        form_body(
            b"--" + BOUNDARY + b'\r\nContent-Disposition: form-data; name="\xff"\r\n\r\n\r\n'
        ),
    ],
    ids=lambda body: repr(body[-40:]),
)
def test_a_form_that_is_not_right_is_400_and_leaves_nothing(
    shared_server: LoupeServer, body: bytes
) -> None:
    with nothing_left(shared_server):
        refused(post_body(shared_server, body), 400)


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'b' * 500}",
        "multipart/mixed; boundary=b",
        "application/x-www-form-urlencoded",
        "application/json",
        "multipart/form-data; boundary=\xff",
    ],
)
def test_a_body_of_another_type_is_400(
    shared_server: LoupeServer, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
    with nothing_left(shared_server):
        answer = shared_server.client.post(UPLOAD, content=GOOD, headers=headers)  # type: ignore[arg-type]
        refused(answer, 400)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity"])
def test_an_encoded_body_is_415_and_not_inflated(shared_server: LoupeServer, encoding: str) -> None:
    headers = {
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}",
        "Content-Encoding": encoding,
    }
    with nothing_left(shared_server):
        refused(shared_server.client.post(UPLOAD, content=GOOD, headers=headers), 415)


@pytest.mark.parametrize(
    "boundary",
    ["--randomBoundary---------------------", "-", "a" * 70, "'()+_,-./:=?", "x" * 200],
)
def test_boundaries_of_all_kinds_are_read(shared_server: LoupeServer, boundary: str) -> None:
    body = GOOD.replace(BOUNDARY, boundary.encode())
    headers = {"Content-Type": f'multipart/form-data; boundary="{boundary}"'}
    accepted(shared_server.client.post(UPLOAD, content=body, headers=headers))


def test_as_many_parts_as_allowed_are_read(shared_server: LoupeServer) -> None:
    more = [form_part(f"unknown{n}", b"ignored") for n in range(MAX_PARTS - 2)]
    accepted(post_body(shared_server, form_body(NAME, FILE, *more)))


def test_a_length_smaller_than_the_body_is_400_and_the_connection_closed(
    shared_server: LoupeServer,
) -> None:
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head(f"Content-Length: {len(GOOD) - 10}")
        connection.send(GOOD)
        answers = connection.read_to_end()
    assert answers.startswith(b"HTTP/1.1 400 ")


def test_broken_chunks_are_400_or_end_the_connection(shared_server: LoupeServer) -> None:
    with nothing_left(shared_server), RawConnection(shared_server.url) as connection:
        connection.send_upload_head("Transfer-Encoding: chunked")
        connection.send(b"5\r\nhello\r\nnot-a-size\r\n")
        received = connection.read_to_end()
    assert not received or received.startswith(b"HTTP/1.1 400 ")


@on_sqlite_only
def test_fields_of_a_chunked_form_arrive(server: LoupeServer) -> None:
    def pieces() -> Iterator[bytes]:
        yield from (NAME, form_part("tags", "a,ü".encode()))
        yield from (FILE[:20], FILE[20:], form_body())

    answer = accepted(post_body(server, pieces()))
    assert server.details(answer["fileId"])["tags"] == ["a", "ü"]
