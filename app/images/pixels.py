"""The work on pixels. It runs in a child process, see `app.images.pool`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.images.headers import ImageHeader, read_header
from app.images.vips import loader

COPY_LONG_SIDE_PX = 1024
COPY_SHORT_SIDE_PX = 80  # Rekognition takes 80 to 10,000 px a side
COPY_QUALITY = 88
THUMBNAIL_QUALITY = 82
THUMBNAIL_WEBP_QUALITY = 80
THUMBNAIL_WEBP_EFFORT = 2  # half the work of libwebp's 4, for 4 % more bytes

# A JPEG decoder shrinks by 2, 4 or 8 almost for nothing, but coarsely. What is left to the resizer
# at the least: 1.5 costs less than 0.1 dB of the finished thumbnail, 1.25 up to 1 dB.
_LEFT_TO_RESIZER = 1.5

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


def _read_fitted(path: str, box_px: int, max_pixels: int) -> tuple[ImageHeader, Any]:
    """The header, and the first frame upright and inside a square, decoded strictly."""
    header = read_header(Path(path))
    if header is None:
        raise ImageUnreadable(BROKEN)
    _refuse_beyond(max_pixels, header.width_px, header.height_px)
    options = _shrink_on_load(header, box_px)
    image = loader(header.mime)(path, access="sequential", fail_on="error", **options)
    _refuse_beyond(max_pixels, image.width, image.height)  # whatever its header said
    return header, _shrink(image, _size_inside(_upright_size(header), box_px))


def _refuse_beyond(max_pixels: int, width_px: int, height_px: int) -> None:
    if width_px * height_px > max_pixels:
        raise ImageUnreadable(f"The image has more than {max_pixels:,} pixels.")


def _size_inside(size_px: tuple[int, int], box_px: int) -> tuple[int, int]:
    width, height = size_px
    scale = min(1, box_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _shrink_on_load(header: ImageHeader, box_px: int) -> dict[str, Any]:
    """What makes a decoder give as small an image as does no harm to what is made of it."""
    shrink = max(header.width_px, header.height_px) / box_px
    if min(header.width_px, header.height_px) < shrink:
        return {}  # so thin that a decoder would leave nothing of it; it has few pixels
    if header.mime == "image/jpeg" and shrink >= 2 * _LEFT_TO_RESIZER:
        return {"shrink": next(n for n in (8, 4, 2) if shrink >= n * _LEFT_TO_RESIZER)}
    if header.mime == "image/webp" and shrink >= 4:
        return {"scale": 2 / shrink}
    return {}


def _shrink(image: Any, size_px: tuple[int, int]) -> Any:
    """Upright, in 8 bit sRGB, with alpha if it has any, and of exactly this size.

    Its pixels are made when they are asked for, and once only.
    """
    width, height = size_px
    # Where there is nothing to convert, colour management would be a third of the work.
    is_srgb = image.interpretation in ("srgb", "b-w") and not image.get_typeof("icc-profile-data")
    colours = {} if is_srgb else {"output_profile": "srgb"}
    fitted = image.thumbnail_image(width, height=height, size="force", **colours)
    return fitted.colourspace("srgb").cast("uchar")


def _upright_size(header: ImageHeader) -> tuple[int, int]:
    if header.orientation >= 5:
        return header.height_px, header.width_px
    return header.width_px, header.height_px


def encode_jpeg(image: Any, quality: int) -> bytes:
    return bytes(image.jpegsave_buffer(Q=quality, keep="none"))


def make_provider_copy(path: str, max_pixels: int) -> ProviderCopy:
    header, pixels = _read_fitted(path, COPY_LONG_SIDE_PX, max_pixels)
    image = pixels.copy_memory()
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


def make_thumbnail(path: str, max_pixels: int, box_px: int, as_webp: bool) -> Rendition:
    _, image = _read_fitted(path, box_px, max_pixels)
    content, mime = _encode_thumbnail(image, as_webp)
    return Rendition(content, mime, image.width, image.height)


def _encode_thumbnail(image: Any, as_webp: bool) -> tuple[bytes, str]:
    if as_webp:
        options = {"Q": THUMBNAIL_WEBP_QUALITY, "effort": THUMBNAIL_WEBP_EFFORT, "keep": "none"}
        return bytes(image.webpsave_buffer(**options)), "image/webp"
    if image.hasalpha():
        return bytes(image.pngsave_buffer(keep="none")), "image/png"
    return encode_jpeg(image, THUMBNAIL_QUALITY), "image/jpeg"
