"""Pictures for tests, as bytes: every format and shape that Loupe reads, refuses or survives.

`PICTURES` has them all by name. Each is drawn once, when first asked for.
"""

import base64
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pyvips

Colour = tuple[int, int, int]

RED: Colour = (220, 30, 30)
GREEN: Colour = (30, 160, 60)
BLUE: Colour = (40, 70, 210)
YELLOW: Colour = (240, 210, 40)

# How `quadrants` looks upright: top left, top right, bottom left, bottom right.
QUADRANTS = (RED, GREEN, BLUE, YELLOW)
QUADRANT_WIDTH, QUADRANT_HEIGHT = 240, 160

# What has to be done to an upright picture so that each EXIF orientation undoes it.
_TO_STORED: dict[int, Callable[[Any], Any]] = {
    1: lambda image: image,
    2: lambda image: image.fliphor(),
    3: lambda image: image.rot180(),
    4: lambda image: image.flipver(),
    5: lambda image: image.rot90().fliphor(),
    6: lambda image: image.rot270(),
    7: lambda image: image.rot90().flipver(),
    8: lambda image: image.rot90(),
}


def plain(width: int, height: int, colour: Colour) -> Any:
    """One colour, as a libvips image."""
    image = pyvips.Image.black(width, height, bands=3) + list(colour)
    return image.cast("uchar").copy(interpretation="srgb")


def quadrants(width: int = QUADRANT_WIDTH, height: int = QUADRANT_HEIGHT) -> Any:
    """Four colours, so that every turn and flip can be told apart."""
    parts = [plain(width // 2, height // 2, colour) for colour in QUADRANTS]
    return pyvips.Image.arrayjoin(parts, across=2).copy(interpretation="srgb")


def noise(width: int, height: int, *, sigma: float = 60, seed: int = 1) -> Any:
    bands = [
        pyvips.Image.gaussnoise(width, height, mean=128, sigma=sigma, seed=seed + band)
        for band in range(3)
    ]
    return bands[0].bandjoin(bands[1:]).cast("uchar").copy(interpretation="srgb")


def half_transparent() -> Any:
    """`quadrants`, with the left half transparent."""
    upright = quadrants()
    alpha = pyvips.Image.xyz(upright.width, upright.height)[0] >= upright.width / 2
    return upright.bandjoin(alpha).copy(interpretation="srgb")


def as_jpeg(image: Any, **options: Any) -> bytes:
    return bytes(image.jpegsave_buffer(**{"Q": 95, **options}))


def as_png(image: Any, **options: Any) -> bytes:
    return bytes(image.pngsave_buffer(**options))


def jpeg(width: int = QUADRANT_WIDTH, height: int = QUADRANT_HEIGHT) -> bytes:
    return as_jpeg(quadrants(width, height))


def oriented_jpeg(orientation: int) -> bytes:
    """Stored turned or flipped, with the EXIF orientation that puts it upright."""
    image = _TO_STORED[orientation](quadrants()).copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", orientation)
    return as_jpeg(image)


def progressive_jpeg() -> bytes:
    return as_jpeg(quadrants(), interlace=True)


def cmyk_jpeg(*, with_profile: bool = True) -> bytes:
    ink = quadrants().icc_transform("cmyk", input_profile="srgb")
    return as_jpeg(ink, keep="icc" if with_profile else "none")


def display_p3_jpeg() -> bytes:
    """Another colour space, by its ICC profile."""
    return as_jpeg(quadrants().icc_transform("p3", input_profile="srgb"))


def grey_jpeg() -> bytes:
    return as_jpeg(quadrants().colourspace("b-w"))


def wide_jpeg() -> bytes:
    """12,000 pixels wide."""
    return as_jpeg(quadrants(12_000, 2_000), Q=75)


def noisy_jpeg() -> bytes:
    """The most that a picture can weigh."""
    return as_jpeg(noise(1500, 1500))


def truncated_jpeg() -> bytes:
    """The header and half of the pixels."""
    whole = as_jpeg(noise(600, 400))
    return whole[: len(whole) // 2]


def jpeg_with_html_tail() -> bytes:
    return jpeg() + b"<html><script>alert(1)</script></html>"


def png() -> bytes:
    return as_png(quadrants())


def png16() -> bytes:
    return as_png(quadrants().colourspace("rgb16"))


def png16_with_alpha() -> bytes:
    return as_png(half_transparent().colourspace("rgb16"))


def palette_png() -> bytes:
    return as_png(quadrants(), palette=True)


def alpha_png() -> bytes:
    return as_png(half_transparent())


def grey_png() -> bytes:
    return as_png(quadrants().colourspace("b-w"))


def interlaced_png() -> bytes:
    return as_png(quadrants(), interlace=True)


def dot_png() -> bytes:
    """One red pixel."""
    return as_png(plain(1, 1, RED))


def line_png() -> bytes:
    """5,000 x 2 pixels."""
    return as_png(plain(5_000, 2, BLUE))


def webp() -> bytes:
    return bytes(quadrants().webpsave_buffer(Q=95))


def alpha_webp() -> bytes:
    return bytes(half_transparent().webpsave_buffer(lossless=True))


def gif() -> bytes:
    return bytes(quadrants().gifsave_buffer())


def _frames() -> Any:
    """Three frames: `quadrants`, then two others."""
    still = quadrants()
    strip = pyvips.Image.arrayjoin([still, still.rot180(), still.fliphor()], across=1).copy()
    strip.set_type(pyvips.GValue.gint_type, "page-height", still.height)
    return strip


def animated_gif() -> bytes:
    return bytes(_frames().gifsave_buffer())


def animated_webp() -> bytes:
    return bytes(_frames().webpsave_buffer(lossless=True))


def avif() -> bytes:
    return bytes(quadrants().heifsave_buffer(compression="av1", Q=90, effort=0))


def tiff() -> bytes:
    return bytes(quadrants().tiffsave_buffer(compression="deflate"))


def big_endian_tiff() -> bytes:
    return tiff_of_pages(1, order=">")


def transparent_gif_data_uri() -> str:
    """The 1x1 transparent GIF that web pages use as a spacer."""
    return "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def transparent_gif() -> bytes:
    return base64.b64decode(transparent_gif_data_uri().partition(",")[2])


def empty() -> bytes:
    return b""


def text() -> bytes:
    return b"This is not a picture, whatever its name says.\n" * 20


def random_bytes() -> bytes:
    """The same ones each time."""
    return b"".join(zlib.crc32(bytes([i % 251, i // 251])).to_bytes(4) for i in range(1000))


def heic_header() -> bytes:
    brands = b"heic" + bytes(4) + b"mif1" + b"heic"
    return struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(200)


def bmp() -> bytes:
    pixels = bytes(RED[::-1]) * 4 + bytes(4)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 24, 0, len(pixels), 2835, 2835, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 54 + len(pixels), 0, 0, 54) + header + pixels


def svg() -> bytes:
    return (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9">'
        b"<script>alert(1)</script><rect width='9' height='9'/></svg>"
    )


def pdf() -> bytes:
    return b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"


# --- Made by hand, byte by byte ----------------------------------------------------------------

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def png_of_size(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG that claims a size, with a few black pixels and chunks before them."""
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    end = png_chunk(b"IEND", b"")
    return PNG_SIGNATURE + png_header(width, height) + b"".join(extra) + pixels + end


def black_png(width: int, height: int) -> bytes:
    """All its pixels are there: a thousandth of their size when packed."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width * 3)
    pixels = b"".join([packer.compress(row) for _ in range(height)]) + packer.flush()
    body = png_header(width, height) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")
    return PNG_SIGNATURE + body


def bomb_header_png() -> bytes:
    return png_of_size(50_000, 50_000)


def bomb_png() -> bytes:
    """169 megapixels in half a megabyte."""
    return black_png(13_000, 13_000)


def zero_png() -> bytes:
    return png_of_size(0, 0)


def broken_header_png() -> bytes:
    return PNG_SIGNATURE + png_chunk(b"IHDR", b"\xff" * 13) + bytes(100)


def text_bomb_png() -> bytes:
    """Twenty text chunks of 40 MiB each, packed to 40 KB."""
    packed = zlib.compress(bytes(40 * 1024 * 1024), 9)
    chunks = [png_chunk(b"zTXt", b"Comment%d\0\0" % i + packed) for i in range(20)]
    return png()[:33] + b"".join(chunks) + png()[33:]


def many_chunks_png() -> bytes:
    return png_of_size(8, 8, png_chunk(b"tEXt", b"a\0b") * 100_000)


def many_markers_jpeg() -> bytes:
    """Millions of empty application segments, each of which libvips would keep."""
    whole = jpeg()
    return whole[:2] + b"\xff\xe1\0\2" * 2_000_000 + whole[2:]


def long_metadata_jpeg() -> bytes:
    """Two megabytes of metadata before the frame header, as cameras write them."""
    whole = oriented_jpeg(6)
    segment = b"\xff\xe2" + (65_002).to_bytes(2) + b"MPF\0" + bytes(64_996)
    return whole[:2] + segment * 32 + whole[2:]


def many_frames_gif() -> bytes:
    """200,000 frames of one pixel each."""
    screen = struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + bytes([0, 0, 0, 255, 255, 255])
    control = b"\x21\xf9\x04\x00\x01\x00\x00\x00"
    frame = control + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + screen + frame * 200_000 + b";"


def _riff_chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def many_frames_webp() -> bytes:
    """100,000 frames. libvips takes time with the square of that."""
    size = (15).to_bytes(3, "little") * 2
    pixels = bytes(plain(16, 16, RED).webpsave_buffer(keep="none"))[12:]
    frame = _riff_chunk(b"ANMF", bytes(6) + size + (100).to_bytes(3, "little") + b"\0" + pixels)
    chunks = _riff_chunk(b"VP8X", b"\2\0\0\0" + size) + _riff_chunk(b"ANIM", bytes(6))
    return b"RIFF" + struct.pack("<I", 4) + b"WEBP" + chunks + frame * 100_000


def tiff_of_pages(pages: int, *, is_circle: bool = False, order: str = "<") -> bytes:
    """White pages of 8 x 8 pixels. As a circle, the last one points back to the first."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    out = bytearray(magic + struct.pack(order + "I", 16) + b"\xff" * 8)
    fields = ((256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (278, 8))
    entries = [struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in fields]
    entries.insert(5, struct.pack(order + "HHII", 273, 4, 1, 8))
    entries.append(struct.pack(order + "HHII", 279, 4, 1, 8))
    for page in range(pages):
        is_last = page == pages - 1
        after = len(out) + 2 + 12 * len(entries) + 4
        following = (16 if is_circle else 0) if is_last else after
        out += struct.pack(order + "H", len(entries)) + b"".join(entries)
        out += struct.pack(order + "I", following)
    return bytes(out)


def circular_tiff() -> bytes:
    return tiff_of_pages(3, is_circle=True)


def many_pages_tiff() -> bytes:
    return tiff_of_pages(60_000)


# Read well: a header, a provider copy and a thumbnail.
READABLE: dict[str, Callable[[], bytes]] = {
    "jpeg": cache(jpeg),
    **{f"jpeg-orientation-{n}": cache(partial(oriented_jpeg, n)) for n in _TO_STORED},
    "jpeg-progressive": cache(progressive_jpeg),
    "jpeg-cmyk": cache(cmyk_jpeg),
    "jpeg-cmyk-without-profile": cache(partial(cmyk_jpeg, with_profile=False)),
    "jpeg-display-p3": cache(display_p3_jpeg),
    "jpeg-grey": cache(grey_jpeg),
    "jpeg-12000-wide": cache(wide_jpeg),
    "jpeg-noisy": cache(noisy_jpeg),
    "jpeg-with-html-tail": cache(jpeg_with_html_tail),
    "jpeg-long-metadata": cache(long_metadata_jpeg),
    "png": cache(png),
    "png-16-bit": cache(png16),
    "png-16-bit-alpha": cache(png16_with_alpha),
    "png-palette": cache(palette_png),
    "png-alpha": cache(alpha_png),
    "png-grey": cache(grey_png),
    "png-interlaced": cache(interlaced_png),
    "png-1x1": cache(dot_png),
    "png-5000x2": cache(line_png),
    "webp": cache(webp),
    "webp-alpha": cache(alpha_webp),
    "webp-animated": cache(animated_webp),
    "gif": cache(gif),
    "gif-animated": cache(animated_gif),
    "gif-1x1-transparent": cache(transparent_gif),
    "avif": cache(avif),
    "tiff": cache(tiff),
    "tiff-big-endian": cache(big_endian_tiff),
}
# An image by its header, but its pixels are broken or too many.
UNREADABLE: dict[str, Callable[[], bytes]] = {
    "jpeg-truncated": cache(truncated_jpeg),
    "png-50000x50000": cache(bomb_header_png),
    "png-169-megapixels": cache(bomb_png),
    "png-0x0": cache(zero_png),
}
# None of the six formats, or a header that cannot be read.
NOT_IMAGES: dict[str, Callable[[], bytes]] = {
    "empty": cache(empty),
    "text": cache(text),
    "random": cache(random_bytes),
    "heic": cache(heic_header),
    "bmp": cache(bmp),
    "svg": cache(svg),
    "pdf": cache(pdf),
    "png-broken-header": cache(broken_header_png),
    "png-many-chunks": cache(many_chunks_png),
    "jpeg-many-markers": cache(many_markers_jpeg),
    "webp-many-frames": cache(many_frames_webp),
    "tiff-many-pages": cache(many_pages_tiff),
    "tiff-circular": cache(circular_tiff),
}
# Work, but bounded: an image whose every part is fine.
LABORIOUS: dict[str, Callable[[], bytes]] = {
    "png-text-bomb": cache(text_bomb_png),
    "gif-many-frames": cache(many_frames_gif),
}
PICTURES: dict[str, Callable[[], bytes]] = {**READABLE, **UNREADABLE, **NOT_IMAGES, **LABORIOUS}
