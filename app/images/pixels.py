"""The work on pixels. It runs in a child process, see `app.images.pool`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from app.images.headers import ImageHeader, read_header
from app.images.vips import loader

COPY_LONG_SIDE_PX = 1024
COPY_SHORT_SIDE_PX = 80  # Rekognition takes 80 to 10,000 px a side
COPY_QUALITY = 88
THUMBNAIL_QUALITY = 82

BROKEN = "The image data is broken or incomplete."


class ImageUnreadable(Exception):
    """The pixels are broken or too much work. The message says which, in words fit for users."""


@dataclass(frozen=True, slots=True)
class ProviderCopy:
    """The one picture that every provider gets: sRGB JPEG without metadata, 80 to 1024 px a side.

    source_*: the size of the upload as a viewer sees it, that is with its orientation applied.
    transparent_share: 0-1, how much of the picture was transparent before it was put on white.
    """

    jpeg: bytes
    width_px: int
    height_px: int
    source_width_px: int
    source_height_px: int
    transparent_share: float


@dataclass(frozen=True, slots=True)
class Rendition:
    """A picture made for delivery."""

    content: bytes
    mime: str
    width_px: int
    height_px: int


def _open_pixels(path: str, box_px: int, max_pixels: int) -> tuple[ImageHeader, Any]:
    """The header and the first frame, which decodes strictly once it is used."""
    header = read_header(Path(path))
    if header is None:
        raise ImageUnreadable(BROKEN)
    load = partial(loader(header.mime), path, access="sequential", fail_on="error")
    image = load()
    if not 0 < image.width * image.height <= max_pixels:
        raise ImageUnreadable(f"The image has more than {max_pixels:,} pixels.")
    shrink = max(image.width, image.height) / box_px
    if min(image.width, image.height) < shrink:
        shrink = 1  # so thin that a decoder would leave nothing of it; it has few pixels
    if header.mime == "image/jpeg" and shrink >= 4:
        # The decoder's shrinking is coarse: the last factor of two is left to the resizer.
        image = load(shrink=next(factor for factor in (8, 4, 2) if shrink >= 2 * factor))
    elif header.mime == "image/webp" and shrink >= 4:
        image = load(scale=2 / shrink)
    return header, image


def _fit(image: Any, box_px: int) -> Any:
    """Upright, in 8 bit sRGB, with alpha if it has any, and at most `box_px` a side. In memory."""
    fitted = image.thumbnail_image(box_px, height=box_px, size="down", output_profile="srgb")
    return fitted.colourspace("srgb").cast("uchar").copy_memory()


def _upright_size(header: ImageHeader) -> tuple[int, int]:
    if header.orientation >= 5:
        return header.height_px, header.width_px
    return header.width_px, header.height_px


def encode_jpeg(image: Any, quality: int) -> bytes:
    return bytes(image.jpegsave_buffer(Q=quality, keep="none"))


def make_provider_copy(path: str, max_pixels: int) -> ProviderCopy:
    header, pixels = _open_pixels(path, COPY_LONG_SIDE_PX, max_pixels)
    image = _fit(pixels, COPY_LONG_SIDE_PX)
    transparent_share = 0.0
    if image.hasalpha():
        transparent_share = 1 - image[-1].avg() / 255
        image = image.flatten(background=255)
    image = _pad(image, COPY_SHORT_SIDE_PX)
    source_width_px, source_height_px = _upright_size(header)
    return ProviderCopy(
        jpeg=encode_jpeg(image, COPY_QUALITY),
        width_px=image.width,
        height_px=image.height,
        source_width_px=source_width_px,
        source_height_px=source_height_px,
        transparent_share=transparent_share,
    )


def _pad(image: Any, side_px: int) -> Any:
    """At least `side_px` a side, by repeating the edges: a frame of its own would be seen, too."""
    width, height = max(image.width, side_px), max(image.height, side_px)
    return image.gravity("centre", width, height, extend="copy")


def make_thumbnail(path: str, max_pixels: int, box_px: int) -> Rendition:
    _, pixels = _open_pixels(path, box_px, max_pixels)
    image = _fit(pixels, box_px)
    if image.hasalpha():
        content, mime = bytes(image.pngsave_buffer(keep="none")), "image/png"
    else:
        content, mime = encode_jpeg(image, THUMBNAIL_QUALITY), "image/jpeg"
    return Rendition(content, mime, image.width, image.height)
