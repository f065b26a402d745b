"""Every format and shape of picture on its whole way: upload, both providers, delivery, thumbnail.

The emulated providers enforce the limits that the real ones document.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import pyvips
from sqlalchemy import select

from app.extensions.models import runs
from app.images import ImagePool
from tests import pictures
from tests.conftest import clean_environment, start_server
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.pictures import PICTURES
from tests.server import EventLoop, LoupeServer

EXTENSIONS = (
    '[{"name": "google-auto-tagging", "minConfidence": 98, "maxTags": 5},'
    ' {"name": "aws-auto-tagging", "minConfidence": 98, "maxTags": 5}]'
)
TAGS = [
    {"name": "Cat", "confidence": 98.5, "source": "aws-auto-tagging"},
    {"name": "Cat", "confidence": 98.5, "source": "google-auto-tagging"},
]
LONG_SIDE_PX, SHORT_SIDE_PX, BOX_PX = 1024, 80, 300


@dataclass(frozen=True, slots=True)
class World:
    server: LoupeServer
    vision: VisionEmulator
    rekognition: RekognitionEmulator

    @property
    def call_count(self) -> int:
        return len(self.vision.calls) + len(self.rekognition.calls)

    def upload(self, content: bytes, name: str) -> httpx.Response:
        return self.server.upload(content, name, extensions=EXTENSIONS)

    def reasons(self, file_id: str) -> set[str]:
        rows = self.server.rows(select(runs.c.reason).where(runs.c.file_id == file_id))
        assert len(rows) == 2
        return {row.reason for row in rows}


@pytest.fixture(scope="module")
def world(
    event_loop_thread: EventLoop,
    shared_images: ImagePool,
    sqlite_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    """A server with both providers and all the time it may need."""
    folder = tmp_path_factory.mktemp("formats")
    database = folder / "loupe.db"
    database.write_bytes(sqlite_template.read_bytes())
    with (
        pytest.MonkeyPatch.context() as environment,
        VisionEmulator() as vision,
        RekognitionEmulator() as rekognition,
    ):
        clean_environment(environment)
        environment.setenv("LOUPE_VISION_ENDPOINT", vision.endpoint)
        environment.setenv("LOUPE_VISION_INSECURE", "true")
        environment.setenv("AWS_ENDPOINT_URL_REKOGNITION", rekognition.url)
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = start_server(
            event_loop_thread,
            shared_images,
            folder,
            f"sqlite:///{database}",
            google_auto_tagging="vision",
            aws_auto_tagging="rekognition",
            sync_budget_seconds=30,
        )
        yield World(server, vision, rekognition)
        server.stop()


class Image(NamedTuple):
    """What an upload should be seen as. Sizes as stored, before the orientation is applied."""

    mime: str
    width_px: int = pictures.QUADRANT_WIDTH
    height_px: int = pictures.QUADRANT_HEIGHT
    has_alpha: bool = False
    orientation: int = 1


JPEG, PNG, WEBP, GIF = (f"image/{name}" for name in ("jpeg", "png", "webp", "gif"))
IMAGES = {
    "jpeg": Image(JPEG),
    **{f"jpeg-orientation-{n}": Image(JPEG, orientation=n) for n in range(1, 5)},
    **{f"jpeg-orientation-{n}": Image(JPEG, 160, 240, orientation=n) for n in range(5, 9)},
    "jpeg-progressive": Image(JPEG),
    "jpeg-cmyk": Image(JPEG),
    "jpeg-cmyk-without-profile": Image(JPEG),
    "jpeg-display-p3": Image(JPEG),
    "jpeg-grey": Image(JPEG),
    "jpeg-12000-wide": Image(JPEG, 12_000, 2_000),
    "jpeg-noisy": Image(JPEG, 1_500, 1_500),
    "jpeg-with-html-tail": Image(JPEG),
    "jpeg-long-metadata": Image(JPEG, 160, 240, orientation=6),
    "jpeg-5000x2": Image(JPEG, 5_000, 2),
    "png": Image(PNG),
    "png-16-bit": Image(PNG),
    "png-16-bit-alpha": Image(PNG, has_alpha=True),
    "png-palette": Image(PNG),
    "png-alpha": Image(PNG, has_alpha=True),
    "png-grey": Image(PNG),
    "png-interlaced": Image(PNG),
    "png-1x1": Image(PNG, 1, 1),
    "png-5000x2": Image(PNG, 5_000, 2),
    "png-2x5000": Image(PNG, 2, 5_000),
    "webp": Image(WEBP),
    "webp-alpha": Image(WEBP, has_alpha=True),
    "webp-animated": Image(WEBP),
    "webp-5000x2": Image(WEBP, 5_000, 2),
    # libvips keeps a palette entry for transparency in every GIF that it writes.
    "gif": Image(GIF, has_alpha=True),
    "gif-animated": Image(GIF, has_alpha=True),
    "gif-1x1-transparent": Image(GIF, 1, 1, has_alpha=True),
    "avif": Image("image/avif"),
    "tiff": Image("image/tiff"),
    "tiff-big-endian": Image("image/tiff", 8, 8),
}
OWN: dict[str, Callable[[], bytes]] = {
    "jpeg-5000x2": lambda: pictures.jpeg(5_000, 2),
    "png-2x5000": lambda: pictures.as_png(pictures.plain(2, 5_000, pictures.RED)),
    "webp-5000x2": lambda: bytes(pictures.plain(5_000, 2, pictures.RED).webpsave_buffer()),
}


def bytes_of(name: str) -> bytes:
    return (PICTURES.get(name) or OWN[name])()


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=60, verify=False)


def read_jpeg(content: bytes) -> Any:
    return pyvips.Operation.call("jpegload_buffer", content).copy_memory()


def test_every_picture_that_is_read_well_is_expected_below() -> None:
    assert set(pictures.READABLE) == set(IMAGES) - set(OWN)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_is_recognised_tagged_and_delivered_with_a_thumbnail(
    world: World, name: str
) -> None:
    content, expected = bytes_of(name), IMAGES[name]
    calls = world.call_count
    answer = world.upload(content, "picture.bin")
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    assert uploaded["fileType"] == "image"
    assert (uploaded["width"], uploaded["height"]) == (expected.width_px, expected.height_px)
    assert uploaded["orientation"] == expected.orientation
    assert uploaded["extensionStatus"] == {
        "google-auto-tagging": "success",
        "aws-auto-tagging": "success",
    }
    assert uploaded["AITags"] == TAGS
    assert world.call_count == calls + 2
    details = world.server.details(uploaded["fileId"])
    assert (details["mime"], details["hasAlpha"]) == (expected.mime, expected.has_alpha)
    assert details["size"] == len(content)
    assert_providers_saw_one_normalised_jpeg(world, expected)
    delivered = get(uploaded["url"])
    assert delivered.content == content
    assert delivered.headers["content-type"] == expected.mime
    assert_thumbnail_fits(get(uploaded["thumbnailUrl"]), expected)


def assert_providers_saw_one_normalised_jpeg(world: World, expected: Image) -> None:
    sent = world.vision.calls[-1].image
    assert sent == world.rekognition.calls[-1].image
    image = read_jpeg(sent)
    assert min(image.width, image.height) >= SHORT_SIDE_PX
    assert max(image.width, image.height) <= LONG_SIDE_PX
    assert (image.bands, image.interpretation) == (3, "srgb")
    assert not image.get_typeof("orientation")
    assert not image.get_typeof("icc-profile-data")
    is_upright_wide = upright(expected)[0] > upright(expected)[1]
    assert (image.width > image.height) == is_upright_wide


def upright(image: Image) -> tuple[int, int]:
    size = image.width_px, image.height_px
    return size[::-1] if image.orientation >= 5 else size


def assert_thumbnail_fits(answer: httpx.Response, expected: Image) -> None:
    assert answer.status_code == 200, answer.text
    loader = {JPEG: "jpegload_buffer", PNG: "pngload_buffer"}[answer.headers["content-type"]]
    image = pyvips.Operation.call(loader, answer.content).copy_memory()
    width, height = upright(expected)
    shrink = max(width / BOX_PX, height / BOX_PX, 1)
    assert abs(image.width - max(width / shrink, 1)) < 1
    assert abs(image.height - max(height / shrink, 1)) < 1
    assert image.hasalpha() == expected.has_alpha


NOT_IMAGES = {
    "text": "application/octet-stream",
    "random": "application/octet-stream",
    "heic": None,
    "bmp": None,
    "svg": "application/octet-stream",
    "pdf": None,
    "png-broken-header": None,
    "png-many-chunks": None,
    "jpeg-many-markers": None,
    "webp-many-frames": None,
    "tiff-many-pages": None,
    "tiff-circular": None,
}


def test_every_file_that_is_no_image_is_expected_above() -> None:
    assert set(pictures.NOT_IMAGES) - {"empty"} == set(NOT_IMAGES)


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_kept_and_costs_no_call(world: World, name: str) -> None:
    content, mime = bytes_of(name), NOT_IMAGES[name]
    calls = world.call_count
    answer = world.upload(content, "named.jpg")
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    assert uploaded["fileType"] == "non-image"
    assert not {"width", "height", "orientation", "thumbnailUrl"} & set(uploaded)
    assert_failed_without_a_call(world, uploaded, calls, "unsupported_media")
    details = world.server.details(uploaded["fileId"])
    assert mime in (None, details["mime"])
    assert not {"thumbnail", "hasAlpha"} & set(details)
    assert get(uploaded["url"]).content == content
    refused = get(f"{uploaded['url']}?tr=n-ik_ml_thumbnail")
    assert refused.status_code == 400
    assert set(refused.json()) == {"message", "help"}


def assert_failed_without_a_call(
    world: World, uploaded: dict[str, Any], calls: int, reason: str
) -> None:
    assert uploaded["extensionStatus"] == {
        "google-auto-tagging": "failed",
        "aws-auto-tagging": "failed",
    }
    assert uploaded["AITags"] is None
    assert world.call_count == calls
    assert world.reasons(uploaded["fileId"]) == {reason}


@pytest.mark.parametrize(
    "make",
    [
        pictures.truncated_jpeg,
        lambda: pictures.png()[: len(pictures.png()) // 2],
        lambda: pictures.png_of_size(640, 480),
    ],
    ids=["jpeg", "png", "png without its pixels"],
)
def test_an_image_with_broken_pixels_is_kept_and_costs_no_call(
    world: World, make: Callable[[], bytes]
) -> None:
    calls = world.call_count
    uploaded = world.upload(make(), "picture.jpg").json()
    assert uploaded["fileType"] == "image"
    assert uploaded["width"] > 0
    assert_failed_without_a_call(world, uploaded, calls, "image_unreadable")
    assert get(uploaded["url"]).content == make()
    assert get(uploaded["thumbnailUrl"]).status_code == 400


@pytest.mark.parametrize(
    "make",
    [
        pictures.empty,
        pictures.bomb_header_png,
        lambda: pictures.png_of_size(13_000, 13_000),
        pictures.zero_png,
    ],
    ids=["empty", "50000x50000", "169 megapixels", "0x0"],
)
def test_an_empty_file_or_an_impossible_size_is_refused(
    world: World, make: Callable[[], bytes]
) -> None:
    calls = world.call_count
    files = len(world.server.client.get("/v1/files").json())
    answer = world.upload(make(), "picture.png")
    assert answer.status_code == 400
    assert set(answer.json()) == {"message", "help"}
    assert world.call_count == calls
    assert len(world.server.client.get("/v1/files").json()) == files


def test_the_transparent_gif_of_web_pages_comes_as_a_data_uri(world: World) -> None:
    answer = world.server.client.post(
        "/api/v1/files/upload",
        files={
            "file": (None, pictures.transparent_gif_data_uri()),
            "fileName": (None, "spacer.gif"),
            "extensions": (None, EXTENSIONS),
        },
    )
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    assert (uploaded["fileType"], uploaded["width"], uploaded["height"]) == ("image", 1, 1)
    assert set(uploaded["extensionStatus"].values()) == {"success"}
    assert get(uploaded["url"]).content == pictures.transparent_gif()
    assert get(uploaded["thumbnailUrl"]).headers["content-type"] == PNG
