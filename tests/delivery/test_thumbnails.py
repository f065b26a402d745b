"""Thumbnails as visitors see them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests import pictures
from tests.delivery.support import image_of, is_refused, put, visit
from tests.pictures import GREEN, QUADRANTS, RED, YELLOW
from tests.server import LoupeServer


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
