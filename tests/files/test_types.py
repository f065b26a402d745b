"""Types by content and not by name, and what counts as an image."""

import mimetypes

import pytest

from app.files.types import is_shown_inline, mime_type
from tests import pictures
from tests.conftest import Serve
from tests.files.helpers import nothing_left, on_sqlite_only, refused, upload, upload_as
from tests.server import LoupeServer

IMAGES = {
    "jpeg": "image/jpeg",
    "png": "image/png",
    "webp": "image/webp",
    "gif": "image/gif",
    "tiff": "image/tiff",
    "avif": "image/avif",
}


@pytest.mark.parametrize("sent_as", ["image/jpeg", "text/html", "", "application/x-evil"])
@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_is_known_by_its_content(
    shared_server: LoupeServer, kind: str, sent_as: str
) -> None:
    """Neither the name, nor the part's own name, nor its type has a say."""
    content = pictures.PICTURES[kind]()
    answer = shared_server.client.post(
        "/api/v1/files/upload",
        files={"file": ("page.html", content, sent_as)},
        data={"fileName": "a.txt"},
    )
    assert answer.status_code == 200
    details = shared_server.details(answer.json()["fileId"])
    assert (details["mime"], details["fileType"]) == (IMAGES[kind], "image")
    assert (details["width"], details["height"]) == (240, 160)


@pytest.mark.parametrize(
    ("kind", "mime"),
    [
        ("heic", None),
        ("bmp", None),
        ("svg", "image/svg+xml"),
        ("pdf", "application/pdf"),
        ("text", "text/plain"),
        ("random", None),
        ("png-broken-header", None),
    ],
)
def test_anything_else_is_a_non_image(
    shared_server: LoupeServer, kind: str, mime: str | None
) -> None:
    extension = "svg" if kind == "svg" else "txt"
    answer = upload(shared_server, pictures.PICTURES[kind](), fileName=f"a.{extension}")
    details = shared_server.details(answer["fileId"])
    assert details["fileType"] == answer["fileType"] == "non-image"
    for key in ("width", "height", "hasAlpha", "thumbnail", "orientation"):
        assert key not in details
    assert mime is None or details["mime"] == mime


@pytest.mark.parametrize("kind", ["random", "png-broken-header", "text"])
def test_what_only_claims_to_be_an_image_is_none(shared_server: LoupeServer, kind: str) -> None:
    answer = upload_as(shared_server, f"{kind}.jpg", pictures.PICTURES[kind]())
    assert answer["fileType"] == "non-image"
    assert "thumbnailUrl" not in answer


def test_a_truncated_image_is_an_image_by_its_header(shared_server: LoupeServer) -> None:
    answer = upload(shared_server, pictures.truncated_jpeg())
    assert (answer["fileType"], answer["width"], answer["height"]) == ("image", 600, 400)


def test_transparency_is_told(shared_server: LoupeServer) -> None:
    for kind in ("png-alpha", "webp-alpha", "gif-1x1-transparent"):
        file_id = upload(shared_server, pictures.PICTURES[kind]())["fileId"]
        assert shared_server.details(file_id)["hasAlpha"] is True, kind
    for kind in ("jpeg", "png", "webp"):
        file_id = upload(shared_server, pictures.PICTURES[kind]())["fileId"]
        assert shared_server.details(file_id)["hasAlpha"] is False, kind


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (10_001, 10_000)])
def test_more_pixels_than_allowed_are_refused_by_the_header(
    shared_server: LoupeServer, width: int, height: int
) -> None:
    with nothing_left(shared_server):
        answer = shared_server.upload(pictures.png_of_size(width, height))
        assert "pixels" in refused(answer, 400)
    allowed = upload(shared_server, pictures.png_of_size(10_000, 10_000))
    assert (allowed["width"], allowed["height"]) == (10_000, 10_000)


@on_sqlite_only
def test_the_pixel_limit_is_a_setting(serve: Serve) -> None:
    server = serve(max_pixels=240 * 160)
    upload(server, pictures.jpeg(240, 160))
    with nothing_left(server):
        refused(server.upload(pictures.jpeg(240, 162)), 400)


JPEG = pictures.jpeg()[:200]


@pytest.mark.parametrize(
    ("content", "name", "mime"),
    [
        (b"<html><script>", "a.html", "text/html"),
        (b"<html><script>", "A.HTM", "text/html"),
        (b"<html><script>", "a.jpg", "application/octet-stream"),
        (b"<html><script>", "a", "application/octet-stream"),
        (b"body { color: red }", "a.css", "text/css"),
        (b"alert(1)", "a.js", "text/javascript"),
        (b"alert(1)", "a.mjs", "text/javascript"),
        (b"{}", "a.json", "application/json"),
        (b"a,b", "a.csv", "text/csv"),
        (b"<svg/>", "a.svg", "image/svg+xml"),
        ("grüße".encode(), "a.txt", "text/plain"),
        (b"plain", "a.exe", "application/octet-stream"),
        (b"plain", "a.pdf", "application/octet-stream"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "a.txt", "application/pdf"),
        (b"%PDF-1.4\nall of it text", "a.txt", "application/pdf"),
        (b"\x00\x01\x02\x03", "a.html", "application/octet-stream"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "a.html", "image/png"),
        (b"", "a.txt", "text/plain"),
    ],
)
def test_binary_is_typed_by_magic_and_text_by_extension(
    content: bytes, name: str, mime: str
) -> None:
    assert mime_type(content, name) == mime


def test_text_may_be_cut_in_the_middle_of_a_character() -> None:
    text = "ü世界👍".encode() * 3
    for end in range(len(text) - 13, len(text)):
        assert mime_type(text[:end], "a.txt") == "text/plain"


def test_the_type_does_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mimetypes, "guess_type", lambda name: ("application/x-local", None))
    assert mime_type(b"a", "a.css") == "text/css"
    assert mime_type(b"a", "a.unknown") == "application/octet-stream"


def test_only_media_are_shown_inline() -> None:
    assert all(is_shown_inline(mime) for mime in ("image/png", "video/mp4", "audio/mpeg"))
    assert not any(
        is_shown_inline(mime)
        for mime in ("text/html", "application/pdf", "application/octet-stream", "text/plain")
    )
