"""Thumbnails as visitors see them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import pictures
from tests.delivery.support import image_of, is_refused, put, visit
from tests.pictures import GREEN, QUADRANTS, RED, YELLOW
from tests.server import LoupeServer

BROWSER = "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"


def thumbnail_of(server: LoupeServer, content: bytes, name: str = "picture.jpg") -> Any:
    return image_of(visit(put(server, content, name)["thumbnailUrl"]))


def has_colour(image: Any, x_share: float, y_share: float, colour: pictures.Colour) -> bool:
    """At a place given as shares of the sides; as near as a lossy format comes."""
    found = image.getpoint(int(image.width * x_share), int(image.height * y_share))
    return all(abs(is_ - was) < 40 for is_, was in zip(found, colour, strict=False))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1200, 600), (300, 150)),
        ((600, 1200), (150, 300)),
        ((302, 302), (300, 300)),
        ((300, 300), (300, 300)),
        ((240, 160), (240, 160)),
        ((2, 2), (2, 2)),
        ((4000, 2), (300, 1)),
        ((2, 4000), (1, 300)),
        ((16_000, 12), (300, 1)),
    ],
)
def test_a_thumbnail_fits_inside_300_and_is_never_enlarged(
    shared_server: LoupeServer, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    drawn = pictures.quadrants(*size)
    for content in (pictures.as_jpeg(drawn), pictures.as_png(drawn), drawn.webpsave_buffer()):
        image = thumbnail_of(shared_server, content)
        assert (image.width, image.height) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_thumbnail_is_upright_whatever_the_orientation(
    shared_server: LoupeServer, orientation: int
) -> None:
    image = thumbnail_of(shared_server, pictures.oriented_jpeg(orientation))
    assert (image.width, image.height) == (240, 160)
    places = [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    for place, colour in zip(places, QUADRANTS, strict=True):
        assert has_colour(image, *place, colour)
    assert not image.get_typeof("orientation")


@pytest.mark.parametrize(
    "name", ["png-alpha", "png-16-bit-alpha", "webp-alpha", "gif-1x1-transparent"]
)
def test_a_thumbnail_keeps_transparency(shared_server: LoupeServer, name: str) -> None:
    image = thumbnail_of(shared_server, pictures.PICTURES[name](), name)
    assert image.hasalpha()
    assert image.getpoint(0, 0)[-1] == 0
    if image.width > 1:
        assert image.getpoint(image.width - 1, 0)[-1] == 255
        assert has_colour(image, 0.75, 0.25, GREEN)


@pytest.mark.parametrize("name", ["jpeg-cmyk", "jpeg-display-p3", "png-16-bit", "png-palette"])
def test_a_thumbnail_shows_the_colours_of_the_picture(
    shared_server: LoupeServer, name: str
) -> None:
    image = thumbnail_of(shared_server, pictures.PICTURES[name](), name)
    assert image.interpretation == "srgb"
    assert has_colour(image, 0.25, 0.25, RED)
    assert has_colour(image, 0.75, 0.25, GREEN)
    assert has_colour(image, 0.75, 0.75, YELLOW)


@pytest.mark.parametrize("name", ["gif-animated", "webp-animated"])
def test_a_thumbnail_of_an_animation_is_its_first_frame(
    shared_server: LoupeServer, name: str
) -> None:
    image = thumbnail_of(shared_server, pictures.PICTURES[name](), name)
    assert (image.width, image.height) == (240, 160)
    assert has_colour(image, 0.25, 0.25, RED)


def test_an_image_with_broken_pixels_has_no_thumbnail_and_the_answer_says_why(
    shared_server: LoupeServer,
) -> None:
    uploaded = put(shared_server, pictures.truncated_jpeg())
    for _ in range(2):
        answer = visit(uploaded["thumbnailUrl"])
        assert is_refused(answer, 400)
        assert "broken or incomplete" in answer.json()["message"]
    assert visit(uploaded["url"]).content == pictures.truncated_jpeg()


@pytest.mark.parametrize("name", ["text", "svg", "pdf", "heic", "bmp", "random"])
def test_what_is_no_image_has_no_thumbnail_and_the_answer_says_why(
    shared_server: LoupeServer, name: str
) -> None:
    uploaded = put(shared_server, pictures.PICTURES[name](), "a.jpg")
    assert "thumbnailUrl" not in uploaded
    answer = visit(f"{uploaded['url']}?tr=n-ik_ml_thumbnail")
    assert is_refused(answer, 400)
    assert "not an image" in answer.json()["message"]


def test_a_new_version_has_a_new_thumbnail(server: LoupeServer) -> None:
    first = put(server, pictures.jpeg(), "a.jpg", folder="/a")
    before = visit(first["thumbnailUrl"])
    second = put(server, pictures.half_transparent().pngsave_buffer(), "a.jpg", folder="/a")
    after = visit(second["thumbnailUrl"], if_none_match=before.headers["etag"])
    assert image_of(after).hasalpha()
    old = visit(f"{first['thumbnailUrl']}?ik-obj-version={first['versionInfo']['id']}")
    assert old.content == before.content


def test_a_burst_for_one_thumbnail_gets_the_same_bytes(shared_server: LoupeServer) -> None:
    url = put(shared_server, pictures.jpeg(2000, 1000))["thumbnailUrl"]
    with ThreadPoolExecutor(8) as visitors:
        answers = list(visitors.map(visit, [url] * 16))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


@pytest.mark.parametrize("name", ["jpeg", "png-alpha", "webp-animated"])
def test_who_accepts_webp_gets_webp(shared_server: LoupeServer, name: str) -> None:
    url = put(shared_server, pictures.PICTURES[name](), name)["thumbnailUrl"]
    usual, webp = visit(url), visit(url, accept=BROWSER)
    assert webp.headers["content-type"] == "image/webp"
    assert usual.headers["content-type"] in ("image/jpeg", "image/png")
    assert image_of(webp).hasalpha() == image_of(usual).hasalpha()
    assert image_of(webp).width == image_of(usual).width
    assert has_colour(image_of(webp), 0.75, 0.25, GREEN)


@pytest.mark.parametrize("accept", ["*/*", "image/*", "image/jpeg,image/png", "image/webp;q=0", ""])
def test_who_does_not_name_webp_gets_none(shared_server: LoupeServer, accept: str) -> None:
    answer = visit(put(shared_server)["thumbnailUrl"], accept=accept)
    assert answer.headers["content-type"] == "image/jpeg"


def test_caches_are_told_that_the_format_depends_on_what_is_accepted(
    shared_server: LoupeServer,
) -> None:
    uploaded = put(shared_server)
    url = uploaded["thumbnailUrl"]
    for accept in ("*/*", BROWSER):
        etag = visit(url, accept=accept).headers["etag"]
        for method, known, status_code in (
            ("GET", "none", 200),
            ("HEAD", "none", 200),
            ("GET", etag, 304),
            ("HEAD", etag, 304),
        ):
            answer = visit(url, method, accept=accept, if_none_match=known)
            assert answer.status_code == status_code
            assert (answer.headers["vary"], answer.headers["etag"]) == ("Accept", etag)
    assert "vary" not in visit(uploaded["url"], accept=BROWSER).headers


def test_each_format_has_an_etag_of_its_own(shared_server: LoupeServer) -> None:
    url = put(shared_server)["thumbnailUrl"]
    usual, webp = visit(url), visit(url, accept=BROWSER)
    assert usual.headers["etag"] != webp.headers["etag"]
    answer = visit(url, accept=BROWSER, if_none_match=usual.headers["etag"])
    assert (answer.status_code, answer.content) == (200, webp.content)
    assert visit(url, accept=BROWSER, if_none_match=webp.headers["etag"]).status_code == 304


def test_head_of_a_webp_thumbnail_is_get_without_the_bytes(shared_server: LoupeServer) -> None:
    url = put(shared_server)["thumbnailUrl"]
    head, got = visit(url, "HEAD", accept=BROWSER), visit(url, accept=BROWSER)
    assert head.content == b""
    for name in ("content-type", "content-length", "etag", "vary"):
        assert head.headers[name] == got.headers[name]
